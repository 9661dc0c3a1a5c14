"""Knowledge flow: stages, mixture and dependence against a layer by layer computation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from small_images import SIZE, quadrant_images, write_rgb_hub
from torch import Tensor
from torch.nn import functional as F

from hubrl.encoders import build_encoder, with_features_dim
from hubrl.specs import EncoderSpec, HubSpec, load_hub
from vision_tasks.methods import Method, Settings, build_method
from vision_tasks.methods.knowledge_flow import Mixer, dependence_loss, find_stages, maps_of
from vision_tasks.tasks import Classification

IMAGES, TARGETS = quadrant_images(6, seed=5)


@pytest.fixture
def method(tmp_path: Path) -> Method:
    hub = load_hub(write_rgb_hub(tmp_path / "rgb"))
    method = build_method("knowledge-flow", hub, Classification(4), Settings(0, SIZE))
    method.begin("train", lambda: [(IMAGES, TARGETS)])
    return method


def card(architecture: str, size: int) -> EncoderSpec:
    return with_features_dim(
        EncoderSpec(
            name="x",
            architecture=architecture,
            features_dim=1,
            image_size=(size, size),
            channels=3,
            license="MIT",
            source="random numbers",
        )
    )


def layers_mixed(method: Method, shares_S: list[Tensor], fade: float) -> Tensor:
    """Outputs of the mixture, layer by layer; NatureCNN at 36 px has maps of 8 and 3 pixels."""
    student = method.chosen[1]
    own = student.encoder.preprocess(IMAGES)
    theirs = [teacher.preprocess(IMAGES) for teacher in method.teachers]
    for i in range(7):  # three convolutions with ReLU, flattened
        own = student.encoder.trunk.cnn[i](own)
        theirs = [t.trunk.cnn[i](x).detach() for t, x in zip(method.teachers, theirs, strict=True)]
        if i in (1, 3, 6):
            site = (1, 3, 6).index(i)
            own = own if i < 6 else own[:, :, None, None]
            maps = theirs if i < 6 else [x[:, :, None, None] for x in theirs]
            transforms = method.mixers[site].transforms
            shares = shares_S[site]
            mixed = own * (1 - fade * shares[1:].sum())
            for share, transform, x in zip(shares[1:], transforms, maps, strict=True):
                mixed = mixed + fade * share * F.conv2d(x, transform.weight)
            own = mixed
    return student.head(own.flatten(1))


def test_mixture_and_gradients(method: Method) -> None:
    torch.manual_seed(1)
    for mixer in method.mixers:
        torch.nn.init.normal_(mixer.scores, std=0.1)
        for transform in mixer.transforms:
            torch.nn.init.normal_(transform.weight, std=0.1)
    method.progress = 0.25
    shares = [(10 * mixer.scores).softmax(dim=0) for mixer in method.mixers]
    task = F.cross_entropy(layers_mixed(method, shares, 0.5), TARGETS)
    dependence = -sum(each[0].log() for each in shares) / 3
    losses = method.loss(IMAGES, TARGETS)
    torch.testing.assert_close(losses.parts, {"task": task, "dependence": dependence})
    torch.testing.assert_close(losses.total, task + 0.5 * dependence)
    weights = list(method.parameters())
    assert len(weights) == 6 + 2 + 3 * (1 + 3)  # encoder, head, and scores and transforms
    ours = torch.autograd.grad(losses.total, weights)
    theirs = torch.autograd.grad(task + 0.5 * dependence, weights)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("progress", [0.5, 0.75, 1.0])
def test_the_student_is_alone_in_the_second_half(progress: float, method: Method) -> None:
    torch.manual_seed(1)
    for weight in method.mixers.parameters():
        torch.nn.init.normal_(weight)
    alone_BO = method(IMAGES)
    assert not torch.allclose(method.mixture(IMAGES), alone_BO)
    method.progress = progress
    torch.testing.assert_close(method.mixture(IMAGES), alone_BO)
    alone = F.cross_entropy(alone_BO, TARGETS)
    torch.testing.assert_close(method.loss(IMAGES, TARGETS).parts["task"], alone)


def test_no_hook_is_left(method: Method) -> None:
    method.mixture(IMAGES)
    encoders = [method.chosen[1].encoder, *method.teachers]
    assert not any(m._forward_hooks for encoder in encoders for m in encoder.modules())


def test_a_mixer_by_hand() -> None:
    """Shares .8, .1 and .1; the first teacher's map has 4 pixels, the second's 1."""
    mixer = Mixer(1, [1, 2])
    torch.testing.assert_close(mixer.shares(), torch.tensor([0.8, 0.1, 0.1]))
    own, one = (
        torch.tensor(10.0).view(1, 1, 1, 1),
        torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 2, 2),
    )
    other = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(mixer(own, [one, other], 1.0).item(), 8.0)
    mixer.transforms[0].weight.data.fill_(2.0)
    mixer.transforms[1].weight.data.copy_(torch.tensor([1.0, -3.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(mixer(own, [one, other], 1.0).item(), 8 + 0.1 * 8 - 0.1 * 1)
    torch.testing.assert_close(mixer(own, [one, other], 0.5).item(), 9 + 0.05 * 8 - 0.05 * 1)


def test_dependence_loss_by_hand() -> None:
    loss = dependence_loss(torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(loss, 1.5 * torch.tensor(2.0).log())


@pytest.mark.parametrize(
    ("architecture", "size", "stages"),
    [
        ("nature_conv", 36, {"cnn.1": 32, "cnn.3": 64, "": 64}),
        (
            "timm:resnet10t",
            64,
            {"act1": 64, "layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512, "": 512},
        ),
        (  # whose blocks call one activation three times
            "torchvision:resnet50",
            64,
            {
                "relu": 64,
                "layer2.0.bn1": 128,
                "layer3.0.bn1": 256,
                "layer4.0.bn1": 512,
                "layer4": 2048,
                "": 2048,
            },
        ),
        ("timm:test_vit", 32, {"": 64}),
        # Attention over windows: as many rows, as high as wide.
        ("timm:swin_tiny_patch4_window7_224", 224, {"": 768}),
    ],
)
def test_stages(architecture: str, size: int, stages: dict[str, int]) -> None:
    spec = card(architecture, size)
    encoder = build_encoder(HubSpec(name="h", encoders=(spec,)), spec)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    assert find_stages(encoder, images[:1]) == stages
    maps = maps_of(encoder, set(stages), images, torch.float32)
    assert {name: each.shape[1] for name, each in maps.items()} == stages


def test_teachers_of_other_architectures(tmp_path: Path) -> None:
    """A transformer has pooled features alone, and a student without stages learns from them."""
    conv = dataclasses.replace(card("nature_conv", 36), name="conv")
    vit = dataclasses.replace(card("timm:test_vit", 32), name="vit")
    hub = HubSpec(name="h", encoders=(conv, vit))
    for student, sites in (("conv", [1, 1, 2]), ("vit", [2])):
        method = build_method(
            "knowledge-flow", hub, Classification(4), Settings(0, SIZE, pretrained=False)
        )
        del method.models["vit" if student == "conv" else "conv"]
        method.begin("train", lambda: [(IMAGES, TARGETS)])
        assert [len(mixer.transforms) for mixer in method.mixers] == sites
        assert method.loss(IMAGES, TARGETS).total.isfinite()
