"""Routing replay: noise is normal, repeats for content and key, and sets are found again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubrl.replay import FeatureCache, RoutingReplay


def python_mix(z: int) -> int:
    """SplitMix64's finaliser on unsigned Python integers (Steele, Lea, Flood 2014)."""
    mask = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(st.lists(st.integers(0, 255), min_size=16, max_size=16))
def test_hash_against_plain_integers(pixels: list[int]) -> None:
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    words = [int.from_bytes(bytes(pixels[i : i + 8]), "little", signed=True) for i in (0, 8)]
    words += [word >> 32 for word in words]
    weights = [python_mix((golden * (i + 1)) & mask) | 1 for i in range(4)]
    total = sum(word * weight for word, weight in zip(words, weights, strict=True)) & mask
    observation = torch.tensor(pixels, dtype=torch.uint8).view(1, 1, 4, 4)
    assert RoutingReplay(3).hash(observation).item() & mask == python_mix(total)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_hash_sees_one_pixel_and_not_the_batch(dtype: torch.dtype) -> None:
    replay = RoutingReplay(3)
    images = torch.randint(0, 256, (64, 4, 9, 7)).to(dtype)  # 252 numbers: no whole words
    hashes = replay.hash(images)
    assert torch.equal(replay.hash(images[5:6]), hashes[5:6])
    assert hashes.unique().numel() == 64
    changed = images.clone()
    changed[5, 3, 8, 6] += 1
    assert (replay.hash(changed) != hashes).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("value", [1, 64, 100, 128, 200, 255])
@pytest.mark.parametrize("size", [64, 84])
def test_hash_tells_where_a_single_pixel_is(size: int, value: int) -> None:
    """The upper bits of a word would be lost in sums of products as long as itself."""
    places = torch.arange(0, 4 * size * size, 7)
    images = torch.zeros(len(places), 4 * size * size, dtype=torch.uint8)
    images[torch.arange(len(places)), places] = value
    images = images.view(-1, 4, size, size)
    assert RoutingReplay(3).hash(images).unique().numel() == len(places)
    assert RoutingReplay(3).hash(255 - images).unique().numel() == len(places)
    planes = (images > 0)[:500, :1].float()
    assert RoutingReplay(3).hash(planes).unique().numel() == len(planes.flatten(1).unique(dim=0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("height", [2, 8])
@pytest.mark.parametrize("value", [64, 100, 255])
def test_hash_tells_where_a_sprite_is(value: int, height: int, dtype: torch.dtype) -> None:
    """Of several pixels: with one factor for both halves of a word, sums of them would coincide."""
    size = 64
    rows, columns = torch.meshgrid(
        torch.arange(size - height + 1), torch.arange(size), indexing="ij"
    )
    images = torch.zeros(rows.numel(), 1, size, size, dtype=torch.uint8)
    n = torch.arange(len(images))
    for row in range(height):
        images[n, 0, rows.flatten() + row, columns.flatten()] = value
    if dtype == torch.float32:
        images = images.float() / 255
    assert RoutingReplay(3).hash(images).unique().numel() == len(images)


def test_noise_is_standard_normal_and_independent() -> None:
    replay = RoutingReplay(5)
    noise = replay.noise(torch.arange(20_000))
    # Standard errors: 0.007 for a mean, 0.005 for a standard deviation, 0.007 for a correlation.
    assert noise.mean(dim=0).abs().max() < 0.035
    assert (noise.std(dim=0) - 1).abs().max() < 0.025
    assert (noise.T.corrcoef() - torch.eye(5)).abs().max() < 0.035
    # 31.7 % of a normal distribution lie outside one standard deviation, 0.27 % outside three.
    assert (noise.abs() > 1).float().mean().item() == pytest.approx(0.3173, abs=0.006)
    assert (noise.abs() > 3).float().mean().item() == pytest.approx(0.0027, abs=0.0008)


def test_noise_follows_from_content_and_key() -> None:
    replay = RoutingReplay(5)
    hashes = torch.tensor([7, 8, 7])
    noise = replay.noise(hashes)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(replay.noise(hashes), noise)
    replay.next_rollout()
    assert not torch.equal(replay.noise(hashes), noise)


def test_keys_differ_between_seeds_and_survive_a_state_dict() -> None:
    torch.manual_seed(0)
    first = RoutingReplay(2)
    torch.manual_seed(1)
    second = RoutingReplay(2)
    assert first.key != second.key
    second.load_state_dict(first.state_dict())
    assert first.key == second.key


def test_activated_encoders_are_found_again() -> None:
    replay = RoutingReplay(5)
    assert replay.recall(torch.tensor([1])) is None
    replay.remember(torch.tensor([30, -10]), torch.tensor([[0, 1], [2, 3]]))
    replay.remember(torch.tensor([20]), torch.tensor([[1, 4]]))
    found = replay.recall(torch.tensor([20, 99, -10, -99, 30]))
    assert found is not None
    assert found.tolist() == [[1, 4], [-1, -1], [2, 3], [-1, -1], [0, 1]]
    replay.next_rollout()
    assert replay.recall(torch.tensor([20])) is None


def test_cached_features_are_found_by_hash() -> None:
    cache = FeatureCache()
    assert cache.find(0, torch.tensor([1])) is None
    cache.store(0, torch.tensor([5, 3]), torch.tensor([[5.0], [3.0]]))
    cache.store(0, torch.tensor([-4]), torch.tensor([[-4.0]]))
    cache.store(1, torch.tensor([7]), torch.tensor([[70.0]]))
    found = cache.find(0, torch.tensor([3, -4, 5, 3]))
    assert found is not None
    assert found.flatten().tolist() == [3, -4, 5, 3]
    assert cache.find(0, torch.tensor([3, 7])) is None, "only if all of them are known"
    cache.store(0, torch.tensor([7]), torch.tensor([[7.0]]))
    assert cache.find(0, torch.tensor([7])).tolist() == [[7.0]]
    cache.clear()
    assert cache.find(0, torch.tensor([3])) is None
