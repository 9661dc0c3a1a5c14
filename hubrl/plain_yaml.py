"""Plain data as YAML; what a stranger's YAML may not hold is refused in one line."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20  # each takes some hundred of memory
MAX_DEPTH = 32
MAX_BITS, MAX_DIGITS = 63, 99  # of a number


def read_yaml(file: Path, what: str) -> Any:
    """
    The plain data of a YAML file that may be a stranger's, as ``parse_yaml`` gives them.

    :param what: such a file's name in messages
    :raises ValueError: if it is longer than a megabyte, or as ``parse_yaml``
    """
    n_bytes = file.stat().st_size
    if n_bytes > MAX_BYTES:
        raise ValueError(f"{what} {file}, {n_bytes:,} bytes long, allowed: {MAX_BYTES:,}")
    try:
        text = file.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {file} is not valid YAML: {error}") from None
    return parse_yaml(text, f"{what} {file}")


def parse_yaml(text: str, what: str) -> Any:
    """
    The plain data of YAML that may be a stranger's.

    Anchors and aliases are refused: a few lines of them can stand for more than fits in memory.

    :param what: its name in messages
    :raises ValueError: if it is no YAML, has an anchor, an alias or a tag, is nested too deeply, or
        holds control characters or numbers of more than 63 bits
    """
    try:
        _check_events(text)
        return yaml.load(text, _PlainLoader)
    except _RefusedError as error:
        raise ValueError(f"{what}, {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # such as dates of a 13th month
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} is not valid YAML: {reason}") from None


def dump_yaml(data: Any) -> str:
    """YAML of plain data, keys in their order, that ``read_yaml`` takes."""
    return yaml.dump(data, Dumper=_PlainDumper, sort_keys=False, width=100, allow_unicode=True)


class _RefusedError(Exception):
    """YAML that is valid, but not taken."""


class _PlainLoader(yaml.CSafeLoader):
    """Refuses numbers that take long to read or don't fit."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        is_int, text = node.tag.endswith(":int"), str(node.value)
        if len(text) <= MAX_DIGITS:
            read = self.construct_yaml_int if is_int else self.construct_yaml_float
            number: int | float = read(node)
            if not is_int or int(number).bit_length() <= MAX_BITS:
                return number
        raise _refusal(node, f"has the number {text[:20]}..., allowed: {MAX_BITS} bits at most")


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _PlainLoader.construct_number)


def _check_events(document: str) -> None:
    """Refuse a document before anything is built of it."""
    depth = 0
    for event in yaml.parse(document, yaml.CSafeLoader):
        name, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if name is not None:  # of an alias, too
            raise _refusal(
                event,
                f"has the YAML anchor or alias {name!r}, allowed: none; write out at each place "
                "what it stands for",
            )
        if tag is not None:
            raise _refusal(event, f"has the YAML tag {tag!r}, allowed: none; leave it out")
        text = getattr(event, "value", "")
        if any(map(_is_control, text)):
            raise _refusal(event, f"has control characters, allowed: text ({text[:20]!r})")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _refusal(event, f"is nested deeper than the {MAX_DEPTH} levels allowed")


def _refusal(place: Any, why: str) -> _RefusedError:
    return _RefusedError(f"line {place.start_mark.line + 1}, {why}")


def _is_control(char: str) -> bool:
    """Of those a terminal obeys some."""
    return unicodedata.category(char) == "Cc" and char not in "\n\t"


class _PlainDumper(yaml.CSafeDumper):
    """Writes out each value, where PyYAML would name one that it meets again."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
