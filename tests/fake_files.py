"""Files as others write them, of random numbers: ONNX graphs, Keras' HDF5, wheels."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from hubrl.architectures import find_architecture
from hubrl.files import file_sha256
from hubrl.specs import EncoderSpec


def random_trunk(spec: EncoderSpec) -> nn.Module:
    """A trunk whose normalisation statistics are random, too."""
    torch.manual_seed(0)
    trunk = find_architecture(spec).build(spec).eval()
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.0),
                (module.bias, -0.1, 0.1),
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 2.0),
            ):
                nn.init.uniform_(tensor, low, high)
    return trunk


class GraphWriter:
    """An ONNX graph that grows by nodes, each with the output of the one before and tensors."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self._last = "image"

    def add(self, op: str, *tensors: Tensor, name: str | None = None, output: str = "") -> None:
        """A node; its tensors are nameless unless ``name`` names the first."""
        names = [f"onnx::{op}_{len(self._tensors) + i}" for i in range(len(tensors))]
        names[:1] = [name] if name and tensors else names[:1]
        for key, tensor in zip(names, tensors, strict=True):
            array = tensor.detach().contiguous().numpy()
            self._tensors.append(numpy_helper.from_array(array, key))
        output = output or f"output_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, [self._last, *names], [output]))
        self._last = output

    def content(self) -> bytes:
        graph = helper.make_graph(self._nodes, "graph", [], [], self._tensors)
        return bytes(helper.make_model(graph).SerializeToString())


def convolutions(trunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and normalisations in the order of their definition."""
    for name, module in trunk.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            yield name, module


def statistics(norm: nn.Module) -> list[Tensor]:
    """Weight, bias, mean and variance of a normalisation."""
    state = norm.state_dict()
    return [state[key] for key in ("weight", "bias", "running_mean", "running_var")]


def keras_file(trunk: nn.Module) -> bytes:
    """A Keras model with a net named net inside it, its layers named by numbers."""
    buffer = io.BytesIO()
    layers = [{"class_name": "InputLayer", "config": {"name": "input"}}]
    with h5py.File(buffer, "w") as file:
        weights = file.create_group("model_weights/net")
        for i, (_, module) in enumerate(convolutions(trunk)):
            group, kind = weights.create_group(f"layer{i}"), "BatchNormalization"
            if isinstance(module, nn.Conv2d):
                depthwise = module.groups > 1
                kind = "DepthwiseConv2D" if depthwise else "Conv2D"
                order = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
                group["kernel"] = module.weight.detach().permute(order).numpy()
            else:
                names = ("gamma", "beta", "moving_mean", "moving_variance")
                for name, tensor in zip(names, statistics(module), strict=True):
                    group[name] = tensor.numpy()
            layers.append({"class_name": kind, "config": {"name": f"layer{i}"}})
        net = {"class_name": "Functional", "config": {"name": "net", "layers": layers}}
        file.attrs["model_config"] = json.dumps({"config": {"layers": [net]}})
    return buffer.getvalue()


def write_wheel(folder: Path, package: str, file: str, content: bytes) -> str:
    """A wheel of version 1.0 that pip takes; the address that a card's provider has."""
    folder.mkdir(parents=True, exist_ok=True)
    name = package.replace("-", "_")
    wheel, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(file, content)
        archive.writestr(f"{name}/__init__.py", "raise RuntimeError('imported')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return f"{package}==1.0#sha256={file_sha256(wheel)}"
