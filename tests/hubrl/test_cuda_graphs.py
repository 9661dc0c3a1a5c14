"""What a CUDA graph holds equals what is dispatched: on a GPU, and on a CPU by a stand-in."""

import copy
import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

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
from hubrl import cuda_graphs
from hubrl.cuda_graphs import Recorded

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU a stand-in has what is peculiar to a recording."""
    if request.param == "cpu":
        monkeypatch.setattr(hubrl.HubFeaturesExtractor, "_fits_a_graph", lambda self, images: True)
        monkeypatch.setattr(cuda_graphs, "_Graph", StandIn)
        monkeypatch.setattr(cuda_graphs, "_warmed_up", lambda work: [work() for _ in range(3)])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return str(request.param)


class StandIn:
    """
    For a graph: what is recorded runs anew, but its outputs have one place, of which a replay
    destroys what was there.

    As on a GPU, no older pass's gradient accumulators may be part of it, and no garbage may be
    collected meanwhile.
    """

    older: ClassVar[set[object]] = set()
    """Gradient accumulators of passes that are still referred to."""
    made: ClassVar[weakref.WeakSet["StandIn"]] = weakref.WeakSet()

    def __init__(self, work: cuda_graphs.Work, stream: object) -> None:
        assert not gc.isenabled()
        outputs = work()
        assert not accumulators(outputs) & self.older
        self.outputs = tuple(output.detach().clone() for output in outputs)
        self.work = work
        self.made.add(self)

    def replay(self) -> None:
        with torch.enable_grad():
            found = self.work()
        for place, new in zip(self.outputs, found, strict=True):
            place.copy_(new.detach())


def accumulators(outputs: Iterable[Tensor]) -> set[object]:
    """The nodes by which a backward pass from here would reach weights."""
    nodes, found = [output.grad_fn for output in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [following for following, _ in node.next_functions]
    return {node for node in found if node.name() == "torch::autograd::AccumulateGrad"}


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
    for round_ in range(2):  # recorded in the first, replayed from then on
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
@pytest.mark.parametrize("sizes", [(8, 8), (8, 5)])
def test_what_is_recorded_beside_an_unfinished_pass_leaves_it_as_it_is(
    sizes: tuple[int, int], hub5: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, gradients = extractor_pair(hub5, device), []
    for each in both:
        for size in sizes[1:]:
            each._learn_unpadded(images_of(size, device))
        losses = [each._learn_unpadded(images_of(size, device, 1))[0].sum() for size in sizes]
        monkeypatch.setattr(StandIn, "older", accumulators(losses))
        losses += [each._learn_unpadded(images_of(size, device, 2))[0].sum() for size in sizes]
        weights = [weight for weight in each.parameters() if weight.requires_grad]
        gradients.append(torch.autograd.grad(sum(losses), weights, materialize_grads=True))
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_an_older_loss_that_is_kept_does_not_spoil_a_recording(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SB3's loops keep their last one."""
    layer, rows = nn.Linear(2, 2).to(device), torch.ones(3, 2, device=device)
    recorded = Recorded(layer, lambda layer, rows: (layer(rows),))
    loss = recorded(layer, rows)[0].sum()
    loss.backward()
    monkeypatch.setattr(StandIn, "older", accumulators([loss]))
    assert len(StandIn.older) == 2
    (output,) = recorded(layer, rows)
    assert is_replayed(output)
    output.sum().backward()
    assert_close(layer.weight.grad, torch.full((2, 2), 6.0, device=device))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_what_cannot_be_recorded_runs_as_it_is(device: str) -> None:
    layer, rows, runs = nn.Linear(2, 2).to(device), torch.ones(3, 2, device=device), []

    def function(layer: nn.Linear, rows: Tensor) -> tuple[Tensor, ...]:
        runs.append(rows)
        if len(runs) == 3:
            raise RuntimeError("no memory left")
        return (layer(rows),)

    recorded = Recorded(layer, function)
    recorded(layer, rows)
    with pytest.warns(UserWarning, match=r"no CUDA graph for inputs of \(3, 2\).*no memory left"):
        assert not is_replayed(recorded(layer, rows)[0])
    assert gc.isenabled()
    before = len(runs)
    assert not is_replayed(recorded(layer, rows)[0])
    assert len(runs) == before + 1, "it isn't tried again"


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_gradients_of_inputs_and_autocast_are_those_of_the_function(device: str) -> None:
    layer, recorded, rows = recorded_layer(device)
    wanted = rows.clone().requires_grad_()
    (output,) = recorded(layer, wanted)
    (found,) = torch.autograd.grad(output.sum(), wanted)
    assert_close(found, layer.weight.detach().sum(dim=0).expand(3, 2))
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert recorded(layer, rows)[0].dtype == torch.bfloat16
    assert is_replayed(recorded(layer, rows)[0])


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_gradients_stay_as_they_are_when_more_is_replayed(device: str) -> None:
    layer, recorded, rows = recorded_layer(device)
    recorded(layer, rows)[0].sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    (other,) = torch.autograd.grad(recorded(layer, 5 * rows)[0].sum(), layer.weight)
    recorded(layer, 7 * rows)[0].sum().backward(inputs=[layer.bias])
    assert_close(gradient, torch.full((2, 2), 3.0, device=device))
    assert_close(other, torch.full((2, 2), 15.0, device=device))


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
    def used() -> list[weakref.ref[nn.Module] | weakref.ref[Tensor]]:
        extractor = copy.deepcopy(extractor_pair(hub5, device)[0])  # out of its model
        for _ in range(3):
            lesson(extractor, images_of(8, device))
            with torch.no_grad():
                extractor(images_of(8, device))
        gc.disable()
        for graph in StandIn.made:  # a graph knows no module
            del graph.work
        return [weakref.ref(extractor), *map(weakref.ref, extractor.parameters())]

    try:
        assert not any(reference() for reference in used())
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
    return "_Pass" in type(output.grad_fn).__name__


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
    n_steps = 32 if name in ON_POLICY else 12
    for _ in range(3):
        if first is not None:
            first.next()
        model.learn(n_steps, reset_num_timesteps=False)
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


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_an_encoder_that_thaws_learns(hub5: Path, device: str) -> None:
    extractor, _ = extractor_pair(hub5, device)
    encoder = extractor.pathway.encoders[0].requires_grad_(False)
    extractor.train()
    for does_learn in (False, True, False):
        encoder.requires_grad_(does_learn)
        for _ in range(3):
            extractor.zero_grad()
            extractor(images_of(16, device)).sum().backward()
        gradients = [weight.grad for weight in encoder.weights]
        assert [gradient is not None for gradient in gradients] == [does_learn] * len(gradients)
        if does_learn:
            assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)
    assert len(extractor._recorded_lesson._recordings) == 2
