"""Weight files of others, as tensors that our architectures name; nothing in them is executed."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hubrl.architectures import find_architecture
from hubrl.files import reason
from hubrl.specs import EncoderSpec

#: A file's content, and the card that it is for -> tensors as the card's architecture names them.
Conversion = Callable[[bytes, EncoderSpec], dict[str, Tensor]]

BATCH_NORM_EPS = 1e-5  # torch's
INSTALL_VISION = 'pip install "hubrl[vision]"'
N_BLOCKS = (3, 4, 6, 3)  # of a ResNet-50


def efficientnet_lite(content: bytes, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    EfficientNet-Lite of efficientnet_pytorch's layers, without its classifier.

    :raises ValueError: if it is no file of tensors, or they don't fit
    """
    tensors = read_torch(content, spec)
    return _in_order(spec, (t for key, t in tensors.items() if not key.startswith("_fc.")))


def keras_mobilenetv2(content: bytes, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    A MobileNetV2 inside a Keras model of the HDF5 format.

    :raises ValueError: if h5py is not installed, it is no such file, or the tensors don't fit
    """
    h5py = _imported("h5py", spec)
    try:
        with h5py.File(io.BytesIO(content)) as file:
            return _in_order(spec, list(_keras_tensors(file)))
    except (OSError, KeyError) as error:
        raise ValueError(f"encoder {spec.name!r}: no Keras model of HDF5 ({error})") from None


def onnx_lcnet(content: bytes, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    PP-LCNet of Paddle's export, without its classifier.

    :raises ValueError: if onnx is not installed, it is no ONNX graph, or the tensors don't fit
    """
    graph = _Graph(content, spec)
    tensors = []
    for node in graph.nodes:
        found = [graph.constants[name] for name in node.input[1:] if name in graph.constants]
        if node.op_type in ("Conv", "BatchNormalization"):
            tensors += found
        elif node.op_type == "Add" and found and found[0].dim() == 4:  # not the classifier's
            tensors.append(found[0].flatten())
    tensors += [torch.zeros(len(weight)) for weight in tensors[-1:]]  # timm's last bias
    return _in_order(spec, tensors)


def onnx_resnet50_thin(content: bytes, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    The half-width ResNet-50 of Caffe that a Keras port holds, turned from BGR to RGB.

    Its convolutions have biases, which go into the means of the normalisation behind them.

    :raises ValueError: if onnx is not installed, it is no ONNX graph, or the tensors don't fit
    """
    graph = _Graph(content, spec)
    layers = [graph.affine(node) for node in graph.nodes if node.op_type == "Conv"]
    tensors: dict[str, Tensor] = {}
    for (conv, norm), (weight, affine) in zip(_resnet_layers(), layers, strict=False):
        bias, mean, scale, shift = affine
        tensors[f"{conv}.weight"] = weight
        tensors[f"{norm}.weight"] = scale
        tensors[f"{norm}.bias"] = shift
        tensors[f"{norm}.running_mean"] = mean - bias
        tensors[f"{norm}.running_var"] = torch.full_like(mean, 1.0 - BATCH_NORM_EPS)
    if "conv1.weight" in tensors:
        tensors["conv1.weight"] = tensors["conv1.weight"].flip(1)
    return _by_name(spec, tensors)


def onnx_dinov2(content: bytes, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    The DINOv2 transformer inside a net for saliency, its layers named as by Hugging Face.

    :raises ValueError: if onnx is not installed, it is no ONNX graph, or the tensors don't fit
    """
    graph = _Graph(content, spec)
    found = {key.removeprefix("backbone."): t for key, t in graph.constants.items()}
    for node in graph.nodes:
        if node.op_type == "MatMul" and node.input[1] in graph.constants:
            layer = node.output[0].removeprefix("/backbone/").removesuffix("/MatMul_output_0")
            found[layer.replace("/", ".") + ".weight"] = graph.constants[node.input[1]].T
    tensors = {
        name: torch.cat([found[part] for part in parts])
        for name, parts in _dinov2_layers()
        if all(part in found for part in parts)
    }
    # Nameless: the embedding of the class token's position, and those of the patches'.
    tables = [t for key, t in found.items() if key.startswith("onnx::") and t.dim() == 3]
    if tables:
        tensors["pos_embed"] = torch.cat(sorted(tables, key=lambda table: table.shape[1]), dim=1)
    return _by_name(spec, tensors)


def moco(content: bytes, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    The query encoder of a MoCo checkpoint, without its projection head.

    :raises ValueError: if it is no such file of tensors, or they don't fit
    """
    state = read_torch(content, spec).get("state_dict", {})
    return backbone(state, spec, "module.encoder_q.", BATCH_NORM_EPS)


def backbone(
    state: dict[str, Tensor], spec: EncoderSpec, prefix: str, eps: float
) -> dict[str, Tensor]:
    """
    The part of a larger net that the card's architecture describes.

    :param state: the net's tensors
    :param prefix: of the names of the part's tensors
    :param eps: of its normalisation; where it isn't torch's 1e-5, the weights make up for it
    :raises ValueError: if the net has no such part
    """
    tensors = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    if eps != BATCH_NORM_EPS:
        for key in [key for key in tensors if key.endswith(".running_var")]:
            variance, weight = tensors[key], key.replace("running_var", "weight")
            ratio = (variance + BATCH_NORM_EPS) / (variance + eps)
            tensors[weight] = tensors[weight] * ratio.sqrt()
    return _by_name(spec, tensors)


def read_torch(content: bytes, spec: EncoderSpec) -> dict[str, Any]:
    """
    What torch's reader of tensors alone makes of a file.

    :raises ValueError: if it holds anything else
    """
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle makes of the restricted reader
        raise ValueError(f"encoder {spec.name!r}: no file of tensors ({reason(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"encoder {spec.name!r}: no file of tensors by name")
    return dict(found)


def _in_order(spec: EncoderSpec, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the trunk's, which follow each other in the same order."""
    tensors = [tensor for tensor in tensors if tensor.dim() > 0]  # counters of batches
    names = _trunk_shapes(spec)
    if len(names) != len(tensors):
        raise ValueError(
            f"encoder {spec.name!r}: the file has {len(tensors)} tensors, but {spec.architecture} "
            f"has {len(names)}: it is another net"
        )
    return _by_name(spec, dict(zip(names, tensors, strict=True)))


def _by_name(spec: EncoderSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that the trunk names, in float32."""
    shapes = _trunk_shapes(spec)
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else "none"
        if found != shape and name != "pos_embed":  # it is resampled when it is loaded
            raise ValueError(
                f"encoder {spec.name!r}: {spec.architecture} needs a tensor {name} {shape}, the "
                f"file has {found}: it is another net"
            )
    return {name: tensors[name].float().contiguous().clone() for name in shapes}


def _trunk_shapes(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    """Of all its tensors but the counters of batches, which nothing reads."""
    with torch.device("meta"):
        state = find_architecture(spec).build(spec).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items() if tensor.dim() > 0}


def _keras_tensors(file: Any) -> Iterator[Tensor]:
    """Layer by layer: kernels as torch has them, and what a normalisation has in torch's order."""
    layers = json.loads(file.attrs["model_config"])["config"]["layers"]
    net = next(layer for layer in layers if layer["class_name"] == "Functional")
    weights = file["model_weights"][net["config"]["name"]]
    orders = {"Conv2D": (3, 2, 0, 1), "DepthwiseConv2D": (2, 3, 0, 1)}
    for layer in net["config"]["layers"]:
        kind, group = layer["class_name"], weights.get(layer["config"]["name"])
        if kind in orders:
            yield torch.from_numpy(group["kernel"][()]).permute(orders[kind])
        elif kind == "BatchNormalization":
            for name in ("gamma", "beta", "moving_mean", "moving_variance"):
                yield torch.from_numpy(group[name][()])


class _Graph:
    """An ONNX graph's nodes in their order, and its tensors by all names that they have."""

    def __init__(self, content: bytes, spec: EncoderSpec) -> None:
        onnx = _imported("onnx", spec)
        try:
            graph = onnx.load_model_from_string(content).graph
        except Exception as error:  # protobuf's own
            raise ValueError(f"encoder {spec.name!r}: no ONNX graph ({error})") from None
        to_array = onnx.numpy_helper.to_array
        self.nodes: list[Any] = list(graph.node)
        self.constants = {t.name: torch.from_numpy(to_array(t).copy()) for t in graph.initializer}
        self._readers: dict[str, Any] = {}
        for node in self.nodes:
            if node.op_type == "Identity" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
            for name in node.input:
                self._readers.setdefault(name, node)

    def affine(self, conv: Any) -> tuple[Tensor, list[Tensor]]:
        """A convolution's weight, and what follows it: + bias, - mean, * scale, + shift."""
        found: list[Tensor] = []
        name = conv.output[0]
        while len(found) < 4 and name in self._readers:
            node = self._readers[name]
            found += [self.constants[key].flatten() for key in node.input if key in self.constants]
            name = node.output[0]
        return self.constants[conv.input[1]], found


def _dinov2_layers() -> Iterator[tuple[str, list[str]]]:
    """timm's names, and those of the tensors that follow each other in it."""
    yield "cls_token", ["embeddings.cls_token"]
    for part in ("weight", "bias"):
        yield f"patch_embed.proj.{part}", [f"embeddings.patch_embeddings.projection.{part}"]
        yield f"norm.{part}", [f"layernorm.{part}"]
    for i in range(12):
        new, old = f"blocks.{i}", f"encoder.layer.{i}"
        for part in ("weight", "bias"):
            qkv = [f"{old}.attention.attention.{x}.{part}" for x in ("query", "key", "value")]
            yield f"{new}.attn.qkv.{part}", qkv
            yield f"{new}.attn.proj.{part}", [f"{old}.attention.output.dense.{part}"]
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                yield f"{new}.{layer}.{part}", [f"{old}.{layer}.{part}"]
        for k in (1, 2):
            yield f"{new}.ls{k}.gamma", [f"{old}.layer_scale{k}.lambda1"]


def _resnet_layers() -> Iterator[tuple[str, str]]:
    """Names of convolutions and their normalisations, in the order in which Keras runs them."""
    yield "conv1", "bn1"
    for stage, n_blocks in enumerate(N_BLOCKS, start=1):
        for block in range(n_blocks):
            name = f"layer{stage}.{block}"
            yield f"{name}.conv1", f"{name}.bn1"
            yield f"{name}.conv2", f"{name}.bn2"
            if block == 0:
                yield f"{name}.downsample.0", f"{name}.downsample.1"
            yield f"{name}.conv3", f"{name}.bn3"


def _imported(module: str, spec: EncoderSpec) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"encoder {spec.name!r}: its file needs {module}: {INSTALL_VISION}"
        ) from None
