"""Data parallel training under ``torchrun``: gradients and means over all processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from hubrl.generators import RunningMean

#: Numbers and text, in lists and dicts.
Json = TypeVar("Json")


def join() -> None:
    """
    Join the processes that ``torchrun`` started, each with a GPU of its own where there are any.

    :raises ValueError: if there are GPUs, but fewer than processes
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    n_gpus = torch.cuda.device_count()
    if n_gpus == 0:
        distributed.init_process_group("gloo")
        return
    if int(os.environ["LOCAL_WORLD_SIZE"]) > n_gpus:
        raise ValueError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, but there are {n_gpus} "
            f"GPUs: give --nproc-per-node {n_gpus}, or CUDA_VISIBLE_DEVICES= for none"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl")


def n_processes() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 writes the files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def wait() -> None:
    """Until all processes are here."""
    if n_processes() > 1:
        distributed.barrier()


def from_leader(make: Callable[[], str]) -> str:
    """
    What the first process makes, in all processes.

    :param make: called in the first one
    :raises ValueError: if it raises a ValueError or an OSError
    """
    if n_processes() == 1:
        return make()
    error = text = ""
    if rank() == 0:
        try:
            text = make()
        except (ValueError, OSError) as caught:
            error = str(caught)
    error, text = _shared_text(error), _shared_text(text)
    if error:
        raise ValueError(error)
    return text


def largest(number: int) -> int:
    """Of the numbers of all processes."""
    if n_processes() == 1:
        return number
    numbers = torch.tensor(number)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return int(numbers)


def share_weights(module: nn.Module) -> None:
    """All processes begin with the weights and buffers of the first."""
    if n_processes() > 1:
        for tensor in module.state_dict().values():
            if isinstance(tensor, Tensor):
                distributed.broadcast(tensor, 0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """
    Mean of the gradients over all processes.

    An encoder that no image of a process activated has no gradient there, and counts as 0; one that
    none of any process did keeps none, so that the optimizer leaves it alone.
    """
    if n_processes() == 1:
        return
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    has_gradient = torch.tensor([float(parameter.grad is not None) for parameter in learning])
    for parameter, share in zip(learning, _mean(has_gradient).tolist(), strict=True):
        if share > 0:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)
            parameter.grad /= n_processes()


def agreed(value: Json) -> Json:
    """
    The first process' of a value that each has computed, so that all decide alike by it: last
    digits may differ between machines.
    """
    found: Json = json.loads(from_leader(lambda: json.dumps(value)))
    return found


def average_buffers(module: nn.Module) -> None:
    """
    Mean over all processes of what they have noted of their shares.

    Of rows that running means haven't taken up yet there is the sum, in all processes.
    """
    if n_processes() == 1:
        return
    pending = {id(tensor) for tensor in _pending(module)}
    for buffer in module.buffers():
        if buffer.is_floating_point():
            mean = _mean(buffer)
            buffer.copy_(mean * n_processes() if id(buffer) in pending else mean)


def leave_pending_to_leader(module: nn.Module) -> None:
    """After a sum over processes, or the next would count it once for each of them."""
    if rank() > 0:
        for tensor in _pending(module):
            tensor.zero_()


def _pending(module: nn.Module) -> list[Tensor]:
    means = [each for each in module.modules() if isinstance(each, RunningMean)]
    return [tensor for mean in means for tensor in (mean.pending_sum, mean.n_pending)]


def mean_over_processes(tensor: Tensor) -> Tensor:
    """
    Mean of a tensor over all processes, with its gradient.

    After ``average_gradients`` a loss of it has the gradient that one process has for all images.
    """
    if n_processes() == 1:
        return tensor
    mean: Tensor = _Mean.apply(tensor)
    return mean


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _mean(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return _mean(grad_outputs[0])


def _shared_text(text: str) -> str:
    """That of the first process."""
    content = text.encode()
    length = torch.tensor(len(content))
    distributed.broadcast(length, 0)
    if rank() > 0:
        content = bytes(int(length))
    characters = torch.tensor(list(content), dtype=torch.uint8)
    distributed.broadcast(characters, 0)
    return bytes(characters.tolist()).decode()


def _mean(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    distributed.all_reduce(tensor)
    return tensor / n_processes()
