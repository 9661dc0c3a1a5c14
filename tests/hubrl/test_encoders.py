"""Encoders: preprocessing by hand, verified weights, and a contract over every architecture."""

import copy
import dataclasses
import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file
from small_hubs import library_spec, nature_spec, write_hub
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import NatureCNN as SB3NatureCNN
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl import encoders
from hubrl.architectures import ARCHITECTURES, NatureConv, find_architecture
from hubrl.encoders import (
    Encoder,
    at_image_size,
    build_encoder,
    check_image_shape,
    golden_features,
    orthogonal_init,
    probe_images,
    with_features_dim,
)
from hubrl.files import file_sha256
from hubrl.specs import EncoderSpec, HubSpec, load_hub


def encoder_of(spec, **changes) -> Encoder:
    spec = dataclasses.replace(spec, **changes)
    return build_encoder(HubSpec(name="h", encoders=(spec,)), spec)


#: Small models of the libraries, of every kind: convolutions and transformers.
LIBRARY_SPECS = [
    library_spec("timm:test_resnet", 96),
    library_spec("timm:test_efficientnet", 256),
    library_spec("timm:test_vit", 64, size=32),
    library_spec("torchvision:mobilenet_v3_small", 1024),
    library_spec("torchvision:shufflenet_v2_x0_5", 1024),
]


@pytest.mark.parametrize(
    "spec",
    [*(nature_spec("x", architecture=name) for name in sorted(ARCHITECTURES)), *LIBRARY_SPECS],
    ids=lambda spec: spec.architecture,
)
def test_contract_of_every_architecture(spec: EncoderSpec) -> None:
    encoder = encoder_of(spec)
    for parameter in encoder.parameters():
        # What some libraries initialise with zeros would let no gradient through.
        nn.init.normal_(parameter, mean=0.02, std=0.1)
    images = torch.randint(0, 256, (3, 4, 36, 36), dtype=torch.uint8)
    features = encoder(images)
    assert features.shape == (3, spec.features_dim)
    assert torch.isfinite(features).all()
    low = torch.bfloat16
    assert torch.equal(encoder.cast(low)(images, low), encoder(images, low))
    features.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("spec", [nature_spec("own"), library_spec("timm:test_resnet", 96)])
def test_pixels_lie_by_their_channels(spec: EncoderSpec) -> None:
    """For gradients in float32, and always for libraries' models, whose weights lie alike."""
    encoder = encoders.encoder_of(spec, None)
    kernels = [weight for weight in encoder.weights if weight.ndim == 4 and weight.shape[1] > 1]
    seen: list[Tensor] = []
    encoder.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images_BCHW = torch.randint(0, 256, (2, spec.channels, *spec.image_size), dtype=torch.uint8)
    features_BD = encoder(images_BCHW)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    features_BD.sum().backward()
    for kernel in kernels:
        for tensor in (kernel, kernel.grad):
            is_by_channels = tensor.is_contiguous(memory_format=torch.channels_last)
            assert is_by_channels == (":" in spec.architecture)
    encoder(images_BCHW, torch.bfloat16)
    encoder.requires_grad_(False)(images_BCHW)
    assert len(seen) == 3
    for images in seen[1:]:  # ours gain nothing so
        is_by_channels = images.is_contiguous(memory_format=torch.channels_last)
        assert is_by_channels == (":" in spec.architecture)
    planes_BCHW = encoder.preprocess(images_BCHW).contiguous()
    trunk = copy.deepcopy(encoder.trunk).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(features_BD, trunk(planes_BCHW))
    assert all(weight.is_contiguous() for weight in encoder.to("meta").parameters())


def test_what_precedes_the_second_layer_stays_as_it_is() -> None:
    """Of a transformer its tokens and positions, too; normalisation belongs to what it follows."""
    vit = encoders.encoder_of(library_spec("timm:test_vit", 64, size=32), None)
    vit.freeze_first(1)
    frozen = {name for name, weight in vit.trunk.named_parameters() if not weight.requires_grad}
    first = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert frozen == first | {"blocks.0.norm1.weight", "blocks.0.norm1.bias"}
    resnet = encoders.encoder_of(library_spec("timm:test_resnet", 96), None)
    resnet.freeze_first(1)
    frozen = {name for name, weight in resnet.trunk.named_parameters() if not weight.requires_grad}
    assert frozen == {"conv1.0.weight", "conv1.1.weight", "conv1.1.bias"}


def test_the_wide_encoder_has_twice_the_channels() -> None:
    convs = [layer for layer in NatureConv(4, width=2).cnn if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in convs] == [
        (4, 64),
        (64, 128),
        (128, 128),
    ]


def test_nature_cnn_is_sb3s() -> None:
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    theirs = SB3NatureCNN(space)
    ours = encoder_of(nature_spec("x", 84, "nature_cnn"))
    ours.trunk.load_state_dict(theirs.state_dict())
    images = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(ours(images), theirs(images / 255.0), atol=1e-6, rtol=0)


