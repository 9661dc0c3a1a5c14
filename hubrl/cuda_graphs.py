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
    A function of tensors on a GPU, recorded once for each shape of them and replayed from then on.

    With gradients enabled its backward pass is recorded, too. The first output must need gradients
    then, and be what the later loss is computed from. A recording reads weights and buffers where
    they lie, so it sees each change that is made in place; if the first weight has moved, all have,
    and recording begins anew.

    :param module: has the weights and buffers that the function uses
    :param function: takes and returns tensors; their sizes, its branches and what it copies to the
        host must not depend on numbers on the GPU
    """

    MAX_RECORDINGS = 8  # each has its own memory

    def __init__(self, module: nn.Module, function: Function) -> None:
        self._module = module
        self._function = function
        self._weights = tuple(module.parameters())  # each call asks, and a walk takes long
        self._place = 0
        self._recordings: dict[object, Function] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs; with gradients all but the first last until the next call."""
        place = self._weights[0].data_ptr()
        if place != self._place:
            self._place = place
            self._recordings.clear()
        has_gradients = torch.is_grad_enabled()
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        learning = tuple(weight.requires_grad for weight in self._weights)
        key = (has_gradients, self._module.training, shapes, learning)
        if key not in self._recordings:
            if len(self._recordings) == self.MAX_RECORDINGS:
                return self._function(*inputs)
            record = self._record_learning if has_gradients else self._record
            with torch.cuda.device_of(inputs[0]):
                self._recordings[key] = record(inputs)
        return self._recordings[key](*inputs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies record for themselves."""
        return {**self.__dict__, "_recordings": {}}

    def _record(self, inputs: tuple[Tensor, ...]) -> Function:
        fixed = [tensor.clone() for tensor in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries set themselves up in the first runs
                self._function(*fixed)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._function(*fixed)

        def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
            for place, tensor in zip(fixed, inputs, strict=True):
                place.copy_(tensor)
            graph.replay()
            return tuple(output.clone() for output in outputs)

        return replay

    def _record_learning(self, inputs: tuple[Tensor, ...]) -> Function:
        before = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        recorded = _Call(self._module, self._function)
        fixed = tuple(tensor.clone() for tensor in inputs)
        # Weights' gradients are summed on the stream of the recording, and waited for.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        torch.cuda.make_graphed_callables(recorded, fixed, allow_unused_input=True)
        for buffer, value in before:  # running means have followed each of the first runs
            buffer.copy_(value)
        lease: weakref.ref[_Lease] | None = None

        def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
            nonlocal lease
            last = lease() if lease is not None else None
            if last is not None and not last.is_over:
                # A backward pass is still to come, and needs what the recording holds.
                return self._function(*inputs)
            first, *others = recorded(*inputs)
            new = _Lease()
            lease = weakref.ref(new)
            return (_EndLease.apply(first, new), *others)

        return replay


class _Call(nn.Module):
    def __init__(self, module: nn.Module, function: Function) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._function(*inputs)


class _Lease:
    """Of a recording's memory, from a forward pass until its backward pass or its end unused."""

    is_over = False


class _EndLease(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, lease: _Lease) -> Tensor:
        ctx.lease = lease
        return first.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        ctx.lease.is_over = True
        return grad_outputs[0], None
