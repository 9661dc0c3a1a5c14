"""Models of timm and torchvision as encoders: whole libraries, their features, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import timm
import torch
import torchvision
from small_hubs import library_spec
from torch import Tensor, nn

from hubrl.architectures import NatureCNN, nature_features
from hubrl.encoders import Encoder, encoder_of, with_features_dim

CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
#: One model of every kind that is small enough.
SAMPLE = (
    "convnext_atto",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "efficientvit_b0",
    "fastvit_t8",
    "ghostnet_100",
    "levit_128s",
    "lcnet_050",
    "mixer_s32_224",
    "mobileone_s0",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "mobilevit_xxs",
    "nf_resnet26",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnetx_002",
    "repvgg_a0",
    "resnet18",
    "resnetv2_50",
    "swin_tiny_patch4_window7_224",
    "tinynet_e",
    "tiny_vit_5m_224",
    "vgg11",
    "vit_tiny_patch16_224",
    "xcit_nano_12_p8_224",
)


def check_model(model: nn.Module, architecture: str, size: int) -> None:
    """Its weights with the classifier's make an encoder, which gives a vector and learns."""
    spec = with_features_dim(library_spec(architecture, 1, size))
    encoder = encoder_of(spec, model.state_dict())
    with torch.no_grad():
        features = encoder(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    assert features.shape == (2, spec.features_dim)
    assert torch.isfinite(features).all()
    check_gradients(encoder, torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8))


def check_gradients(encoder: Encoder, images_BCHW: Tensor) -> None:
    """Those of its second step are the library's own in its first, with pixels in planes."""
    theirs = copy.deepcopy(encoder.trunk).to(memory_format=torch.contiguous_format)
    theirs(encoder.preprocess(images_BCHW)).square().mean().backward()
    for _ in range(2):
        encoder.zero_grad()
        encoder(images_BCHW).square().mean().backward()
    copy.deepcopy(encoder)
    found, expected = (
        {name: weight.grad for name, weight in trunk.named_parameters() if weight.grad is not None}
        for trunk in (encoder.trunk, theirs)
    )
    assert found.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm())
        assert error <= 1e-2 * float(gradient.norm()) + 1e-6 * largest, name


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("test_nfnet", "test_vit") else pytest.param(name, marks=pytest.mark.slow)
        for name in timm.list_models("test_*")
    ],
)
def test_timms_own_small_models(name: str) -> None:
    """One of most families; cast for a rollout in bfloat16 they round as learners do."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    model = timm.create_model(name, pretrained=False)
    check_model(model, f"timm:{name}", size)
    spec = with_features_dim(library_spec(f"timm:{name}", 1, size))
    encoder, dtype = encoder_of(spec, model.state_dict()), torch.bfloat16
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(encoder.cast(dtype)(images, dtype), encoder(images, dtype))


@pytest.mark.slow
def test_a_transformer_of_torchvision_rounds_alike_with_gradients_and_without() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    spec = with_features_dim(library_spec("torchvision:vit_b_32", 1, 224))
    encoder = encoder_of(spec, None)
    encoder.trunk.encoder.layers = encoder.trunk.encoder.layers[:2]
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        learner = encoder(images, dtype)
        with torch.no_grad():
            assert torch.equal(encoder(images, dtype), learner)


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_128s"])
def test_what_is_special_to_learn(name: str) -> None:
    """Strided 1x1 convolutions of colours; biases of attention that are kept in evaluation mode."""
    size = 224 if name == "levit_128s" else 64
    check_model(timm.create_model(name, pretrained=False), f"timm:{name}", size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_of_torchvision(name: str) -> None:
    weights = torchvision.models.get_model_weights(name).DEFAULT
    if weights.meta["num_params"] > 50e6:
        pytest.skip("large")
    if "squeezenet" in name:
        pytest.skip("without a linear classifier, and refused")
    size = weights.transforms().crop_size[0]
    check_model(torchvision.models.get_model(name), f"torchvision:{name}", size)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_timm(name: str) -> None:
    size = timm.get_pretrained_cfg(name).input_size[-1]
    check_model(timm.create_model(name, pretrained=False), f"timm:{name}", size)


def test_features_are_what_the_classifier_takes() -> None:
    images = torch.rand(2, 3, 36, 36)
    model = torchvision.models.get_model("mobilenet_v3_small").eval()
    encoder = encoder_of(library_spec("torchvision:mobilenet_v3_small", 1024), model.state_dict())
    with torch.no_grad():
        logits = model.classifier[3](encoder(images))
        torch.testing.assert_close(logits, model(encoder.preprocess(images)))
    model = timm.create_model("test_resnet").eval()
    encoder = encoder_of(library_spec("timm:test_resnet", 96), model.state_dict())
    with torch.no_grad():
        logits = model.get_classifier()(encoder(images))
        torch.testing.assert_close(logits, model(encoder.preprocess(images)))


def test_googlenet_turns_colours_as_its_weights_want() -> None:
    """As torchvision builds it for pretrained weights."""
    options = {"transform_input": True, "aux_logits": True, "init_weights": False}
    model = torchvision.models.get_model("googlenet", **options).eval()
    encoder = encoder_of(library_spec("torchvision:googlenet", 1024), model.state_dict())
    images = torch.rand(2, 3, 36, 36)
    with torch.no_grad():
        logits = model.fc(encoder(images))
        torch.testing.assert_close(logits, model(encoder.preprocess(images)))


def test_random_weights_are_the_librarys_own() -> None:
    torch.manual_seed(7)
    encoder = encoder_of(library_spec("timm:test_resnet", 96), None)
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=0)
    assert all(map(torch.equal, encoder.trunk.parameters(), model.parameters()))


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_libraries_that_are_not_installed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, family, None)
    with pytest.raises(ValueError, match=rf'needs {family}: pip install "hubrl\[vision\]"'):
        encoder_of(library_spec(f"{family}:resnet18", 512), None)


def test_torchvision_takes_colour_alone() -> None:
    spec = library_spec("torchvision:resnet18", 512)
    grey = dataclasses.replace(spec, channels=1, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="channels is 1, but torchvision's models take 3"):
        encoder_of(grey, None)


@pytest.mark.parametrize("size", [(84, 84), (36, 44), (52, 100)])
def test_the_number_of_nature_features(size: tuple[int, int]) -> None:
    network = NatureCNN(1, size, features_dim=7)
    assert network.cnn(torch.zeros(1, 1, *size)).shape == (1, nature_features(size))
    assert network(torch.zeros(1, 1, *size)).shape == (1, 7)
