"""What a CUDA graph holds equals what is dispatched: on a GPU, and on a CPU by a stand-in."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from sb3_agents import (
    AGENTS,
    ON_POLICY,
    FirstMinibatch,
    extractors_of,
    learning_extractors,
    make_agent,
    spread_scores,
)
from torch import Tensor, nn

import hubrl
from hubrl.cuda_graphs import Recorded

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU a stand-in has what is peculiar to a recording."""
    if request.param == "cpu":
        monkeypatch.setattr(hubrl.HubFeaturesExtractor, "_fits_a_graph", lambda self, images: True)
        monkeypatch.setattr(Recorded, "_record", lambda self, module, inputs: self._function)
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return str(request.param)


def stand_in(module: nn.Module, inputs: tuple[Tensor, ...], allow_unused_input: bool) -> None:
    """
    As torch.cuda's: the module runs three times first, and there is one place for what it gives,
    for what backward needs, and for gradients.
    """
    function = module.forward
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    fixed_gradients = [torch.zeros_like(weight) for weight in weights]
    addresses = [weight.data_ptr() for weight in weights]
    place: dict[str, tuple[Tensor, ...]] = {}

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Tensor) -> tuple[Tensor, ...]:
            assert addresses == [weight.data_ptr() for weight in weights], "a GPU reads there"
            with torch.enable_grad():
                place["outputs"] = module._function(owner(), *arguments[: len(inputs)])
            fixed = place.setdefault("fixed", tuple(o.detach().clone() for o in place["outputs"]))
            for output, new in zip(fixed, place["outputs"], strict=True):
                output.copy_(new.detach())
            return tuple(output.detach() for output in fixed)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            pairs = [p for p in zip(place["outputs"], gradients, strict=True) if p[0].requires_grad]
            outputs, gradients = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, weights, gradients, allow_unused=allow_unused_input, retain_graph=True
            )
            for fixed, new in zip(fixed_gradients, found, strict=True):
                fixed.copy_(torch.zeros_like(fixed) if new is None else new)
            pairs = zip(fixed_gradients, found, strict=True)
            ours = [None if new is None else fixed.detach() for fixed, new in pairs]
            return *[None] * len(inputs), *ours

    for _ in range(3):
        function(*inputs)
    owner = weakref.ref(module.module)
    module.forward = lambda *arguments: Replayed.apply(*arguments, *weights)


def extractor_pair(
    hub: Path, device: str, **arguments: object
) -> tuple[hubrl.HubFeaturesExtractor, hubrl.HubFeaturesExtractor]:
    """An extractor, and a copy that dispatches."""
    model = make_agent("ppo", hub, device=device, **arguments)
    spread_scores(model)
    (extractor,) = extractors_of(model)
    other = copy.deepcopy(extractor)
    other._fits_a_graph = lambda images: False  # type: ignore[method-assign]
    return extractor, other


def images_of(n: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 4, 36, 36), dtype=torch.uint8, generator=generator).to(device)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """By the largest number: gradients are sums of large ones."""
    largest = float(expected.detach().double().abs().max())
    torch.testing.assert_close(found, expected, atol=1e-5 * max(largest, 1.0), rtol=1e-4)


def lesson(extractor: hubrl.HubFeaturesExtractor, images: Tensor) -> list[Tensor]:
    """Features, exploration loss and all gradients of a minibatch."""
    features, loss = extractor._learn_unpadded(images)
    gradients = torch.autograd.grad(
        features.square().sum() + 3 * loss,
        [weight for weight in extractor.parameters() if weight.requires_grad],
        materialize_grads=True,
    )
    return [features.detach().clone(), loss.detach().clone(), *(g.clone() for g in gradients)]


