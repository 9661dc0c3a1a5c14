"""Encoders whose weights lie in files: few are in memory, each is swapped in when it runs."""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hubrl.encoder_list import EncoderList
from hubrl.encoders import Encoder
from hubrl.files import DamagedFileError, save_tensors
from hubrl.finite import NotFiniteError, are_finite, first_not_finite
from hubrl.specs import HubSpec
from hubrl.state_folder import link_file, optimizer_state

# Shape letters: B batch, D features, C H W image.

#: Inside the run folder, and so on the disk of its checkpoints.
SWAP_FOLDER = "swap"
#: An optimizer of these weights; None where none of them learns.
BuildOptimizer = Callable[[Iterable[Tensor]], Optimizer | None]
#: Sets the learning rates of a step.
SetRates = Callable[[Optimizer], None]


class Swap(NamedTuple):
    """How encoders are swapped."""

    n_resident: int
    """Encoders in memory at most."""
    folder: Path
    """For the others; made anew, and no longer needed at the end of a process."""


class SwappedEncoders(EncoderList):
    """
    The encoders of a hub, of which at most ``swap.n_resident`` are in memory.

    One that runs is swapped in: its weights are memory-mapped from a safetensors file. The least
    recently used one goes, and with it what its optimizer knows; if it has learned, both are
    written. They are no submodules: ``parameters()`` and ``state_dict()`` of a method leave them
    out.

    Autograd would keep the weights of all encoders that ran until backward. So forward keeps none:
    an encoder's backward runs it again, and steps its optimizer there and then. An encoder must
    therefore run only once in a training step, as dispatch does it, and no gradients can be clipped
    or averaged over processes.

    :param hub: the cards
    :param frozen: names of encoders whose weights don't learn
    :param pretrained: load the hub's weights; otherwise random ones
    :param swap: how many stay, and where the others go
    :raises ValueError: as ``build_encoder``
    """

    def __init__(
        self, hub: HubSpec, frozen: Collection[str], pretrained: bool, *, swap: Swap
    ) -> None:
        self._swap = swap
        self._swapped: dict[str, SwappedEncoder] = {}
        self._resident: dict[SwappedEncoder, None] = {}  # the least recently used one first
        shutil.rmtree(swap.folder, ignore_errors=True)  # of a process that was killed
        swap.folder.mkdir(parents=True)
        try:
            super().__init__(hub, frozen, pretrained)
        except NotFiniteError as error:  # of a file that is swapped out as it was read
            self.remove()
            raise ValueError(str(error)) from None
        except ValueError:
            self.remove()
            raise

    def __getitem__(self, index: int) -> Encoder:
        name = self._names[index]
        return self._swapped[name] if name in self._swapped else super().__getitem__(index)

    def learn(self, build_optimizer: BuildOptimizer, schedule: SetRates) -> None:
        """
        Let the encoders learn from now on, each with a fresh optimizer.

        :param build_optimizer: called for each encoder; before, encoders don't learn
        :param schedule: called before each step of one
        """
        for encoder in self._swapped.values():
            encoder.learn(build_optimizer, schedule)

    def files(self) -> list[Path]:
        """The files of all encoders as they are now; one is replaced, but never changes."""
        for encoder in self._resident:
            encoder.save()
        return sorted(self._swap.folder.iterdir())

    def restore(self, folder: Path) -> None:
        """
        Go back to the files that were linked into a folder.

        :raises DamagedFileError: if it lacks one
        """
        self._resident.clear()
        for encoder in self._swapped.values():
            encoder.restore(folder)

    def remove(self) -> None:
        """Remove the swap folder, and the run folder if it holds nothing else: it was refused."""
        shutil.rmtree(self._swap.folder)
        with contextlib.suppress(OSError):
            self._swap.folder.parent.rmdir()

    def _hold(self, encoder: Encoder) -> None:
        self._swapped[encoder.spec.name] = SwappedEncoder(encoder, self._swap.folder, self._enter)

    def _enter(self, encoder: SwappedEncoder) -> None:
        """Have an encoder in memory."""
        if encoder in self._resident:
            del self._resident[encoder]
        else:
            while len(self._resident) >= self._swap.n_resident:
                oldest = next(iter(self._resident))
                oldest.swap_out()
                del self._resident[oldest]
            encoder.swap_in()
        self._resident[encoder] = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for encoder in self._swapped.values():
            encoder._apply(fn)
        return self


