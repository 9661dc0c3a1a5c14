"""A hub's encoders in memory: trained ones owned, frozen ones shared; how far they have moved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar, NamedTuple, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from hubrl.encoders import Encoder, build_encoder
from hubrl.specs import EncoderSpec, HubSpec


class EncoderList(nn.Module):
    """
    The encoders of a hub: trained ones are submodules, frozen ones are held once per process.

    A frozen encoder that came from a weight file is no submodule: it stays out of
    ``parameters()``, ``state_dict()``, optimizers, polyak updates and copies, and all networks of
    the process that use it share its tensors. Its card's sha256 says what it is.

    :param hub: the cards
    :param frozen: names of encoders whose weights don't learn
    :param pretrained: load the hub's weights; otherwise random ones
    """

    def __init__(self, hub: HubSpec, frozen: Collection[str], pretrained: bool) -> None:
        super().__init__()
        self.owned = nn.ModuleDict()
        self._shared: dict[str, SharedEncoder] = {}
        self._hub, self._pretrained = hub, pretrained
        self._names = hub.encoder_names
        for spec in hub.encoders:
            if spec.name in frozen and pretrained and spec.weights is not None:
                self._shared[spec.name] = SharedEncoder.of(hub, spec, torch.device("cpu"))
            else:
                encoder = build_encoder(hub, spec, pretrained=pretrained)
                self._hold(encoder.requires_grad_(spec.name not in frozen))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Encoder:
        name = self._names[index]
        if name in self._shared:
            return self._shared[name].encoder
        encoder = self.owned[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def __iter__(self) -> Iterator[Encoder]:
        return (self[i] for i in range(len(self)))

    def shared_sha256(self) -> dict[str, str | None]:
        """For each encoder the sha256 of its weight file if it is shared, else None."""
        return {
            name: self._shared[name].encoder.spec.sha256 if name in self._shared else None
            for name in self._names
        }

    @torch.no_grad()
    def changes(self) -> list[EncoderChange]:
        """
        Compare each encoder with its file.

        :raises ValueError: if a weight file is missing or another one by now
        """
        return [self._change(encoder) for encoder in self]

    def _change(self, encoder: Encoder) -> EncoderChange:
        spec = encoder.spec
        if not self._pretrained or spec.weights is None:
            return EncoderChange(spec.name, encoder.is_frozen, False, None)
        old = build_encoder(self._hub, spec).trunk.state_dict()
        pairs = [(new.cpu(), old[key]) for key, new in encoder.trunk.state_dict().items()]
        is_same = all(torch.equal(new, before) for new, before in pairs)
        moved = sum(float((new.double() - before.double()).square().sum()) for new, before in pairs)
        length = sum(float(before.double().square().sum()) for _, before in pairs)
        return EncoderChange(spec.name, encoder.is_frozen, is_same, (moved / length) ** 0.5)

    def _hold(self, encoder: Encoder) -> None:
        """Keep one that isn't shared."""
        self.owned[encoder.spec.name] = encoder

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.zeros(0)).device
        self._shared = {name: shared.to(device) for name, shared in self._shared.items()}
        return self


class EncoderChange(NamedTuple):
    """How an encoder differs from its weight file."""

    name: str
    is_frozen: bool
    is_same: bool
    """Bit by bit, statistics of normalisation included."""
    distance: float | None
    """Length of the difference over that of the file's weights; None: it began at random."""


#: Builds them from hub, names of frozen ones and ``pretrained``, as ``EncoderList`` does.
BuildEncoders = Callable[[HubSpec, Collection[str], bool], EncoderList]


class SharedEncoder:
    """A frozen encoder that copies of a network share; no module, so that nothing registers it."""

    _held: ClassVar[WeakValueDictionary[tuple[str, str], SharedEncoder]] = WeakValueDictionary()

    def __init__(self, hub: HubSpec, encoder: Encoder, device: torch.device) -> None:
        self._hub = hub
        self.encoder = encoder.requires_grad_(False).to(device)

    @classmethod
    def of(cls, hub: HubSpec, spec: EncoderSpec, device: torch.device) -> SharedEncoder:
        """The one instance for this card and device."""
        key = (f"{hub.folder} {spec}", str(device))
        shared = cls._held.get(key)
        if shared is None:
            shared = cls._held[key] = cls(hub, build_encoder(hub, spec), device)
        return shared

    def to(self, device: torch.device) -> SharedEncoder:
        """The instance on another device."""
        return SharedEncoder.of(self._hub, self.encoder.spec, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedEncoder:
        return self
