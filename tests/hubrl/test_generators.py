"""Pathway generators: what they look at, their noise, their running means."""

import pytest
import torch
from torchvision.models.resnet import BasicBlock, ResNet

from hubrl.generators import (
    EvenGenerator,
    PathwayGenerator,
    ResNet10,
    ResNet10Generator,
    RunningMean,
)


def images_of(n_rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n_rows, 4, 36, 36), dtype=torch.uint8, generator=generator)


def test_noise_is_scaled_by_the_softplus_of_the_noise_head() -> None:
    generator = PathwayGenerator(4, (36, 36), 2)
    with torch.no_grad():
        for parameter in (*generator.scores.parameters(), *generator.noise_scale.parameters()):
            parameter.zero_()
        generator.noise_scale.bias.copy_(torch.tensor([0.0, 1.0]))
    scores = generator(images_of(1), torch.tensor([[1.0, -2.0]]))
    # softplus(0) = ln 2 = 0.693147, softplus(1) = 1.313262
    torch.testing.assert_close(scores, torch.tensor([[0.693147, -2.626523]]), atol=1e-5, rtol=0)


def test_routing_starts_with_the_image_and_little_noise() -> None:
    torch.manual_seed(0)
    generator = PathwayGenerator(4, (36, 36), 5)
    images = images_of(200)
    scores = generator(images, None)
    assert scores.std(dim=0).min() > 0.01
    noise = generator(images, torch.ones(200, 5)) - scores
    # softplus(-2) = ln(1 + e^-2) = 0.126928
    torch.testing.assert_close(noise, torch.full((200, 5), 0.126928), atol=1e-5, rtol=0)


def test_even_routing_starts_with_all_encoders_for_each_image() -> None:
    torch.manual_seed(0)
    generator, n_draws = EvenGenerator(4, (36, 36), 5), 3000
    image = images_of(1)
    scores, noise = generator(image, None), generator(image, torch.ones(1, 5))
    assert scores.abs().max() < 0.2
    # softplus(2) = ln(1 + e^2) = 2.126928
    torch.testing.assert_close(noise - scores, torch.full((1, 5), 2.126928), atol=1e-5, rtol=0)
    draws = generator(image.expand(n_draws, 4, 36, 36), torch.randn(n_draws, 5))
    shares = draws.topk(2).indices.flatten().bincount(minlength=5) / n_draws
    torch.testing.assert_close(shares, torch.full((5,), 0.4), atol=0.08, rtol=0)


