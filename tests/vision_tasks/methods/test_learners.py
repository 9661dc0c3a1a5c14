"""Competitors that train one model or weigh many, against explicit computations."""

from __future__ import annotations

import pytest
import torch
from small_images import SIZE, landmark_data, quadrant_data, quadrant_images, write_rgb_hub
from torch import Tensor
from torch.nn import functional as F

from hubrl.specs import HubSpec, load_hub
from vision_tasks.methods import Method, Settings, build_method
from vision_tasks.methods.logme import logme_scores
from vision_tasks.methods.method import Batches
from vision_tasks.tasks import Classification, Landmarks

SETTINGS = Settings(0, SIZE, exploitation_coef=0.7)
IMAGES, TARGETS = quadrant_images(12, seed=5)
FACES = Landmarks(3, ((1,), (2,)))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> HubSpec:
    return load_hub(write_rgb_hub(tmp_path_factory.mktemp("hubs") / "rgb"))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES, TARGETS)]


def assert_same_gradients(method: Method, loss: Tensor, expected: Tensor) -> None:
    weights = [weight for weight in method.parameters() if weight.requires_grad]
    ours, theirs = (
        torch.autograd.grad(each, weights, allow_unused=True) for each in (loss, expected)
    )
    assert any(gradient is not None for gradient in ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_uniform_is_the_mean_and_each_heads_loss(hub: HubSpec) -> None:
    method = build_method("uniform", hub, Classification(4), SETTINGS)
    method.begin("train", batches)
    model = method.model
    outputs = [
        head(encoder(IMAGES))
        for head, encoder in zip(model.heads.values(), model.pathway.encoders, strict=True)
    ]
    blocks = [block.weight for block in model.pathway.aggregator.blocks]
    mean_BO = sum(o @ block.T for o, block in zip(outputs, blocks, strict=True)) / 3
    each = sum(F.cross_entropy(o, TARGETS) for o in outputs)
    expected = F.cross_entropy(mean_BO + model.pathway.aggregator.bias, TARGETS) + 0.7 * each
    losses = method.loss(IMAGES, TARGETS)
    torch.testing.assert_close(losses.total, expected)
    assert_same_gradients(method, losses.total, expected)


def test_attention_is_scaled_dot_products(hub: HubSpec) -> None:
    method = build_method("attention", hub, Classification(4), SETTINGS)
    features = [encoder(IMAGES).detach() for encoder in method.encoders]
    torch.testing.assert_close(method.weights(features), torch.full((12, 3), 1 / 3))
    torch.manual_seed(0)
    for layer in method.keys:
        torch.nn.init.normal_(layer.weight)
    normal = [
        (f - f.mean(1, True)) / (f.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        for f in features
    ]
    query_BA = sum(layer(f) for layer, f in zip(method.queries, normal, strict=True)) / 3
    scores = [
        (query_BA * layer(f)).sum(1) / 8 for layer, f in zip(method.keys, normal, strict=True)
    ]
    weights_BE = torch.stack(scores, dim=1).softmax(dim=1)
    torch.testing.assert_close(method.weights(features), weights_BE)
    outputs = [head(f) for head, f in zip(method.heads, features, strict=True)]
    blocks = [block.weight for block in method.aggregator.blocks]
    mixed_BO = method.aggregator.bias + sum(
        (weights_BE[:, i, None] * o) @ blocks[i].T for i, o in enumerate(outputs)
    )
    loss = method.loss(IMAGES, TARGETS).total
    assert_same_gradients(method, loss, F.cross_entropy(mixed_BO, TARGETS))
    assert not any("encoders" in key for key in method.state_dict())


@pytest.mark.parametrize("task", [Classification(4), FACES], ids=["classes", "points"])
def test_a_student_imitates_the_teachers_common_output(
    hub: HubSpec, task: Classification | Landmarks
) -> None:
    targets = TARGETS if isinstance(task, Classification) else landmark_data(12).train.tensors[1]
    method = build_method("distill", hub, task, SETTINGS)
    method.begin("teachers", lambda: [(IMAGES, targets)])
    alone = build_method("ensemble-i", hub, task, SETTINGS)
    losses = (each.loss(IMAGES, targets).total for each in (method, alone))
    assert torch.equal(*losses)
    with torch.no_grad():
        method.models["a"].head.weight += 0.3  # the teachers have learned
    teachers_BO = task.combine(torch.stack([model(IMAGES) for model in method.models.values()]))
    method.begin("student", lambda: [(IMAGES, targets)])
    student_BO = method.student(IMAGES)
    expected = task.losses(student_BO, targets).mean()
    expected = expected + task.imitation_losses(student_BO, teachers_BO).mean()
    losses = method.loss(IMAGES, targets)
    torch.testing.assert_close(losses.total, expected)
    assert_same_gradients(method, losses.total, expected)
    assert torch.equal(method(IMAGES), student_BO)


def test_the_first_by_logme_is_fine_tuned(hub: HubSpec) -> None:
    """Also the student is this one, from its pretrained weights."""
    task = Classification(4)
    method = build_method("logme", hub, task, SETTINGS)
    scores = logme_scores(method.predictors().items(), task, batches)
    best = max(scores, key=lambda name: scores[name])
    method.begin("train", batches)
    single = build_method(f"single:{best}", hub, task, SETTINGS)
    assert torch.equal(method(IMAGES), single(IMAGES))
    assert set(method.results(IMAGES)) == {"", best}
    student = build_method("distill", hub, task, SETTINGS)
    student.begin("student", batches)
    assert torch.equal(student(IMAGES), single(IMAGES))
    assert set(student.results(IMAGES)) == {"", f"student:{best}"}


def test_a_soup_has_the_mean_of_its_members_weights(hub: HubSpec) -> None:
    method = build_method("model-soup", hub, Classification(4), SETTINGS)
    heads = [model.head.weight for model in method.models.values()]
    assert torch.equal(heads[0], heads[1])
    a, _, c = method.models.values()
    expected = build_method("single:a", hub, Classification(4), SETTINGS)
    for mean, one, other in zip(expected.parameters(), a.parameters(), c.parameters(), strict=True):
        mean.data = (one.data + other.data) / 2
    found = method.soup(IMAGES, torch.tensor([True, False, True]))
    torch.testing.assert_close(found, expected(IMAGES).detach())
    assert set(method.results(IMAGES)) == {"", "a", "b", "c"}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_greedy_soup_by_hand(sign: int, hub: HubSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """b is the best; c is tried before a: b + c is worse, b + a as good."""
    task = Classification(4) if sign == 1 else FACES
    method = build_method("model-soup", hub, task, SETTINGS)
    scores = {"a": 0.5, "b": 0.7, "c": 0.6, "bc": 0.65, "ab": 0.7}
    tried: list[str] = []

    def score(is_member_E: Tensor, batches: Batches) -> float:
        names = "".join(name for name, is_in in zip("abc", is_member_E, strict=True) if is_in)
        tried.append(names)
        return sign * scores[names]

    monkeypatch.setattr(method, "_score", score)
    method.choose(batches)
    assert tried == ["a", "b", "c", "bc", "ab"]
    assert method.is_member_E.tolist() == [True, True, False]


def test_a_soup_is_scored_on_what_is_given(hub: HubSpec) -> None:
    """The soup is no worse than its best member on the images that it was chosen by."""
    method = build_method("model-soup", hub, Classification(4), SETTINGS)
    validation = quadrant_data().validation.tensors
    method.choose(lambda: [validation])
    scores = {
        name: method.task.scores(outputs_BO.detach(), validation[1])["accuracy"]
        for name, outputs_BO in method.results(validation[0]).items()
    }
    assert scores[""] >= max(scores.values())
