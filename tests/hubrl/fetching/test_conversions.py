"""Conversions: nets of random numbers, written as packages hold them, give their features again."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from fake_files import GraphWriter, convolutions, keras_file, random_trunk, statistics
from torch import Tensor, nn
from torchvision.models import get_model, get_weight, resnet50

from hubrl.encoders import Encoder, encoder_of
from hubrl.fetching import conversions
from hubrl.fetching.libraries import BACKBONES
from hubrl.specs import EncoderSpec


def card(architecture: str, size: int = 32, features_dim: int = 1280) -> EncoderSpec:
    return EncoderSpec(
        name="net",
        architecture=architecture,
        features_dim=features_dim,
        image_size=(size, size),
        channels=3,
        frames="last",
        license="MIT",
        source="random numbers",
    )


LITE = card("timm:tf_efficientnet_lite0")
KERAS = card("packaged:mobilenetv2_keras")
LCNET = card("timm:lcnet_100")
THIN = card("packaged:resnet50_thin", features_dim=1024)
DINO = card("timm:vit_small_patch14_dinov2", 42, 384)
RESNET = card("torchvision:resnet50", features_dim=2048)


@torch.no_grad()
def assert_same_features(encoder: Encoder, net: nn.Module, images: Tensor | None = None) -> None:
    size = encoder.spec.image_size
    images_BCHW = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    ours_BD = encoder(images_BCHW)
    # In the layout that an encoder of a library has on a CPU: another one rounds otherwise.
    seen_BCHW = images_BCHW if images is None else images
    theirs_BD = net(seen_BCHW.contiguous(memory_format=torch.channels_last))
    scale = theirs_BD.abs().max()
    assert 0 < scale < torch.inf
    torch.testing.assert_close(ours_BD, theirs_BD, rtol=0, atol=1e-5 * float(scale))


def torch_file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_efficientnet_lite_by_the_order_of_its_layers() -> None:
    net = random_trunk(LITE)
    tensors = {f"_layer{i}": tensor for i, tensor in enumerate(net.state_dict().values())}
    tensors |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    found = conversions.efficientnet_lite(torch_file(tensors), LITE)
    assert_same_features(encoder_of(LITE, found), net)


def test_keras_kernels_are_turned() -> None:
    net = random_trunk(KERAS)
    found = conversions.keras_mobilenetv2(keras_file(net), KERAS)
    assert_same_features(encoder_of(KERAS, found), net)


def test_lcnet_without_its_classifier() -> None:
    net = random_trunk(LCNET)
    graph = GraphWriter()
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            graph.add("BatchNormalization", *statistics(module))
        elif isinstance(module, nn.Conv2d):
            graph.add("Conv", module.weight)
            if name == "conv_head":
                nn.init.zeros_(module.bias)  # Paddle's has none
            elif module.bias is not None:
                graph.add("Add", module.bias.view(1, -1, 1, 1))
    graph.add("MatMul", torch.zeros(1280, 4))
    graph.add("Add", torch.zeros(4))
    assert_same_features(encoder_of(LCNET, conversions.onnx_lcnet(graph.content(), LCNET)), net)


def test_thin_resnet_sees_red_first_and_has_no_biases() -> None:
    net = random_trunk(THIN)
    layers, graph = dict(convolutions(net)), GraphWriter()
    for conv, norm in conversions._resnet_layers():
        weight, bias, mean, variance = statistics(layers[norm])
        constant = torch.randn(len(bias))
        graph.add("Conv", layers[conv].weight)
        graph.add("Transpose")
        graph.add("Add", constant.view(1, 1, 1, -1))
        graph.add("Sub", (mean + constant).view(1, 1, 1, -1))
        graph.add("Mul", (weight / (variance + 1e-5).sqrt()).view(1, 1, 1, -1))
        graph.add("Add", bias.view(1, 1, 1, -1))
    encoder = encoder_of(THIN, conversions.onnx_resnet50_thin(graph.content(), THIN))
    images_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert_same_features(encoder, net, images=images_BCHW.flip(1))


def test_dinov2_with_positions_of_another_size() -> None:
    net = random_trunk(DINO)
    state, graph = net.state_dict(), GraphWriter()
    for name, parts in conversions._dinov2_layers():
        for part, tensor in zip(parts, state[name].chunk(len(parts)), strict=True):
            layer = part.removesuffix(".weight").replace(".", "/")
            if part.endswith(".weight") and tensor.dim() == 2:
                graph.add("MatMul", tensor.T, output=f"/backbone/{layer}/MatMul_output_0")
            else:
                graph.add("Add", tensor, name=f"backbone.{part}")
    # A slope over a grid of 6 by 6 patches, of which 3 by 3 see the middles of 2 by 2.
    slope_HW = torch.arange(6.0).view(6, 1) + 10 * torch.arange(6.0)
    graph.add("Add", slope_HW.view(1, 36, 1).expand(1, 36, 384) / 100)
    graph.add("Add", state["pos_embed"][:, :1])
    found = conversions.onnx_dinov2(graph.content(), DINO)
    assert found["pos_embed"].shape == (1, 37, 384)
    encoder = encoder_of(DINO, found)
    grid_HW = encoder.trunk.get_parameter("pos_embed")[0, 1:, 0].view(3, 3) * 100
    middles = torch.tensor([0.5, 2.5, 4.5])  # bicubic interpolation is exact on a slope inside
    assert grid_HW[1, 1].item() == pytest.approx(2.5 + 25, abs=1e-4)
    torch.testing.assert_close(grid_HW, middles.view(3, 1) + 10 * middles, rtol=0, atol=1.5)
    net.get_parameter("pos_embed").data[:, 1:] = encoder.trunk.get_parameter("pos_embed")[:, 1:]
    assert_same_features(encoder, net)


@pytest.fixture(scope="module")
def resnet_state() -> dict[str, Tensor]:
    """Of random numbers; its smallest variances are as small as the epsilon."""
    net = random_trunk(RESNET)
    state = net.state_dict()
    for key in state:
        if key.endswith("running_var"):
            state[key].clamp_(max=1.0)[0] = 2e-5
    return dict(state)


NETS = {
    "ResNet50": "resnet50",
    "MaskRCNN": "maskrcnn_resnet50_fpn",
    "KeypointRCNN": "keypointrcnn_resnet50_fpn",
    "DeepLabV3": "deeplabv3_resnet50",
}


@pytest.mark.parametrize("weights", BACKBONES)
def test_backbones_are_where_torchvision_has_them(weights: str) -> None:
    entry = get_weight(weights)
    with torch.device("meta"):
        name = NETS[weights.partition("_")[0]]
        own = {} if name == "resnet50" else {"weights_backbone": None}
        net = get_model(name, weights=None, **own)
        shapes = {key: tensor.shape for key, tensor in net.state_dict().items()}
        wanted = resnet50().state_dict()
    prefix = BACKBONES[weights].prefix
    assert entry.url.endswith(".pth")
    assert all(shapes[prefix + key] == wanted[key].shape for key in wanted if "fc." not in key)


@pytest.mark.parametrize("weights", [name for name in BACKBONES if "COCO" in name][::2])
def test_backbones_of_larger_nets(weights: str, resnet_state: dict[str, Tensor]) -> None:
    prefix, eps = BACKBONES[weights]
    state = {prefix + key: tensor for key, tensor in resnet_state.items()}
    state |= {"rpn.head.weight": torch.zeros(1), "fc.weight": torch.zeros(1000, 2048)}
    encoder = encoder_of(RESNET, conversions.backbone(state, RESNET, prefix, eps))
    theirs = resnet50(norm_layer=lambda n: nn.BatchNorm2d(n, eps=eps)).eval()
    theirs.fc = nn.Identity()  # type: ignore[assignment]
    theirs.load_state_dict(resnet_state)
    assert_same_features(encoder, theirs)


def test_the_query_encoder_of_moco(resnet_state: dict[str, Tensor]) -> None:
    state = {f"module.encoder_q.{key}": tensor for key, tensor in resnet_state.items()}
    state |= {f"module.encoder_k.{key}": tensor * 0 for key, tensor in resnet_state.items()}
    state["module.encoder_q.fc.0.weight"] = torch.zeros(2048, 2048)
    content = torch_file({"epoch": 800, "arch": "resnet50", "state_dict": state})
    found = conversions.moco(content, RESNET)
    assert all(torch.equal(found[key], resnet_state[key]) for key in found)
    assert len(found) == 265


class Stranger:
    """What a pickle may hold, but no file of tensors."""


def test_files_that_are_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    one = GraphWriter()
    one.add("Conv", torch.zeros(1, 3, 1, 1))
    cases: list[tuple[Callable[[bytes, EncoderSpec], object], bytes, EncoderSpec, str]] = [
        (
            conversions.efficientnet_lite,
            pickle.dumps(Stranger()),
            LITE,
            "'net': no file of tensors",
        ),
        (
            conversions.efficientnet_lite,
            torch_file({"a": torch.ones(1)}),
            LITE,
            "has 1 tensors, bu",
        ),
        (conversions.keras_mobilenetv2, b"HDF", KERAS, "'net': no Keras model of HDF5"),
        (conversions.onnx_lcnet, b"ONNX", LCNET, "'net': no ONNX graph"),
        (
            conversions.onnx_lcnet,
            one.content(),
            LCNET,
            "file has 2 tensors, but timm:lcnet_100 has",
        ),
        (conversions.onnx_dinov2, one.content(), DINO, "needs a tensor cls_token .* has none"),
        (conversions.moco, torch_file({}), RESNET, r"needs a tensor conv1.weight \(64, 3, 7, 7\)"),
    ]
    for convert, content, spec, message in cases:
        with pytest.raises(ValueError, match=message):
            convert(content, spec)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"'net': its file needs h5py: pip install \"hubrl\[vis"):
        conversions.keras_mobilenetv2(b"", KERAS)