def test_uint8_and_unit_floats_are_the_same_image() -> None:
    encoder = encoder_of(nature_spec("x"))
    images = torch.randint(0, 256, (2, 4, 36, 36), dtype=torch.uint8)
    assert torch.equal(encoder.preprocess(images), encoder.preprocess(images / 255.0))


def test_bfloat16_preprocessing_rounds_once() -> None:
    encoder = encoder_of(nature_spec("x"))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 4, 16, 16)
    pixels = F.pad(pixels, (0, 20, 0, 20))
    once = (pixels.float() / 255.0).to(torch.bfloat16)
    assert torch.equal(encoder.preprocess(pixels, torch.bfloat16), once)


def test_mean_and_std_by_hand(mixed_hub: Path) -> None:
    hub = load_hub(mixed_hub)
    encoder = build_encoder(hub, hub.only("rgb").encoders[0])
    image = torch.full((1, 3, 24, 20), 0.5)
    expected = torch.tensor([(0.5 - 0.5) / 0.2, (0.5 - 0.4) / 0.2, (0.5 - 0.3) / 0.1])
    torch.testing.assert_close(encoder.preprocess(image)[0, :, 7, 9], expected)


def test_rgb_encoder_sees_the_newest_grey_frame(mixed_hub: Path) -> None:
    hub = load_hub(mixed_hub)
    encoder = build_encoder(hub, hub.only("rgb").encoders[0])
    stack = torch.rand(2, 4, 24, 20)
    newest = stack[:, 3:].expand(-1, 3, -1, -1)
    torch.testing.assert_close(encoder(stack), encoder(newest))


def test_grey_encoder_sees_luma_of_rgb() -> None:
    encoder = encoder_of(nature_spec("x"), channels=1)
    pure = torch.zeros(3, 3, 36, 36)
    pure[[0, 1, 2], [0, 1, 2]] = 1.0
    assert encoder.preprocess(pure)[:, 0, 0, 0].tolist() == pytest.approx([0.299, 0.587, 0.114])


def test_images_are_resized_to_the_card() -> None:
    encoder = encoder_of(nature_spec("x"))
    images = torch.rand(2, 4, 72, 50)
    expected = F.interpolate(images, (36, 36), mode="bilinear", antialias=True)
    torch.testing.assert_close(encoder.preprocess(images), expected)


def test_weights_are_the_files(hub5: Path) -> None:
    hub = load_hub(hub5)
    encoder = build_encoder(hub, hub.encoders[0])
    stored = load_file(hub5 / "a.safetensors")
    assert stored.keys() == encoder.trunk.state_dict().keys()
    for key, tensor in encoder.trunk.state_dict().items():
        assert torch.equal(tensor, stored[key])


def test_convolutions_of_a_whole_agent_fit(tmp_path: Path) -> None:
    hub = load_hub(write_hub(tmp_path / "h", [nature_spec("x", architecture="nature_cnn")]))
    spec = dataclasses.replace(hub.encoders[0], architecture="nature_conv", features_dim=64)
    whole, convolutions = build_encoder(hub, hub.encoders[0]), build_encoder(hub, spec)
    assert torch.equal(whole.trunk.cnn[0].weight, convolutions.trunk.cnn[0].weight)


def test_without_pretraining_weights_are_orthogonal(hub5: Path) -> None:
    hub = load_hub(hub5)
    encoder = build_encoder(hub, hub.encoders[0], pretrained=False)
    rows = encoder.trunk.cnn[0].weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(32), atol=1e-5, rtol=0)


def test_orthogonal_init_is_sb3s() -> None:
    ours, theirs = NatureConv(4), NatureConv(4)
    torch.manual_seed(3)
    orthogonal_init(ours)
    torch.manual_seed(3)
    theirs.apply(partial(ActorCriticPolicy.init_weights, gain=np.sqrt(2)))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_statistics_and_dropout_stay_as_they_are(mixed_hub: Path) -> None:
    hub = load_hub(mixed_hub)
    encoder = build_encoder(hub, hub.only("grey").encoders[0]).train()
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    images = torch.rand(1, 4, 24, 20)  # a single row
    assert torch.equal(encoder(images), encoder(images))
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[key])


def corrupt(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "encoder 'a': its weight file .*a.safetensors is missing; put it there"),
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "sha256 .* truncated or not"),
        (corrupt, "encoder 'a': .* has sha256 .*, its card says"),
    ],
)
def test_damaged_weight_file(hub5: Path, damage, message: str) -> None:
    damage(hub5 / "a.safetensors")
    hub = load_hub(hub5)
    with pytest.raises(ValueError, match=message):
        build_encoder(hub, hub.encoders[0])


