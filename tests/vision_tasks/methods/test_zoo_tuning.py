"""Zoo-Tuning: layers against a loop over images, the start, statistics of BatchNorm."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from small_hubs import library_spec, nature_spec, write_hub
from small_images import SIZE, quadrant_images, write_rgb_hub
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.encoders import with_features_dim
from hubrl.specs import HubSpec, load_hub
from vision_tasks.methods import Settings, build_method
from vision_tasks.methods.zoo_tuning import AggregatedLayer, aggregate, layers_of_images
from vision_tasks.tasks import Classification

IMAGES, TARGETS = quadrant_images(8, seed=5)


def one_by_one(layer: AggregatedLayer, inputs: Tensor) -> Tensor:
    """Each image through a layer of its own weights."""
    conv, outputs = layer.layer, []
    for row in inputs:
        is_conv = isinstance(conv, nn.Conv2d)
        mean = row.mean(dim=(1, 2)) if is_conv else row.reshape(-1, row.shape[-1]).mean(dim=0)
        gates = layer.gates[2](F.relu(mean @ layer.gates[0].weight.T)).softmax(dim=0)
        weight = torch.zeros_like(conv.weight[0])
        for e, gate in enumerate(gates):
            aligned = conv.weight[e].flatten(1)
            if layer.alignment is not None:
                aligned = (torch.eye(len(aligned)) + layer.alignment[e]) @ aligned
            weight = weight + gate * aligned.view_as(weight)
        bias = None if conv.bias is None else gates @ conv.bias
        if is_conv:
            if isinstance(conv, Conv2dSame):
                row = F.pad(row, (0, 1, 0, 1))  # SAME for a kernel of 3, stride 2, even sides
            row = F.conv2d(row[None], weight, bias, conv.stride, conv.padding, 1, conv.groups)[0]
        else:
            row = F.linear(row, weight, bias)
        outputs.append(row)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 6, 6)),
        (lambda: nn.Conv2d(4, 4, 3, stride=2, groups=4, bias=False), (5, 4, 7, 7)),
        (lambda: Conv2dSame(4, 6, 3, stride=2), (5, 4, 6, 6)),
        (lambda: nn.Conv2d(4, 6, 1), (5, 4, 2, 2)),
        (lambda: nn.Linear(4, 3), (5, 4)),
        (lambda: nn.Linear(4, 3, bias=False), (5, 7, 4)),
    ],
    ids=["conv", "depthwise", "same", "1x1", "linear", "tokens"],
)
def test_each_image_has_its_own_weights(make: object, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = [make() for _ in range(3)]  # type: ignore[operator]
    means = [
        sum(weights) / 3 for weights in zip(*(one.parameters() for one in layers), strict=True)
    ]
    inputs = torch.randn(shape)
    layer = AggregatedLayer(layers)
    plain = make()  # type: ignore[operator]
    for weight, mean in zip(plain.parameters(), means, strict=True):
        weight.data = mean.data
    layer.n_images = len(inputs)
    torch.testing.assert_close(layer(inputs), plain(inputs))  # gates are equal at the start
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.5)
    outputs, expected = layer(inputs), one_by_one(layer, inputs)
    torch.testing.assert_close(outputs, expected)
    weights = list(layer.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), weights) for y in (outputs, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_the_windows_of_an_image_share_its_weights() -> None:
    torch.manual_seed(0)
    layer = AggregatedLayer([nn.Linear(4, 3) for _ in range(3)])
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.5)
    windows = torch.randn(2 * 5, 7, 4)  # five of each image, of 7 tokens
    layer.n_images = 2
    expected = one_by_one(layer, windows.view(2, 5 * 7, 4)).view(2 * 5, 7, 3)
    torch.testing.assert_close(layer(windows), expected)


@pytest.mark.parametrize(
    "architecture",
    [
        "timm:edgenext_xx_small",
        "timm:eva02_tiny_patch14_224",
        pytest.param("timm:beit_base_patch16_224", marks=pytest.mark.slow),
        pytest.param("timm:swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
        pytest.param("torchvision:swin_t", marks=pytest.mark.slow),
        pytest.param("timm:swinv2_tiny_window8_256", marks=pytest.mark.slow),
        pytest.param("timm:levit_128s", marks=pytest.mark.slow),
    ],
)
def test_models_of_libraries(architecture: str) -> None:
    """Of which some read the weights of their layers, or call them on windows."""
    size = 256 if "256" in architecture else 224
    spec = dataclasses.replace(
        with_features_dim(library_spec(architecture, 1, size)), name="a", weights=None
    )
    hub = HubSpec(name="h", encoders=(spec, dataclasses.replace(spec, name="b")))
    method = build_method("zoo-tuning", hub, Classification(4), Settings(0, size, pretrained=False))
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    method.loss(images, torch.tensor([0, 1])).total.backward()
    learned = [layer.layer.weight for layer in method._layers]
    assert len(learned) > 10
    assert all(weight.grad is not None for weight in learned)
    stacked = [pair for layer in method._layers for pair in layer.layer.named_parameters()]
    assert all(weight.decays == (name == "weight") for name, weight in stacked)


def test_equal_encoders_start_as_one_of_them(tmp_path: Path) -> None:
    hub = load_hub(write_rgb_hub(tmp_path / "rgb"))
    first = hub.encoders[0]
    same = tuple(dataclasses.replace(first, name=name) for name in ("a", "b", "c"))
    hub = dataclasses.replace(hub, encoders=same)
    method = build_method("zoo-tuning", hub, Classification(4), Settings(0, SIZE))
    method.begin("train", lambda: [(IMAGES, TARGETS)])
    single = build_method("single:a", hub, Classification(4), Settings(0, SIZE))
    torch.testing.assert_close(method(IMAGES), single(IMAGES))
    images_BCHW = IMAGES.repeat(9, 1, 1, 1)  # more than a chunk
    torch.testing.assert_close(method(images_BCHW), single(images_BCHW))


def test_batch_norm_learns_the_aggregated_statistics(
    tmp_path: Path, batch_norm_architecture: str
) -> None:
    """From a set that is sorted by classes; the statistics stay in evaluation mode."""
    specs = [
        dataclasses.replace(
            nature_spec(name), architecture=batch_norm_architecture, features_dim=8, channels=3
        )
        for name in "abc"
    ]
    hub = load_hub(write_hub(tmp_path / "norm", specs))
    method = build_method("zoo-tuning", hub, Classification(4), Settings(0, SIZE))
    order = TARGETS.argsort()
    halves = [(IMAGES[rows], TARGETS[rows]) for rows in order.chunk(2)]
    method.begin("train", lambda: halves)
    trunk = method.encoder.trunk
    maps_BCHW = trunk.conv(method.encoder.preprocess(IMAGES))
    torch.testing.assert_close(trunk.norm.running_mean, maps_BCHW.mean(dim=(0, 2, 3)).detach())
    torch.testing.assert_close(trunk.norm.running_var, maps_BCHW.var(dim=(0, 2, 3)).detach())
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.train()
    method.loss(IMAGES, TARGETS)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_each_image_counts_alike_in_the_statistics(
    tmp_path: Path, batch_norm_architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are left for a last chunk."""
    spec = dataclasses.replace(
        nature_spec("a"), architecture=batch_norm_architecture, features_dim=8, channels=3
    )
    hub = load_hub(write_hub(tmp_path / "norm", [spec, dataclasses.replace(spec, name="b")]))
    method = build_method("zoo-tuning", hub, Classification(4), Settings(0, SIZE))
    monkeypatch.setattr(type(method), "CHUNK", 2)
    sizes: list[int] = []
    method.encoder.trunk.norm.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    images, targets = IMAGES.repeat(2, 1, 1, 1)[:10], TARGETS.repeat(2)[:10]
    method.begin("train", lambda: [(images, targets)])
    assert sizes == [5, 5]
    maps_BCHW = method.encoder.trunk.conv(method.encoder.preprocess(images))
    norm = method.encoder.trunk.norm
    torch.testing.assert_close(norm.running_mean, maps_BCHW.mean(dim=(0, 2, 3)).detach())