ARGUMENTS = [{}, {"aggregation": "concat", "always_active": "c"}, {"freeze": "all"}, {"top_k": 5}]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_rollouts_and_updates_are_those_of_dispatch(
    arguments: dict[str, object], hub5: Path, device: str
) -> None:
    both = extractor_pair(hub5, device, **arguments)
    for round_ in range(3):  # recorded in the first, replayed from then on
        for extractor in both:
            extractor.train(False)
        for seed in range(3):
            with torch.no_grad():
                found, expected = (e._collect(images_of(8, device, seed)) for e in both)
            assert_close(found, expected)
            images = images_of(8, device, seed + round_)
            with torch.no_grad():
                found, expected = (extractor(images) for extractor in both)
            assert_close(found, expected)
        for extractor in both:
            extractor.train(True)
        for seed in (0, 1, 7):  # the last was never collected
            images = torch.cat([images_of(8, device, seed), images_of(8, device, 2)])
            for found, expected in zip(*(lesson(e, images) for e in both), strict=True):
                assert_close(found, expected)
        statistics, expected = (extractor.statistics() for extractor in both)
        assert statistics == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for buffer, other in zip(both[0].buffers(), both[1].buffers(), strict=True):
            assert_close(buffer, other)
        with torch.no_grad():
            for weight, other in zip(both[0].parameters(), both[1].parameters(), strict=True):
                change = torch.randn_like(weight)
                weight += 0.01 * change
                other += 0.01 * change


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_two_passes_before_a_backward_pass_keep_their_own_numbers(hub5: Path, device: str) -> None:
    extractor, other = extractor_pair(hub5, device)
    lesson(extractor, images_of(8, device)), lesson(other, images_of(8, device))
    gradients = []
    for each in (extractor, other):
        first, _ = each._learn_unpadded(images_of(8, device, seed=1))
        second, _ = each._learn_unpadded(images_of(8, device, seed=2))
        loss = first.square().sum() + 2 * second.square().sum()
        weights = [weight for weight in each.parameters() if weight.requires_grad]
        gradients.append(torch.autograd.grad(loss, weights, materialize_grads=True))
        third = lesson(each, images_of(8, device, seed=3))
        gradients.append(third)
    for found, expected in zip(gradients[0], gradients[2], strict=True):
        assert_close(found, expected)
    for found, expected in zip(gradients[1], gradients[3], strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_a_recording_is_lent_until_its_backward_pass(device: str) -> None:
    layer, recorded, rows = recorded_layer(device)
    (first,), (second,) = recorded(layer, rows), recorded(layer, rows)
    assert (is_replayed(first), is_replayed(second)) == (True, False)
    first.sum().backward()
    (third,) = recorded(layer, rows)
    assert is_replayed(third), "the first, still referred to, was used up"
    kept, before = third.detach(), third.detach().clone()
    del third
    assert is_replayed(recorded(layer, 2 * rows)[0]), "the third, without backward pass, is gone"
    assert torch.equal(kept, before)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("is_kept", [True, False])
def test_gradients_add_up(is_kept: bool, device: str) -> None:
    layer, recorded, rows = recorded_layer(device)
    if is_kept:  # as by zero_grad(set_to_none=False)
        recorded(layer, rows)[0].sum().backward()
        layer.zero_grad(set_to_none=False)
    for scale in (1.0, 10.0):
        recorded(layer, scale * rows)[0].sum().backward()
    assert layer.weight.grad is not None
    assert_close(layer.weight.grad, torch.full((2, 2), 33.0, device=device))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_a_second_backward_pass_is_refused(device: str) -> None:
    layer, recorded, rows = recorded_layer(device)
    (output,) = recorded(layer, rows)
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"already differentiated.*call backward\(\) once"):
        output.sum().backward()


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_a_weight_that_moved_is_found(device: str) -> None:
    layer, recorded, rows = recorded_layer(device)
    layer.bias.data = torch.full((2,), 7.0, device=device)
    for _ in range(2):
        (output,) = recorded(layer, torch.zeros_like(rows))
        assert output.tolist() == [[7.0, 7.0]] * 3
        output.sum().backward()
    with torch.inference_mode():
        for _ in range(3):
            assert recorded(layer, torch.zeros_like(rows))[0].tolist() == [[7.0, 7.0]] * 3
    with torch.no_grad():
        assert recorded(layer, torch.zeros_like(rows))[0].tolist() == [[7.0, 7.0]] * 3


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_tracers_see_the_function(device: str) -> None:
    layer, recorded, rows = recorded_layer(device)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, rows: Tensor) -> Tensor:
            return recorded(self.layer, rows)[0]

    traced = torch.jit.trace(Network(), rows)
    assert_close(traced(2 * rows), layer(2 * rows))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_an_extractor_that_is_dropped_is_gone(hub5: Path, device: str) -> None:
    def used() -> weakref.ref[hubrl.HubFeaturesExtractor]:
        extractor = copy.deepcopy(extractor_pair(hub5, device)[0])  # out of its model
        for _ in range(3):
            lesson(extractor, images_of(8, device))
            with torch.no_grad():
                extractor(images_of(8, device))
        gc.disable()
        return weakref.ref(extractor)

    try:
        assert used()() is None
    finally:
        gc.enable()