class SwappedEncoder(Encoder):
    """
    An encoder that is in memory while ``enter`` allows it.

    :param encoder: what it is; its weights are written and swapped out
    :param folder: of its files
    :param enter: swaps it in, and another one out
    """

    def __init__(
        self, encoder: Encoder, folder: Path, enter: Callable[[SwappedEncoder], None]
    ) -> None:
        super().__init__(encoder.spec, encoder.trunk)
        self._enter = enter
        self._tensors = dict(self.trunk.named_parameters()) | dict(self.trunk.named_buffers())
        self._shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._weights_file = folder / f"encoder.{self.spec.name}.safetensors"
        self._optimizer_file = folder / f"encoder.{self.spec.name}.optimizer.safetensors"
        self._optimizer: Optimizer | None = None
        self._schedule: SetRates | None = None
        self._is_changed = True
        self.swap_out()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # It keeps parameters, but makes buffers anew.
        self._tensors |= dict(self.trunk.named_buffers())
        return self

    def forward(self, images_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """As of ``Encoder``; images get no gradient."""
        if self._optimizer is None or not torch.is_grad_enabled():
            return self.run(images_BCHW, dtype)
        # Without an input that has a gradient, autograd would not ask for this one.
        anchor = torch.zeros((), device=images_BCHW.device, requires_grad=True)
        features_BD: Tensor = _Recomputed.apply(images_BCHW, anchor, self, dtype)
        return features_BD

    @torch.no_grad()
    def run(self, images_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
        """Features (B, D) that autograd knows nothing of."""
        self._enter(self)
        return super().forward(images_BCHW, dtype)

    def step(self, images_BCHW: Tensor, dtype: torch.dtype, gradients_BD: Tensor) -> None:
        """
        Learn from the gradients of the features.

        :param images_BCHW: what the features were of
        :raises NotFiniteError: if the gradient of a weight is NaN or infinite, before any changes
        """
        assert self._optimizer is not None
        assert self._schedule is not None
        self._enter(self)
        with torch.enable_grad():
            features_BD = super().forward(images_BCHW, dtype)
        torch.autograd.backward(features_BD, gradients_BD)
        if not are_finite(weight.grad for weight in self.weights if weight.grad is not None):
            raise NotFiniteError(f"a gradient of encoder {self.spec.name} is NaN or infinite")
        self._load_moments(self._optimizer)
        self._schedule(self._optimizer)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._is_changed = True

    def learn(self, build_optimizer: BuildOptimizer, schedule: SetRates) -> None:
        """As of ``SwappedEncoders``."""
        self._optimizer, self._schedule = build_optimizer(self.weights), schedule
        self._optimizer_file.unlink(missing_ok=True)

    def swap_in(self) -> None:
        """
        Map the weights; what the optimizer knows follows when it is needed.

        :raises DamagedFileError: if the file is of another encoder
        """
        values = load_file(self._weights_file, device=str(self.mean.device))
        if {name: value.shape for name, value in values.items()} != self._shapes:
            raise DamagedFileError(f"{self._weights_file} is not of encoder {self.spec.name}")
        self._set(values)

    def swap_out(self) -> None:
        """Give the memory back, after what has changed was written."""
        self.save()
        # How many dimensions a weight has decides whether it decays.
        self._set({name: value.new_empty((0,) * value.ndim) for name, value in self._named()})
        if self._optimizer is not None:
            self._optimizer.state.clear()

    def save(self) -> None:
        """
        Write what has changed.

        :raises NotFiniteError: if a weight is NaN or infinite
        """
        if not self._is_changed:
            return
        bad = first_not_finite(dict(self._named()))
        if bad is not None:
            raise NotFiniteError(f"weight {bad[0]} of encoder {self.spec.name} holds {bad[1]}")
        save_tensors(dict(self._named()), self._weights_file)
        moments = self._moments()
        if moments:
            save_tensors(moments, self._optimizer_file)
        self._is_changed = False

    def restore(self, folder: Path) -> None:
        """
        Forget what there is, and take the files of a folder.

        :raises DamagedFileError: if they aren't there
        """
        if not (folder / self._weights_file.name).is_file():
            raise DamagedFileError(f"checkpoint {folder} has no file {self._weights_file.name}")
        self._is_changed = False
        self.swap_out()
        for file in (self._weights_file, self._optimizer_file):
            file.unlink(missing_ok=True)
            if (folder / file.name).is_file():
                link_file(folder / file.name, file)

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        return ((name, tensor.data) for name, tensor in self._tensors.items())

    def _set(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors.items():
            tensor.data = values[name]

    def _moments(self) -> dict[str, Tensor]:
        if self._optimizer is None:
            return {}
        return {
            f"{index}.{key}": value
            for index, weight in enumerate(self.weights)
            for key, value in self._optimizer.state.get(weight, {}).items()
        }

    def _load_moments(self, optimizer: Optimizer) -> None:
        if optimizer.state or not self._optimizer_file.exists():
            return
        try:
            state = optimizer_state(optimizer, self.weights, load_file(self._optimizer_file))
        except (KeyError, ValueError) as error:
            raise DamagedFileError(f"{self._optimizer_file} can't be loaded: {error}") from None
        for index, values in state.items():
            for key, value in values.items():
                # AdamW counts its steps on the CPU.
                device = "cpu" if value.ndim == 0 else self.mean.device
                optimizer.state[self.weights[index]][key] = value.to(device)


def swapped_encoders(method: nn.Module) -> SwappedEncoders | None:
    """Those of a method, or None where it holds all its encoders in memory."""
    found = (module for module in method.modules() if isinstance(module, SwappedEncoders))
    return next(found, None)


class _Recomputed(torch.autograd.Function):
    """An encoder whose weights the graph doesn't hold."""

    @staticmethod
    def forward(
        ctx: Any, images_BCHW: Tensor, anchor: Tensor, encoder: SwappedEncoder, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(images_BCHW)
        # Where backward fails, torch keeps what it didn't come to until the next one.
        ctx.encoder, ctx.dtype = weakref.ref(encoder), dtype
        return encoder.run(images_BCHW, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None, None]:
        (images_BCHW,) = ctx.saved_tensors
        ctx.encoder().step(images_BCHW, ctx.dtype, grad_outputs[0])
        return None, None, None, None