def test_layers_that_are_not_called_become_the_mean() -> None:
    """Read by others, or called on what is no image."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.table = nn.MultiheadAttention(8, 2), nn.Linear(3, 8)
            self.output = nn.Linear(8, 5)

        def forward(self, rows: Tensor) -> Tensor:
            rows = rows + self.table(torch.eye(3)).mean(dim=0)
            output: Tensor = self.output(self.attention(rows, rows, rows)[0])
            return output

    trunks = [Trunk(), Trunk()]
    images = torch.randn(2, 4, 8)
    names = layers_of_images(trunks[0], images)
    assert names == ["output"]
    projections = [trunk.attention.out_proj.weight.detach().clone() for trunk in trunks]
    target = aggregate(trunks, names)
    mean = (projections[0] + projections[1]) / 2
    torch.testing.assert_close(target.attention.out_proj.weight, mean)
    assert isinstance(target.output, AggregatedLayer)
    assert isinstance(target.table, nn.Linear)


def test_a_hub_needs_no_files_without_pretrained_weights() -> None:
    spec = dataclasses.replace(nature_spec("a"), channels=3)
    hub = HubSpec(name="h", encoders=(spec, dataclasses.replace(spec, name="b")))
    settings = Settings(0, SIZE, pretrained=False)
    assert build_method("zoo-tuning", hub, Classification(4), settings)(IMAGES).shape == (8, 4)