def test_file_that_is_not_safetensors(hub5: Path) -> None:
    hub = load_hub(hub5)
    file = hub5 / "a.safetensors"
    file.write_bytes(b"not tensors at all")
    spec = dataclasses.replace(hub.encoders[0], sha256=file_sha256(file))
    with pytest.raises(ValueError, match=r"encoder 'a': .* is not safetensors"):
        build_encoder(hub, spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "nature_con"},
            r"architecture 'nature_con' is unknown \(closest: 'nature_conv'\); architectures: ",
        ),
        ({"architecture": "nature_cnn"}, "does not fit architecture 'nature_cnn': .*linear.0"),
        (
            {"architecture": "nature_cnn", "image_size": (84, 84), "features_dim": 10**6},
            "features_dim is 1000000, allowed of nature_cnn at 84x84 px: 10699 at most",
        ),
        ({"image_size": (20, 20)}, r"image_size \[20, 20\] in its card does not fit arch"),
        ({"features_dim": 65}, r"features_dim is 65 in its card, but the architecture gives \(64,"),
    ],
)
def test_card_that_does_not_describe_the_file(hub5: Path, changes, message: str) -> None:
    hub = load_hub(hub5)
    with pytest.raises(ValueError, match=message):
        build_encoder(hub, dataclasses.replace(hub.encoders[0], **changes))


def test_a_net_that_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "MAX_NUMBERS", 10_000)
    message = (
        r"'timm:test_resnet' would have \d{3},\d{3} numbers with features_dim 96 and 3 channels, "
        "allowed: 10,000; correct the card"
    )
    with pytest.raises(ValueError, match=message):
        encoders.encoder_of(library_spec("timm:test_resnet", 96), None)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((17,), r"observation space has shape \(17,\), but encoder 'x' takes images \(C, H, W\)"),
        ((4, 10, 84), "images of 10x84 px, but encoder 'x' takes 84x84 px and no less than half"),
        ((3, 84, 84), "has 3 channels, but encoder 'x' takes 4 channels; stack 4 grey"),
    ],
)
def test_observations_that_no_encoder_takes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_image_shape(nature_spec("x", 84), shape)


def test_observations_that_can_be_adapted(mixed_hub: Path) -> None:
    rgb = load_hub(mixed_hub).only("rgb").encoders[0]
    for shape in [(3, 24, 20), (4, 84, 84), (1, 12, 10), (7, 24, 20)]:
        check_image_shape(rgb, shape)


def test_probe_images_never_change() -> None:
    # The golden features of every published card stand on these pixels.
    pixels = probe_images(4, 4, (84, 84)).numpy().tobytes()
    expected = "a9feb73c498bc8b2c2c92f7058b1ec989c9313b9a6a5ace2fe66965fe9533239"
    assert hashlib.sha256(pixels).hexdigest() == expected


def test_probe_images_are_scenes_of_any_size() -> None:
    images = probe_images(8, 4, (84, 60))
    assert images.shape == (8, 4, 84, 60)
    assert images.dtype == torch.uint8
    flat = images.flatten(0, 1).flatten(1)
    assert len(flat.unique(dim=0)) == 8 * 4
    assert flat.float().std(dim=1).min() > 10
    large = probe_images(8, 4, (256, 256))
    assert torch.equal(probe_images(8, 4, (128, 64)), large[:, :, ::2, ::4])


