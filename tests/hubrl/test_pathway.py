"""The core: routed equals dense, only activated rows run and learn, and the method's formulas."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_hubs import nature_spec, write_hub

from hubrl.aggregation import AGGREGATIONS, Sum
from hubrl.encoders import Encoder
from hubrl.generators import PathwayGenerator
from hubrl.pathway import HubPathway, rows_of_encoders
from hubrl.specs import HubSpec, load_hub

IMAGES = (4, 36, 36)


def images_of(n_rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n_rows, *IMAGES), dtype=torch.uint8, generator=generator)


def undecided(generator: PathwayGenerator) -> PathwayGenerator:
    """With scores of zero and noise of scale ln 2, whatever the image."""
    for parameter in (*generator.scores.parameters(), *generator.noise_scale.parameters()):
        torch.nn.init.zeros_(parameter)
    return generator


def noisy(pathway: HubPathway) -> HubPathway:
    """With scores and noise that differ much between images."""
    torch.manual_seed(1)
    for head in (pathway.generator.scores, pathway.generator.noise_scale):
        torch.nn.init.normal_(head.weight, std=0.3)
    return pathway


def dense(pathway: HubPathway, images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """All encoders on all rows, weighted: what dispatch must equal."""
    if isinstance(pathway.aggregator, Sum):
        weighted = [
            w[:, None] * f(images) for w, f in zip(weights.T, pathway.encoders, strict=True)
        ]
        return pathway.aggregator.linear(sum(weighted)).relu()
    total = pathway.aggregator.bias.expand(len(images), -1)
    for i, encoder in enumerate(pathway.encoders):
        total = total + weights[:, i, None] * pathway.aggregator.blocks[i](encoder(images))
    return total.relu()


def assert_equal_to_1e_6(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hubs") / "hub5"
    return write_hub(folder, [nature_spec(name) for name in "abcde"])


@st.composite
def activations(draw: st.DrawFn) -> tuple[int, set[str]]:
    """top_k of five encoders, and fewer than that which are always active."""
    top_k = draw(st.integers(1, 5))
    return top_k, draw(st.sets(st.sampled_from("abcde"), max_size=top_k - 1))


@given(
    n_rows=st.integers(1, 12),
    activation=activations(),
    aggregation=st.sampled_from(sorted(AGGREGATIONS)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_routed_equals_dense_with_zeroed_weights(
    hub: Path, n_rows: int, activation: tuple[int, set[str]], aggregation: str, seed: int
) -> None:
    top_k, always_active = activation
    pathway = noisy(HubPathway(hub, top_k, always_active=always_active, aggregation=aggregation))
    images, noise = images_of(n_rows, seed), torch.randn(n_rows, 5)
    output = pathway.route(images, noise)
    assert output.activated.shape == (n_rows, top_k)
    for name in always_active:
        assert (output.activated == "abcde".index(name)).any(dim=1).all()
    is_activated = torch.zeros(n_rows, 5).scatter(1, output.activated, 1.0)
    assert torch.equal(output.weights > 0, is_activated > 0)
    assert_equal_to_1e_6(output.features, dense(pathway, images, output.weights))


@pytest.mark.parametrize("always_active", [(), "c"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_routed_and_dense_gradients_are_equal(
    hub: Path, aggregation: str, always_active: str
) -> None:
    pathway = noisy(HubPathway(hub, 2, aggregation=aggregation, always_active=always_active))
    images, noise = images_of(16), torch.randn(16, 5)
    parameters = dict(pathway.named_parameters())

    def gradients(features: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad(
            (features**2).mean(), list(parameters.values()), materialize_grads=True
        )

    output = pathway.route(images, noise)
    routed = gradients(output.features)
    expected = gradients(dense(pathway, images, pathway.route(images, noise).weights))
    for name, found, wanted in zip(parameters, routed, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_images_give_no_features(hub: Path, aggregation: str) -> None:
    assert HubPathway(hub, aggregation=aggregation)(images_of(0)).features.shape == (0, 512)


def test_an_aggregation_that_does_not_exist_or_fit(hub: Path, mixed_hub: Path) -> None:
    message = r"aggregation is 'summ' \(closest: 'sum'\), allowed: auto, concat, sum"
    with pytest.raises(ValueError, match=message):
        HubPathway(hub, aggregation="summ")
    with pytest.raises(
        ValueError, match="aggregation is 'sum', but the encoders have features_dim"
    ):
        HubPathway(mixed_hub, image_shape=(4, 44, 44), aggregation="sum")


def test_uniform_weights(hub: Path) -> None:
    pathway = HubPathway(hub, 5, generator="uniform")
    images = images_of(6)
    output = pathway(images)  # noise changes nothing
    assert torch.equal(output.weights, torch.full((6, 5), 0.2))
    assert_equal_to_1e_6(output.features, dense(pathway, images, torch.full((6, 5), 0.2)))
    assert output.exploration_loss.item() == pytest.approx(-math.log(5))
    assert not list(pathway.generator.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"generator": "unifrom"},
            r"'unifrom' \(closest: 'uniform'\), allowed: small, even, resnet10",
        ),
        ({"generator": "uniform"}, "top_k must be 5 and always_active empty"),
        ({"generator": "uniform", "top_k": 5, "always_active": "a"}, "always_active empty"),
    ],
)
def test_a_generator_that_does_not_exist_or_fit(
    hub: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HubPathway(hub, **options)


def test_encoders_that_differ_in_everything(mixed_hub: Path) -> None:
    pathway = noisy(HubPathway(mixed_hub, 2, image_shape=(4, 44, 44)))
    images = torch.randint(0, 256, (9, 4, 44, 44), dtype=torch.uint8)
    output = pathway(images)
    assert output.features.shape == (9, 512)
    assert_equal_to_1e_6(output.features, dense(pathway, images, output.weights))


def test_an_encoder_runs_on_just_the_rows_that_activate_it(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}
    original = Encoder.forward

    def forward(self: Encoder, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert self.spec.name not in seen
        seen[self.spec.name] = images
        return original(self, images, dtype)

    monkeypatch.setattr(Encoder, "forward", forward)
    pathway = HubPathway(hub, top_k=2)
    activated = torch.tensor([[0, 1], [0, 3], [1, 3], [0, 1]] * 7)
    images = images_of(28)
    output = pathway.route(images, None, activated)
    assert set(seen) == {"a", "b", "d"}
    for name, images_seen in seen.items():
        rows = (activated == "abcde".index(name)).any(dim=1)
        assert torch.equal(images_seen, images[rows])
    output.features.sum().backward()
    for encoder in pathway.encoders:
        has_learned = all(parameter.grad is not None for parameter in encoder.parameters())
        assert has_learned == (encoder.spec.name in seen)


def test_weights_by_hand(hub: Path) -> None:
    pathway = HubPathway(hub, top_k=2)
    undecided(pathway.generator)
    with torch.no_grad():
        pathway.generator.scores.bias.copy_(torch.tensor([0.5, 0.1, 0.2, 0.1, 0.1]).log())
    output = pathway.route(images_of(3), None)
    assert output.activated.tolist() == [[0, 2]] * 3
    # softmax gives the probabilities back; renormalised over the top 2: 0.5 / 0.7 and 0.2 / 0.7
    expected = torch.tensor([0.714286, 0, 0.285714, 0, 0]).expand(3, 5)
    torch.testing.assert_close(output.weights, expected, atol=1e-6, rtol=0)
    # 0.5 ln 0.5 + 0.2 ln 0.2 + 3 * 0.1 ln 0.1 = -0.346574 - 0.321888 - 0.690776
    assert output.exploration_loss.item() == pytest.approx(-1.359237, abs=1e-5)


def test_weights_beside_an_always_active_encoder_by_hand(hub: Path) -> None:
    pathway = HubPathway(hub, top_k=2, always_active="b")
    undecided(pathway.generator)
    with torch.no_grad():  # of a, c, d and e
        pathway.generator.scores.bias.copy_(torch.tensor([0.2, 0.5, 0.2, 0.1]).log())
    output = pathway.route(images_of(3), None)
    assert output.activated.tolist() == [[1, 2]] * 3
    weights = torch.tensor([0, 1, 0.05, 0, 0]).expand(3, 5)  # a tenth of c's probability
    torch.testing.assert_close(output.weights, weights, atol=1e-6, rtol=0)
    probabilities = torch.tensor([0.2, 0, 0.5, 0.2, 0.1]).expand(3, 5)
    torch.testing.assert_close(output.probabilities, probabilities, atol=1e-6, rtol=0)
    # 2 * 0.2 ln 0.2 + 0.5 ln 0.5 + 0.1 ln 0.1 = -0.643775 - 0.346574 - 0.230259
    assert output.exploration_loss.item() == pytest.approx(-1.220607, abs=1e-5)

    both = HubPathway(hub, top_k=3, always_active=["b"])
    undecided(both.generator)
    with torch.no_grad():
        both.generator.scores.bias.copy_(torch.tensor([0.3, 0.5, 0.1, 0.1]).log())
    # Two are chosen: 0.1 * 0.3 / 0.8 and 0.1 * 0.5 / 0.8
    weights = torch.tensor([0.0375, 1, 0.0625, 0, 0]).expand(3, 5)
    torch.testing.assert_close(both.route(images_of(3), None).weights, weights, atol=1e-6, rtol=0)


def test_the_card_says_what_is_always_active_where_one_is_left_to_choose(hub: Path) -> None:
    spec = dataclasses.replace(load_hub(hub), always_active=("d", "a"))
    assert HubPathway(spec, top_k=3).always_active == ("a", "d")
    assert HubPathway(spec, top_k=2).always_active == ()
    assert HubPathway(spec, top_k=3, always_active=()).always_active == ()
    assert HubPathway(spec, top_k=3, always_active="c").always_active == ("c",)


def test_first_layers_that_stay_as_they_are(hub: Path) -> None:
    """All else has the gradients that it has where they learn."""
    every, later = HubPathway(hub, top_k=3), HubPathway(hub, top_k=3, freeze_layers=1)
    later.load_state_dict(every.state_dict())
    for pathway in (every, later):
        pathway.route(images_of(20), None).features.square().sum().backward()
    for (name, one), other in zip(every.named_parameters(), later.parameters(), strict=True):
        if ".cnn.0." in name:
            assert not other.requires_grad
        else:
            torch.testing.assert_close(other.grad, one.grad)
    assert not any(encoder.is_frozen for encoder in later.encoders)


@pytest.mark.parametrize("freeze_layers", [3, -1])
def test_layers_that_cant_stay_as_they_are(hub: Path, freeze_layers: int) -> None:
    message = rf"freeze_layers is {freeze_layers}, allowed: 0\.\.2 for encoder 'a', .* in freeze"
    with pytest.raises(ValueError, match=message):
        HubPathway(hub, freeze_layers=freeze_layers)


def test_a_single_encoder_left_to_choose_needs_no_generator(hub: Path) -> None:
    spec = load_hub(hub)
    two = dataclasses.replace(spec, encoders=spec.encoders[:2], always_active=("a",))
    pathway = HubPathway(two)
    output = pathway(images_of(3))
    torch.testing.assert_close(output.weights, torch.tensor([[1.0, 0.1]]).expand(3, 2))
    output.features.sum().backward()
    assert pathway.generator.scores.weight.grad is None


def test_weights_of_other_always_active_encoders_are_refused(hub: Path) -> None:
    state = HubPathway(hub, always_active="b").state_dict()
    HubPathway(hub, always_active="b").load_state_dict(state)
    message = r"with always_active \['b'\], but this pathway has \['c'\]: build it with theirs"
    with pytest.raises(ValueError, match=message):
        HubPathway(hub, always_active="c").load_state_dict(state)


def test_always_active_encoders_out_of_range(hub: Path) -> None:
    message = "always_active is a, b, but top_k is 2: at least one encoder must be left to choose"
    with pytest.raises(ValueError, match=message):
        HubPathway(hub, top_k=2, always_active=["a", "b"])
    with pytest.raises(ValueError, match="hub 'hub5' has no encoder 'f'"):
        HubPathway(hub, always_active="f")


def test_one_activated_encoder_keeps_its_probability_as_weight(hub: Path) -> None:
    pathway = HubPathway(hub, top_k=1)
    undecided(pathway.generator)
    output = pathway.route(images_of(2), None)
    # Renormalised it would be 1, and the task could not teach the generator.
    torch.testing.assert_close(output.weights.sum(dim=1), torch.full((2,), 0.2))
    output.features.sum().backward()
    assert pathway.generator.scores.weight.grad.abs().sum() > 0


@given(rows=st.lists(st.sets(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=20))
def test_rows_of_encoders(rows: list[set[int]]) -> None:
    activated = torch.tensor([sorted(row) for row in rows])
    for encoder, found in enumerate(rows_of_encoders(activated, 6)):
        assert found.tolist() == [i for i, row in enumerate(rows) if encoder in row]


def test_given_activation_is_kept_and_minus_one_is_chosen(hub: Path) -> None:
    pathway = noisy(HubPathway(hub, top_k=2))
    images = images_of(2)
    free = pathway.route(images, None).activated
    given_rows = torch.tensor([[3, 4], [-1, -1]])
    activated = pathway.route(images, None, given_rows).activated
    assert activated[0].tolist() == [3, 4]
    assert activated[1].tolist() == free[1].tolist()


def test_noise_in_training_mode_only(hub: Path) -> None:
    pathway = HubPathway(hub, top_k=2)
    undecided(pathway.generator)
    images = images_of(64)
    assert len({tuple(row) for row in pathway.train()(images).activated.tolist()}) > 5
    assert len({tuple(row) for row in pathway.eval()(images).activated.tolist()}) == 1


def test_one_encoder_needs_no_generator(hub: Path) -> None:
    output = HubPathway(f"{hub}:c", top_k=1)(images_of(3))
    assert output.weights.tolist() == [[1.0]] * 3
    assert output.exploration_loss.item() == 0.0


def test_frozen_encoders_are_held_once_and_are_no_parameters(hub: Path) -> None:
    first, second = HubPathway(hub, freeze="all"), HubPathway(hub, freeze="all")
    assert first.encoders[2] is second.encoders[2] is copy.deepcopy(first).encoders[2]
    names = [name for name, _ in first.named_parameters()]
    assert not any(name.startswith("encoders") for name in names)
    assert not any(key.startswith("encoders") for key in first.state_dict())
    assert all(not parameter.requires_grad for parameter in first.encoders[0].parameters())


def test_some_encoders_frozen(hub: Path) -> None:
    pathway = HubPathway(hub, freeze=["b", "d"])
    assert list(pathway.encoders.owned) == ["a", "c", "e"]
    assert [encoder.spec.name for encoder in pathway.encoders] == list("abcde")


def test_frozen_random_encoders_belong_to_the_model(hub: Path) -> None:
    # No file says what they are, so a checkpoint has to.
    pathway = HubPathway(hub, freeze="all", pretrained=False)
    assert "encoders.owned.a.trunk.cnn.0.weight" in pathway.state_dict()
    assert not any(parameter.requires_grad for parameter in pathway.encoders.parameters())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_bfloat16_is_close_and_the_generator_stays_float32(hub: Path, aggregation: str) -> None:
    exact, fast = (
        HubPathway(hub, freeze="all", aggregation=aggregation, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    fast.load_state_dict(exact.state_dict())
    images = images_of(32)
    expected, found = exact.route(images, None), fast.route(images, None)
    assert found.features.dtype == torch.float32
    assert torch.equal(found.probabilities, expected.probabilities)
    difference = (found.features - expected.features).norm() / expected.features.norm()
    assert 0 < difference < 0.02
    found.features.square().sum().backward()
    expected.features.square().sum().backward()
    for fast_head, exact_head in zip(
        fast.generator.parameters(), exact.generator.parameters(), strict=True
    ):
        if exact_head.grad is not None:
            assert (fast_head.grad - exact_head.grad).norm() < 0.03 * exact_head.grad.norm()


def test_top_k_by_itself(hub: Path) -> None:
    assert HubPathway(hub).top_k == 2
    assert HubPathway(load_hub(hub).only("a")).top_k == 1


@pytest.mark.parametrize("top_k", [0, 6])
def test_top_k_outside_its_range(hub: Path, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}, allowed: 1..5, the number of enc"):
        HubPathway(hub, top_k)


def test_what_is_chosen_may_be_frozen(hub: Path) -> None:
    pathway = HubPathway(hub, always_active=["b"], freeze="chosen")
    assert [encoder.is_frozen for encoder in pathway.encoders] == [True, False, True, True, True]
    with pytest.raises(
        ValueError, match=r"freeze is 'chosen', but no encoder of hub 'hub5' is alw"
    ):
        HubPathway(hub, always_active=[], freeze="chosen")
    with pytest.raises(
        ValueError, match=r"'chosen', but .* name one in always_active, or give fre"
    ):
        HubPathway(f"{hub}:a", freeze="chosen")


def test_unknown_frozen_encoder_and_precision(hub: Path) -> None:
    with pytest.raises(ValueError, match="hub 'hub5' has no encoder 'f'"):
        HubPathway(hub, freeze="f")
    with pytest.raises(ValueError, match="precision is 'half', allowed: auto, float32, bfloat16"):
        HubPathway(hub, precision="half")


def test_state_dict_restores_the_features(hub: Path) -> None:
    torch.manual_seed(0)
    first = noisy(HubPathway(hub, pretrained=False))
    second = HubPathway(load_hub(hub), pretrained=False)
    second.load_state_dict(first.state_dict())
    images = images_of(4)
    assert torch.equal(first.route(images, None).features, second.route(images, None).features)


def test_encoder_changes_by_hand(hub5: Path) -> None:
    pathway = HubPathway(load_hub(hub5), freeze=["b"])
    with torch.no_grad():
        for weight in pathway.encoders[0].parameters():
            weight.mul_(1.25)
        pathway.encoders[2].trunk.cnn[0].bias[0].add_(1e-7)
    a, b, c, *rest = pathway.encoders.changes()
    assert a[:3] == ("a", False, False)
    assert a.distance == pytest.approx(0.25, rel=1e-5)
    assert b == ("b", True, True, 0.0)
    assert not c.is_same
    assert 0 < c.distance < 1e-6
    assert all(change.is_same for change in rest)
    random = HubPathway(load_hub(hub5), pretrained=False)
    assert all(change.distance is None for change in random.encoders.changes())


def test_weights_are_refused_by_other_encoders_than_they_were_trained_with(hub5: Path) -> None:
    hub = load_hub(hub5)
    frozen = HubPathway(hub, freeze=["a"])
    state = frozen.state_dict()
    HubPathway(hub, freeze=["a"]).load_state_dict(state)

    def refuses(other: HubSpec, message: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=message):
            HubPathway(other, **{"freeze": ["a"], **arguments}).load_state_dict(state)

    backwards = dataclasses.replace(hub, encoders=hub.encoders[::-1])
    refuses(
        backwards, "trained with the encoders a, b, c, d, e in this order, .* has e, d, c, b, a"
    )
    refuses(dataclasses.replace(hub, encoders=hub.encoders[:4]), "but the hub has a, b, c, d: give")
    first, *others = hub.encoders
    changed = dataclasses.replace(first, mean=(0.25,))
    refuses(
        dataclasses.replace(hub, encoders=(changed, *others)),
        r"trained with mean \[0.0\] of encoder 'a', but it has \[0.25\] now: put its card and",
    )
    another = dataclasses.replace(first, weights=others[0].weights, sha256=others[0].sha256)
    refuses(
        dataclasses.replace(hub, encoders=(another, *others)),
        f"trained with sha256 {first.sha256} of encoder 'a', but it has {others[0].sha256} now",
    )
    refuses(
        hub, r"trained with always_active \[\], but this pathway has \['b'\]", always_active="b"
    )


def test_weights_of_older_versions_say_which_encoders_were_always_active(hub5: Path) -> None:
    pathway = HubPathway(load_hub(hub5), always_active="b")
    state = pathway.state_dict()
    state["_extra_state"] = torch.tensor([False, True, False, False, False])
    pathway.load_state_dict(state)
    state["_extra_state"] = torch.tensor([True, False, False, False, False])
    with pytest.raises(ValueError, match=r"trained with always_active \['a'\], .* has \['b'\]"):
        pathway.load_state_dict(state)


@pytest.mark.parametrize(
    "content", ["[[], []]", '[[], {"a": null}]', "[1]", "{}", "text", "[" * 10_000, "[2, {}]"]
)
def test_a_damaged_record_of_the_encoders(content: str, hub5: Path) -> None:
    pathway = HubPathway(load_hub(hub5))
    damaged = torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="what these weights say of their encoders is damaged"):
        pathway.load_state_dict({**pathway.state_dict(), "_extra_state": damaged})
    facts = json.loads(bytes(pathway.get_extra_state().tolist()))[1]
    facts["a"]["colour"] = "red"  # of a version to come
    newer = torch.frombuffer(bytearray(json.dumps([[], facts]).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"with colour red of encoder 'a', but it has None now"):
        pathway.load_state_dict({**pathway.state_dict(), "_extra_state": newer})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 2.0}, r"top_k is 2.0, allowed: 1..5"),
        ({"top_k": True}, r"top_k is True, allowed: 1..5"),
        ({"top_k": "2"}, r"top_k is '2', allowed: 1..5, the number of encoders.*, or 'auto'"),
        ({"freeze": True}, r"freeze is True, allowed: a list of encoders' names, \[\] for"),
        ({"always_active": None}, r"always_active is None, allowed: a list of encoders' names"),
    ],
)
def test_values_of_another_type(arguments: dict[str, Any], message: str, hub5: Path) -> None:
    with pytest.raises(ValueError, match=message):
        HubPathway(hub5, **arguments)
