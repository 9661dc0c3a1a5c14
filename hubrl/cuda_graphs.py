"""CUDA graphs: a small network's work on a GPU, launched as a whole instead of kernel by kernel."""

from __future__ import annotations

import contextlib
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Function = Callable[..., tuple[Tensor, ...]]
Work = Callable[[], tuple[Tensor, ...]]


class Recorded:
    """
    A function of tensors on a GPU, recorded for each shape of them and replayed from then on.

    With gradients enabled its backward pass is recorded, too. The first output must need gradients
    then, and be what the later loss is computed from. A recording reads weights and buffers where
    they lie, so it sees each change that is made in place. Where a weight has moved recording
    begins anew; ``clear`` it where buffers have. What can't be recorded runs as it is: inputs that
    need gradients, under autocast, while something traces, and, with a warning, what fails.

    :param module: has the weights and buffers that the function uses
    :param function: of the module and of tensors, to tensors; their sizes, its branches and what it
        copies from or to the host must not depend on numbers on the GPU
    """

    MAX_RECORDINGS = 8  # each has its own memory

    def __init__(self, module: nn.Module, function: Function) -> None:
        # The module itself is given with each call: a cycle would keep GPU memory for long.
        self._function = function
        self._weights = tuple(module.parameters())  # each call asks, and a walk takes long
        self._places: tuple[int, ...] = ()
        self._seen: set[object] = set()
        self._recordings: dict[object, Function] = {}

    def __call__(self, module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        """
        The function's outputs; with gradients all but the first lie in the recording's memory.

        :param module: the same one
        """
        if _must_run(inputs):
            return self._function(module, *inputs)
        self._follow_weights()
        learning = tuple(weight.requires_grad for weight in self._weights)
        has_gradients = torch.is_grad_enabled() and any(learning)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        key = (has_gradients, module.training, shapes, learning)
        if key in self._recordings:
            return self._recordings[key](module, *inputs)
        if key not in self._seen or len(self._recordings) == self.MAX_RECORDINGS:
            self._seen.add(key)  # many shapes come once
            return self._function(module, *inputs)
        self._recordings[key] = self._record(_Lesson if has_gradients else _Look, module, inputs)
        return self._recordings[key](module, *inputs)

    def clear(self) -> None:
        """Forget all recordings."""
        self._recordings.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Copies record for themselves."""
        return {**self.__dict__, "_recordings": {}}

    def _follow_weights(self) -> None:
        places = tuple(weight.data_ptr() for weight in self._weights)
        if places != self._places:
            self._places = places
            self.clear()

    def _record(
        self, kind: type[_Look | _Lesson], module: nn.Module, inputs: tuple[Tensor, ...]
    ) -> Function:
        with torch.cuda.device_of(inputs[0]), _undisturbed(module):
            try:
                return kind(self._function, module, inputs)
            except RuntimeError as error:  # no memory left, or an operation that no graph takes
                warnings.warn(
                    f"no CUDA graph for inputs of {tuple(inputs[0].shape)}, which will run kernel "
                    f"by kernel: {error}",
                    stacklevel=4,
                )
                return self._function


class _Look:
    """A function without gradients, recorded for the shapes of some inputs."""

    def __init__(self, function: Function, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            own = self._inputs = tuple(tensor.clone() for tensor in inputs)

            def work() -> tuple[Tensor, ...]:
                return function(module, *own)

            self._graph = _Graph(work, _warmed_up(work))

    def __call__(self, module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return tuple(output.clone() for output in self._graph.outputs)


class _Lesson:
    """
    A function and its backward pass, recorded for the shapes of some inputs.

    Torch's ``make_graphed_callables`` does not do here. It records the weights themselves, whose
    gradient accumulators spoil a recording if an earlier pass is still referred to, as SB3's loops
    refer to their last loss; its gradients lie where the next pass writes; and what it makes is
    freed by the cyclic garbage collector alone.
    """

    def __init__(self, function: Function, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._function = function
        self._weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        # In the same memory, but leaves of their own.
        aliases = {
            f"module.{name}": weight.detach().requires_grad_(weight.requires_grad)
            for name, weight in module.named_parameters()
        }
        learning = [alias for alias in aliases.values() if alias.requires_grad]
        call, own, last = _Call(module, function), self.inputs, _Last()

        def forward() -> tuple[Tensor, ...]:
            last.outputs = torch.func.functional_call(call, aliases, own)
            return last.outputs

        def backward() -> tuple[Tensor, ...]:
            outputs = [output for output in last.outputs if output.requires_grad]
            found = torch.autograd.grad(outputs, learning, last.gradients, allow_unused=True)
            last.is_used = [gradient is not None for gradient in found]
            return (torch.cat([gradient.flatten() for gradient in found if gradient is not None]),)

        def both() -> tuple[Tensor, ...]:
            last.gradients = [torch.zeros_like(o) for o in forward() if o.requires_grad]
            return backward()

        stream = _warmed_up(both)
        self.forward = _Graph(forward, stream)
        self.learns = [output.requires_grad for output in last.outputs]
        last.gradients = [torch.zeros_like(o) for o in last.outputs if o.requires_grad]
        self.output_gradients = last.gradients
        self.backward = _Graph(backward, stream)
        self._is_used = last.is_used
        # Weak: a forward pass that is dropped unused ends its lease, too.
        self._lease: weakref.ref[_Lease] | None = None

    def __call__(self, module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        last = self._lease() if self._lease is not None else None
        if last is not None and not last.is_over:
            # A backward pass is still to come, and needs what the recording holds.
            return self._function(module, *inputs)
        lease = _Lease()
        self._lease = weakref.ref(lease)
        outputs: tuple[Tensor, ...] = _Pass.apply(self, lease, *inputs, *self._weights)
        return outputs

    def weight_gradients(self) -> Iterator[Tensor | None]:
        """Those that the backward pass has just left, in memory of their own."""
        used = [weight for weight, use in zip(self._weights, self._is_used, strict=True) if use]
        (flat,) = self.backward.outputs
        parts = iter(flat.clone().split([weight.numel() for weight in used]))
        for weight, use in zip(self._weights, self._is_used, strict=True):
            yield next(parts).view_as(weight) if use else None


class _Graph:
    """
    Work on a GPU, recorded on a stream and launched at once by ``replay``.

    Each has memory of its own: a forward pass doesn't write where a backward pass left gradients.
    """

    def __init__(self, work: Work, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        # The outer one, since a recording that fails leaves its own stream current.
        with torch.cuda.stream(before), torch.cuda.graph(self._graph, stream=stream):
            self.outputs = tuple(output.detach() for output in work())

    def replay(self) -> None:
        """Run on the current stream; the outputs change in place."""
        self._graph.replay()


class _Last:
    """What the passes of a recording hand on to each other while it is made."""

    outputs: tuple[Tensor, ...]
    gradients: list[Tensor]
    is_used: list[bool]


class _Call(nn.Module):
    def __init__(self, module: nn.Module, function: Function) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._function(self.module, *inputs)


class _Lease:
    """Of a recording's memory, from a forward pass to its backward pass."""

    is_over = False


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lesson: _Lesson, lease: _Lease, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.lesson, ctx.lease, ctx.n_tensors = lesson, lease, len(tensors)
        for place, tensor in zip(lesson.inputs, tensors, strict=False):  # weights come after
            place.copy_(tensor)
        lesson.forward.replay()
        first, *others = lesson.forward.outputs
        outputs = first.clone(), *(output.detach() for output in others)
        ctx.mark_non_differentiable(*itertools.compress(outputs, (not it for it in lesson.learns)))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        lesson = ctx.lesson
        if ctx.lease.is_over:
            raise RuntimeError(
                "a recorded pass was already differentiated, and a GPU holds what it needs once: "
                "sum the losses and call backward() once"
            )
        ctx.lease.is_over = True
        known = itertools.compress(gradients, lesson.learns)
        for place, gradient in zip(lesson.output_gradients, known, strict=True):
            place.copy_(gradient)
        lesson.backward.replay()
        found = tuple(lesson.weight_gradients())
        return *[None] * (2 + ctx.n_tensors - len(found)), *found


def _must_run(inputs: tuple[Tensor, ...]) -> bool:
    """Tracers and other recordings would see a replay's copies alone, and a replay no gradients."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
        or torch.is_autocast_enabled(inputs[0].device.type)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))
    )


def _warmed_up(work: Work) -> torch.cuda.Stream:
    """The stream to record on; libraries set themselves up in the first runs."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    return stream


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Buffers stay as they are, and no old graph is freed inside, which would spoil a recording."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        with torch.no_grad():
            for buffer, version, value in before:  # running means have followed each of the runs
                if buffer._version != version:  # others may be what a pass before needs
                    buffer.copy_(value)