def images_with_a_ball(n_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One scene in which only a ball of 2x2 pixels moves; and the fifth of the width it is in."""
    scene = torch.randint(0, 256, (4, 84, 84), generator=torch.Generator().manual_seed(0))
    images = scene.to(torch.uint8).repeat(n_images, 1, 1, 1)
    top, left = torch.randint(0, 83, (2, n_images))
    for image, y, x in zip(images, top.tolist(), left.tolist(), strict=True):
        image[:, y : y + 2, x : x + 2] = 200
    return images, left * 5 // 83


def test_the_small_generator_sees_a_ball_of_2x2_pixels() -> None:
    torch.manual_seed(0)
    generator = PathwayGenerator(4, (84, 84), 5)
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    for _ in range(25):
        for _ in range(8):
            images, fifth = images_with_a_ball(32)
            loss = torch.nn.functional.cross_entropy(generator(images, None), fifth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        generator.eval().train()  # as SB3 does from one iteration to the next
    images, fifth = images_with_a_ball(500)
    assert (generator(images, None).argmax(dim=1) == fifth).float().mean() > 0.95


@pytest.mark.parametrize(
    ("channels", "seen"),
    [(1, {0}), (3, {0, 1, 2}), (4, {1, 3}), (5, {0, 2, 4}), (6, {0, 1, 2, 3, 4, 5})],
)
def test_generator_sees_every_second_frame_of_a_stack(channels: int, seen: set[int]) -> None:
    generator = PathwayGenerator(channels, (36, 36), 5)
    images = torch.randint(0, 256, (8, channels, 36, 36), dtype=torch.uint8)
    scores = generator(images, None)
    for channel in range(channels):
        changed = images.clone()
        changed[:, channel] = 255 - changed[:, channel]
        assert torch.equal(generator(changed, None), scores) == (channel not in seen)


def test_generator_looks_at_the_difference_from_the_mean_image() -> None:
    generator = PathwayGenerator(4, (36, 36), 5)
    images = images_of(64)
    for _ in range(2):  # features are observed once there is a mean image
        generator.train()(images, None)
        generator.eval()
    seen = images[:, 1::2] / 255.0
    patches = generator.patches(seen - seen[::8].mean(dim=0))
    features = generator.hidden(patches.relu().flatten(1)).relu()
    observed = features[::8]
    variance = observed.var(dim=0, correction=0).clamp(min=1e-4)
    expected = generator.scores((features - observed.mean(dim=0)) / variance.sqrt())
    torch.testing.assert_close(generator(images, None), expected, rtol=1e-4, atol=1e-4)


def test_running_mean_counts_from_the_end_of_training_mode() -> None:
    mean = RunningMean(1)
    rows = torch.arange(16.0)[:, None]
    mean.observe(rows)  # rows 0 and 8
    assert mean.running_mean.item() == 0.0
    mean.eval()
    assert mean.running_mean.item() == 4.0
    mean.observe(rows + 100)  # not training
    with torch.no_grad():
        mean.train().observe(rows + 100)  # as a target network
    mean.eval()
    assert mean.running_mean.item() == 4.0
    mean.train().observe(rows * 2 + 2, scale=2.0)  # rows 1 and 9: half of the four so far
    mean.eval()
    assert mean.running_mean.item() == 4.5


def test_running_mean_of_a_model_saved_in_training_is_taken_up_where_it_is_loaded() -> None:
    saved, loaded = RunningMean(1), RunningMean(1).eval()
    saved.observe(torch.ones(1, 1))
    loaded.load_state_dict(saved.state_dict())
    assert loaded.running_mean.item() == 1.0


def test_running_mean_forgets_beyond_its_horizon() -> None:
    mean = RunningMean(1)
    for n_rows, value in ((16_384, 0.0), (4_096, 1.0)):
        mean.train().observe(torch.full((n_rows, 1), value).repeat_interleave(8, dim=0))
        mean.eval()
    assert mean.running_mean.item() == 0.5  # 4,096 of 8,192 rows, not of 20,480


def test_resnet10_is_torchvisions_with_one_block_a_stage() -> None:
    torch.manual_seed(0)
    ours, theirs = ResNet10(3, 5), ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    sizes = [tuple(tensor.shape) for tensor in ours.state_dict().values()]
    assert sizes == [tuple(tensor.shape) for tensor in theirs.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.rand(2, 3, 64, 64)
    for mode in (True, False):  # with the batch's statistics, and with those of training
        expected = theirs.train(mode)(images)
        torch.testing.assert_close(ours.train(mode)(images), expected, rtol=1e-4, atol=1e-5)
    # by hand: stem, stages, linear layer
    stages = 73_984 + 230_144 + 919_040 + 3_673_088
    assert sum(weight.numel() for weight in ours.parameters()) == 9_536 + stages + 2_565


def test_resnet10_generator_adds_noise_of_a_second_network() -> None:
    torch.manual_seed(0)
    generator = ResNet10Generator(3, (40, 40), 5).eval()
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    scores = generator(images, None)
    assert torch.equal(generator(images / 255.0, None), scores)
    noise = torch.randn(4, 5)
    scale = torch.nn.functional.softplus(generator.noise_scale(images / 255.0))
    torch.testing.assert_close(generator(images, noise), scores + noise * scale)


def test_resnet10_generator_runs_its_noise_network_for_noise_alone() -> None:
    generator = ResNet10Generator(3, (40, 40), 5)
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    generator(images, None).sum().backward()
    assert all(weight.grad is None for weight in generator.noise_scale.parameters())
    assert generator.noise_scale.stem[1].num_batches_tracked == 0
    generator(images, torch.randn(4, 5)).sum().backward()
    assert all(weight.grad is not None for weight in generator.noise_scale.parameters())


def test_resnet10_generator_depends_on_the_batch_in_training_alone() -> None:
    torch.manual_seed(0)
    generator = ResNet10Generator(3, (40, 40), 5)
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    assert (generator(images, None)[:2] - generator(images[:2], None)).abs().max() > 1e-2
    generator.eval()
    torch.testing.assert_close(generator(images, None)[:2], generator(images[:2], None))


def test_resnet10_takes_half_of_a_batch_at_a_time_at_inference() -> None:
    torch.manual_seed(0)
    network = ResNet10(3, 5).eval()
    sizes: list[int] = []
    network.stem.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    images = torch.rand(5, 3, 40, 40)
    whole = network(images)
    with torch.no_grad():
        halves = network(images)
        network.train()(images)
    assert sizes == [5, 3, 2, 5]
    torch.testing.assert_close(halves, whole)


def test_resnet10_generator_refuses_small_images() -> None:
    message = "generator is 'resnet10', but the images have 28x36 px, allowed: at least 33x33"
    with pytest.raises(ValueError, match=message):
        ResNet10Generator(1, (28, 36), 5)
    one_image = torch.zeros(1, 1, 33, 33)
    assert ResNet10Generator(1, (33, 33), 5)(one_image, torch.zeros(1, 5)).shape == (1, 5)