def recorded_layer(device: str) -> tuple[nn.Linear, Recorded, Tensor]:
    """A layer, recorded for rows with gradients, and such rows."""
    layer, rows = nn.Linear(2, 2).to(device), torch.ones(3, 2, device=device)
    recorded = Recorded(layer, lambda layer, rows: (layer(rows),))
    assert not is_replayed(recorded(layer, rows)[0]), "most shapes come once"
    assert is_replayed(recorded(layer, rows)[0])
    return layer, recorded, rows


def is_replayed(output: Tensor) -> bool:
    return "EndLease" in type(output.grad_fn).__name__


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *[(name, "cpu") for name in ("ppo", "qrdqn", "crossq")],  # others take long, for little
        *[pytest.param(name, "cuda", marks=NEEDS_GPU) for name in AGENTS],
    ],
    indirect=["device"],
)
def test_every_algorithm_learns(name: str, hub5: Path, device: str) -> None:
    model = make_agent(name, hub5, device=device)
    learning = [weight for e in learning_extractors(model) for weight in e.parameters()]
    before = [weight.detach().clone() for weight in learning]
    first = FirstMinibatch(model) if name in ON_POLICY and name != "a2c" else None
    for _ in range(3):
        if first is not None:
            first.next()
        model.learn(32, reset_num_timesteps=False)
    changes = [not torch.equal(w, old) for w, old in zip(learning, before, strict=True)]
    assert sum(changes) > len(changes) / 2
    assert all(bool(weight.isfinite().all()) for weight in learning)
    if first is not None:
        assert max(first.errors) < 1e-3


@NEEDS_GPU
def test_recordings_are_kept_for_a_few_shapes_and_for_no_copy(hub5: Path) -> None:
    extractor, other = extractor_pair(hub5, "cuda")
    extractor.train(False)
    with torch.no_grad():
        for n in (*range(1, 12), *range(1, 12)):
            assert_close(extractor(images_of(n, "cuda")), other(images_of(n, "cuda")))
    assert len(extractor._recorded_look._recordings) == Recorded.MAX_RECORDINGS
    assert not copy.deepcopy(extractor)._recorded_look._recordings
    extractor.to("cpu").to("cuda")
    with torch.no_grad():
        for _ in range(2):
            assert_close(extractor(images_of(8, "cuda")), other(images_of(8, "cuda")))
    assert len(extractor._recorded_look._recordings) == 1


@NEEDS_GPU
def test_an_encoder_that_thaws_learns(hub5: Path) -> None:
    extractor, _ = extractor_pair(hub5, "cuda")
    encoder = extractor.pathway.encoders[0].requires_grad_(False)
    extractor.train()
    extractor(images_of(16, "cuda")).sum().backward()
    assert encoder.weights[0].grad is None
    encoder.requires_grad_(True)
    extractor(images_of(16, "cuda")).sum().backward()
    assert float(encoder.weights[0].grad.abs().sum()) > 0