class MeanAndMax(nn.Module):
    """Two features of an image that can be worked out by hand."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.stack([images_BCHW.mean(dim=(1, 2, 3)), images_BCHW.amax(dim=(1, 2, 3))], 1)


def test_golden_features_by_hand() -> None:
    spec = dataclasses.replace(nature_spec("x"), features_dim=2, mean=(0.5,), std=(0.25,))
    golden = golden_features(Encoder(spec, MeanAndMax()))
    assert len(golden) == 8
    for number, image in zip(golden, probe_images(4, 4, (36, 36)).numpy(), strict=False):
        pixels = (image / 255 - 0.5) / 0.25
        assert number == pytest.approx((1 * pixels.mean() + 2 * pixels.max()) / 3, rel=1e-5)
    for number, image in zip(golden[4:], probe_images(4, 4, (45, 45)), strict=True):
        resized = F.interpolate(image[None] / 255, (36, 36), mode="bilinear", antialias=True)
        pixels = (resized.double().numpy() - 0.5) / 0.25
        assert number == pytest.approx((1 * pixels.mean() + 2 * pixels.max()) / 3, rel=1e-5)


def test_golden_features_are_those_of_exact_arithmetic(hub5: Path) -> None:
    hub = load_hub(hub5)
    encoder = build_encoder(hub, hub.encoders[0])
    golden = golden_features(encoder)[:4]
    images = encoder.preprocess(probe_images(4, 4, (36, 36))).double()
    with torch.no_grad():
        features = encoder.trunk.double()(images)
    weights = torch.tensor([1.0 + i % 7 for i in range(64)]).double()
    exact = (features * weights).sum(dim=1) / weights.sum()
    assert golden == pytest.approx(exact.tolist(), rel=1e-5)  # cards are compared to 1e-3


def test_golden_features_see_the_newest_of_a_stack(mixed_hub: Path) -> None:
    hub = load_hub(mixed_hub)
    encoder = build_encoder(hub, hub.only("rgb").encoders[0])
    with torch.no_grad():
        features = encoder(probe_images(4, 4, (30, 25))[:, 3:].expand(-1, 3, -1, -1))
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1.0]
    expected = (features * torch.tensor(weights)).sum(dim=1) / sum(weights)
    assert golden_features(encoder)[4:] == pytest.approx(expected.tolist(), rel=1e-4)


def test_weights_from_a_file_draw_no_random_numbers(hub5: Path) -> None:
    hub = load_hub(hub5)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_encoder(hub, hub.encoders[0])
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(3)
    build_encoder(hub, hub.encoders[0], pretrained=False)
    assert not torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_encoder_gives_the_same_numbers_and_does_not_learn(hub5: Path, dtype) -> None:
    hub = load_hub(hub5)
    encoder = build_encoder(hub, hub.encoders[0])
    cast = encoder.cast(dtype)
    images = torch.randint(0, 256, (3, 4, 36, 36), dtype=torch.uint8)
    assert torch.equal(cast(images, dtype), encoder(images, dtype))
    assert all(p.dtype == dtype and not p.requires_grad for p in cast.parameters())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in encoder.parameters())


def test_a_hub_at_another_image_size(tmp_path: Path) -> None:
    specs = [
        nature_spec("conv"),
        dataclasses.replace(library_spec("timm:test_resnet", 1, 48), name="net"),
        dataclasses.replace(library_spec("timm:test_vit", 1, 160), name="vit"),
    ]
    golden = tuple(range(8))
    specs = [dataclasses.replace(with_features_dim(spec), golden=golden) for spec in specs]
    hub = at_image_size(HubSpec(name="h", encoders=tuple(specs)), 90)
    assert [spec.image_size for spec in hub.encoders] == [(90, 90), (90, 90), (96, 96)]
    assert hub.encoders[0].features_dim == 64 * 7 * 7
    assert [spec.features_dim for spec in hub.encoders[1:]] == [s.features_dim for s in specs[1:]]
    assert all(spec.golden is None for spec in hub.encoders)
    assert at_image_size(hub, 90) == hub
    for spec in hub.encoders:
        images = torch.rand(1, spec.channels, 90, 90)
        assert build_encoder(hub, spec)(images).shape == (1, spec.features_dim)


def test_impossible_image_sizes() -> None:
    net = HubSpec(name="h", encoders=(library_spec("timm:test_vit", 1, 160),))
    with pytest.raises(ValueError, match="hub 'h': image size is 31 px, allowed: 32 px or more"):
        at_image_size(net, 31)
    message = (
        r"image_size is \[100, 100\], but timm:test_vit cuts images into patches of 16 px, "
        "allowed: multiples of it, such as 96 or 112"
    )
    with pytest.raises(ValueError, match=message):
        with_features_dim(dataclasses.replace(net.encoders[0], image_size=(100, 100)))


def test_weights_of_a_transformer_fit_at_another_image_size() -> None:
    spec = with_features_dim(library_spec("timm:test_vit", 1, 160))
    trunk = find_architecture(spec).build(spec)
    weights = trunk.state_dict()
    n_tokens = weights["pos_embed"].shape[1] - 100
    weights["pos_embed"][:, n_tokens:] = 0.25
    weights["pos_embed"][:, :n_tokens] = 0.5
    smaller = dataclasses.replace(spec, image_size=(64, 96))
    found_1ND = encoders.encoder_of(smaller, weights).trunk.get_parameter("pos_embed")
    assert found_1ND.shape[1] == n_tokens + 4 * 6
    assert found_1ND[:, :n_tokens].eq(0.5).all()
    torch.testing.assert_close(
        found_1ND[:, n_tokens:], torch.full_like(found_1ND, 0.25)[:, n_tokens:]
    )
    weights["pos_embed"] = weights["pos_embed"][:, :-1]
    with pytest.raises(ValueError, match=r"does not fit architecture .*pos_embed"):
        encoders.encoder_of(smaller, weights)


def test_nets_of_packages_are_named() -> None:
    spec = library_spec("packaged:resnet50_thick", 1, 32)
    message = (
        r"'packaged:resnet50_thick' is unknown \(closest: 'resnet50_thin'\); packaged: mobilenetv2"
    )
    with pytest.raises(ValueError, match=message):
        find_architecture(spec)
