"""Sections of a configuration: frozen, typed, complete; wrong ones are explained in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import pydantic
from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hubrl.plain_yaml import parse_yaml, read_yaml
from hubrl.specs import closest


def _number(value: Any) -> Any:
    """``1e6`` without a dot is a string in YAML 1.1, but a number to everyone else."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Integer = Annotated[int, BeforeValidator(_number)]
Count = Annotated[Integer, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(pydantic.BaseModel):
    """Frozen data; an unknown key is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Schedule(Section):
    """
    A number that moves linearly from ``start`` to ``end`` over the run.

    In YAML: ``{start: 0.1, end: 0.01}``, or ``0.1`` for a constant, or ``{linear: 0.1}`` for
    ``{start: 0.1, end: 0}``.
    """

    start: NonNegative
    end: NonNegative

    @classmethod
    def constant(cls, value: float) -> Self:
        """One that doesn't move."""
        return cls(start=value, end=value)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        if isinstance(data, (int, float, str)):
            return {"start": data, "end": data}
        if isinstance(data, dict) and set(data) == {"linear"}:
            return {"start": data["linear"], "end": 0.0}
        return data

    @pydantic.model_serializer
    def _shorten(self) -> float | dict[str, float]:
        if self.start == self.end:
            return self.start
        return {"start": self.start, "end": self.end}

    def __call__(self, progress_remaining: float) -> float:
        """
        The value at a point of the run.

        :param progress_remaining: 1 at the start, 0 at the end, as in SB3
        """
        # SB3's last rollout may pass the end: a learning rate must not become negative.
        return self.end + (self.start - self.end) * max(progress_remaining, 0.0)


Config = TypeVar("Config", bound=Section)


def parse(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """
    Check plain data.

    :param cls: what it shall be
    :raises ValueError: one line for the first wrong key or value: its key path, the value, what is
        allowed, and the closest key
    """
    try:
        return cls.model_validate(data)
    except pydantic.ValidationError as error:
        raise ValueError(_explain(cls, error)) from None


def read_mapping(file: Path) -> dict[str, Any]:
    """
    :raises ValueError: if the file can't be read as a mapping of keys to values, or a key at any
        depth is no text; one line
    """
    data = read_yaml(file, "config file")
    if not isinstance(data, dict):
        raise ValueError(f"config file {file} must be a mapping of keys to values")
    _check_keys(data, f"config file {file}")
    return data


def given_settings(
    cls: type[Section], keys: Mapping[str, str], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Values by key path, and how the user gave each: by an option, or by ``--set SECTION.KEY=VALUE``.

    :param cls: the configuration whose keys they are
    :param keys: the key path of each option
    :param given: options and their values; those of ``set`` are texts, whose values are YAML
    :raises ValueError: if such a text is something else, has a section that ``cls`` has not, or is
        given twice
    """
    found = {keys[name]: value for name, value in given.items() if name in keys}
    named = {keys[name]: f"--{name.replace('_', '-')}" for name in given if name in keys}
    for text in given.get("set", ()):
        path, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"--set {text}: give SECTION.KEY=VALUE")
        check_override(cls, path, "--set")
        if path in found:
            raise ValueError(f"--set {path}: it is given twice; give it once")
        found[path] = parse_yaml(value, f"--set {path}")
        _check_keys(found[path], f"--set {path}")
        named[path] = f"--set {path}"
    return found, named


def check_override(cls: type[Section], path: str, where: str) -> None:
    """
    :param path: ``SECTION.KEY``; whether the section has the key only ``parse`` knows
    :param where: it stands, for the message
    :raises ValueError: if it is something else, or ``cls`` has no such section
    """
    section, dot, key = path.partition(".")
    sections = [name for name, field in cls.model_fields.items() if _classes(field.annotation)]
    if not dot or not key or section not in sections:
        hint = "" if section in sections else closest(section, sections)
        raise ValueError(
            f"{where} has the key {path!r}{hint}, allowed: SECTION.KEY with a section of "
            f"{', '.join(sections)}"
        )
    if "." in key:
        raise ValueError(f"{where} has the key {path!r}, allowed: SECTION.KEY with one dot")


def with_overrides(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """
    The data with values by key path, such as ``{"train.seed": 3}``, which win.

    A path into a section that isn't there is left to ``parse`` to report.
    """
    for path, value in overrides.items():
        section, key = path.split(".")
        if isinstance(data.get(section), dict):
            data[section][key] = value
    return data


def with_later_keys(data: dict[str, Any], later: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """
    A run's configuration, completed by the keys that are newer than the run.

    :param later: these keys by section, and what runs did before
    """
    sections = {
        name: {**keys, **data[name]}
        for name, keys in later.items()
        if isinstance(data.get(name), dict)
    }
    return data | sections


def _check_keys(data: Any, where: str) -> None:
    for key in _keys(data):
        if not isinstance(key, str):  # such as `no`, which is false in YAML
            raise ValueError(f"{where} has the key {key!r}, allowed: text; quote it")


def _keys(data: Any) -> Iterator[Any]:
    """Those at all depths."""
    if isinstance(data, dict):
        yield from data
    if isinstance(data, (dict, list)):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _keys(value)


def _explain(cls: type[Section], error: pydantic.ValidationError) -> str:
    """The first error in one line; unknown keys first, for they explain missing ones."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    loc, owner = _place(cls, _keys_of(first))
    path = ".".join(loc)
    if first["type"] == "extra_forbidden":
        keys = list(owner.model_fields)
        return f"unknown key {path}{closest(loc[-1], keys)}, keys: {', '.join(keys)}"
    if first["type"] == "missing":
        missing = [_place(cls, _keys_of(e))[0] for e in error.errors() if e["type"] == "missing"]
        names = ", ".join(".".join(keys) for keys in missing)
        what = f"key {names} is" if len(missing) == 1 else f"keys {names} are"
        return f"{what} missing: a configuration is complete"
    allowed = _range(owner.model_fields.get(loc[-1]))
    allowed = allowed or first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{path} is {first['input']!r}, allowed: {allowed}"


def _keys_of(error: ErrorDetails) -> list[str]:
    return [part for part in error["loc"] if isinstance(part, str)]


def _place(cls: type[Section], loc: Sequence[str]) -> tuple[list[str], type[Section]]:
    """
    The path as a user wrote it, and the section that its last key belongs to.

    Where a section is one of several, pydantic puts the name of the one that was taken after it.
    """
    owner, path = cls, [loc[0]]
    i = 0
    while i + 1 < len(loc):
        field = owner.model_fields.get(loc[i])
        if field and get_origin(field.annotation) is dict:  # of sections, by name
            i += 1
            path.append(loc[i])
        choices = [c for c in _classes(field.annotation if field else None)]
        if len(choices) > 1:
            i += 1
            choices = [c for c in choices if loc[i] in get_args(c.model_fields["name"].annotation)]
        if not choices or i + 1 == len(loc):
            break
        owner = choices[0]
        i += 1
        path.append(loc[i])
    return path, owner


def _classes(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [cls for part in get_args(annotation) for cls in _classes(part)]


def _range(field: FieldInfo | None) -> str:
    """``"a number above 0, or 'auto'"`` and the like; empty for a field without bounds."""
    if field is None:
        return ""
    choices = get_args(field.annotation)
    words = [repr(word) for c in choices if get_origin(c) is Literal for word in get_args(c)]
    for choice in choices if words else ():
        if get_origin(choice) is Annotated:
            kind, *notes = get_args(choice)
            bounds = [bound for note in notes for bound in getattr(note, "metadata", ())]
            return f"{_bounds(kind, bounds)}, or {' or '.join(words)}"
    return _bounds(field.annotation, field.metadata)


def _bounds(annotation: Any, metadata: Sequence[Any]) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    kind = "a whole number" if annotation is int else "a number"
    return f"{kind} {' and '.join(bounds)}" if bounds else ""
