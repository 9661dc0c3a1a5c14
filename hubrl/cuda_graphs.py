"""CUDA graphs: a small network's work on a GPU, launched as a whole instead of kernel by kernel."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., tuple[Tensor, ...]]


class Recorded:
    """
    A function of tensors on a GPU, recorded for each shape of them and replayed from then on.

    With gradients enabled its backward pass is recorded, too. The first output must need gradients
    then, and be what the later loss is computed from. A recording reads weights and buffers where
    they lie, so it sees each change that is made in place. Where a weight has moved recording
    begins anew; ``clear`` it where buffers have.

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
        if _is_observed():
            return self._function(module, *inputs)
        self._follow_weights()
        has_gradients = torch.is_grad_enabled()
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        learning = tuple(weight.requires_grad for weight in self._weights)
        key = (has_gradients, module.training, shapes, learning)
        if key in self._recordings:
            return self._recordings[key](module, *inputs)
        if key not in self._seen or len(self._recordings) == self.MAX_RECORDINGS:
            self._seen.add(key)  # many shapes come once
            return self._function(module, *inputs)
        record = self._record_learning if has_gradients else self._record
        with torch.cuda.device_of(inputs[0]):
            self._recordings[key] = record(module, inputs)
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

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Function:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.inference_mode(False), torch.no_grad():
            fixed = [tensor.clone() for tensor in inputs]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries set themselves up in the first runs
                    self._function(module, *fixed)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, stream=side):
                outputs = self._function(module, *fixed)

        def replay(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
            for place, tensor in zip(fixed, inputs, strict=True):
                place.copy_(tensor)
            graph.replay()
            return tuple(output.clone() for output in outputs)

        return replay

    def _record_learning(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Function:
        before = [(buffer, buffer.clone()) for buffer in module.buffers()]
        recorded = _Call(module, self._function)
        fixed = tuple(tensor.clone() for tensor in inputs)
        # Weights' gradients are summed on the stream of the recording, and waited for.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        try:
            torch.cuda.make_graphed_callables(recorded, fixed, allow_unused_input=True)
        finally:
            for buffer, value in before:  # running means have followed each of the first runs
                buffer.copy_(value)
        del recorded.module  # or this module would keep itself
        # Weak: a forward pass that is dropped unused ends its lease, too.
        lease: weakref.ref[_Lease] | None = None

        def replay(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
            nonlocal lease
            last = lease() if lease is not None else None
            if last is not None and not last.is_over:
                # A backward pass is still to come, and needs what the recording holds.
                return self._function(module, *inputs)
            first, *others = recorded(*inputs)
            new = _Lease(self._weights)
            lease = weakref.ref(new)
            return (_EndLease.apply(first, new), *others)

        return replay


def _is_observed() -> bool:
    """By a tracer or another recording, which would see a replay's copies alone."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
    )


class _Call(nn.Module):
    def __init__(self, module: nn.Module, function: Function) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._function(self.module, *inputs)


class _Lease:
    """Of a recording's memory, from a forward pass to its backward pass."""

    def __init__(self, weights: tuple[Tensor, ...]) -> None:
        self.weights = weights
        self.is_over = False


class _EndLease(torch.autograd.Function):
    """Comes after the recording, so that its backward pass comes just before the recording's."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, lease: _Lease) -> Tensor:
        ctx.lease = lease
        return first.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        if ctx.lease.is_over:
            raise RuntimeError(
                "a recorded pass was already differentiated, and a GPU holds what it needs once: "
                "sum the losses and call backward() once"
            )
        ctx.lease.is_over = True
        for weight in ctx.lease.weights:
            if weight.grad is not None:  # perhaps the recording's memory, which is written now
                weight.grad = weight.grad.clone()
        return grad_outputs[0], None
