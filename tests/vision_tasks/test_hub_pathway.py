"""Hub-Pathway over heads: its three losses against an explicit computation of all encoders."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from small_images import SIZE, landmark_data, quadrant_images, write_rgb_hub
from torch import Tensor
from torch.nn import functional as F

from hubrl.sections import Schedule
from hubrl.specs import load_hub
from vision_tasks.methods import Method, Settings, build_method
from vision_tasks.tasks import Classification, Landmarks

SETTINGS = Settings(
    seed=0, image_size=SIZE, exploration_coef=Schedule.constant(0.3), exploitation_coef=0.7
)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_rgb_hub(tmp_path / "rgb")


def spread(method: Method) -> None:
    """Scores that differ between images, as after some learning."""
    torch.manual_seed(1)
    torch.nn.init.normal_(method.model.pathway.generator.scores.weight, std=0.3)


def dense_losses(method: Method, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The paper's formulas with all encoders on all rows."""
    pathway, heads = method.model.pathway, method.model.heads.values()
    outputs_BEO = torch.stack(
        [head(encoder(images)) for head, encoder in zip(heads, pathway.encoders, strict=True)], 1
    )
    p_BE = pathway.generator(images, None).softmax(dim=1)
    chosen_BE = torch.zeros_like(p_BE).scatter(1, p_BE.topk(2, dim=1).indices, 1.0)
    w_BE = p_BE * chosen_BE / (p_BE * chosen_BE).sum(dim=1, keepdim=True)
    blocks_OEO = torch.cat([block.weight for block in pathway.aggregator.blocks], dim=1)
    y_BO = F.linear((w_BE[:, :, None] * outputs_BEO).flatten(1), blocks_OEO)
    y_BO = y_BO + pathway.aggregator.bias
    each_BE = torch.stack([method.task.losses(o, targets) for o in outputs_BEO.unbind(1)], 1)
    mean_E = p_BE.mean(dim=0)
    return {
        "task": method.task.losses(y_BO, targets).mean(),
        "exploration": (mean_E * mean_E.log()).sum(),
        "exploitation": (chosen_BE * each_BE).sum(dim=1).mean(),
    }


@pytest.mark.parametrize("kind", ["classification", "landmarks"])
def test_losses_and_gradients_are_the_papers(kind: str, hub: Path) -> None:
    if kind == "classification":
        task, (images, targets) = Classification(4), quadrant_images(16, seed=3)
    else:
        task = Landmarks(3, ((1,), (2,)))
        images, targets = landmark_data(16).train.tensors
    method = build_method("hub-pathway", load_hub(hub), task, SETTINGS).eval()
    spread(method)
    losses = method.loss(images, targets)
    expected = dense_losses(method, images, targets)
    for name, value in expected.items():
        torch.testing.assert_close(losses.parts[name], value)
    total = expected["task"] + 0.3 * expected["exploration"] + 0.7 * expected["exploitation"]
    torch.testing.assert_close(losses.total, total)
    weights = list(method.parameters())
    ours = torch.autograd.grad(losses.total, weights, allow_unused=True)
    theirs = torch.autograd.grad(total, weights, allow_unused=True)
    assert all(gradient is not None for gradient in theirs[-6:])
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            mine = torch.zeros_like(other) if mine is None else mine  # nothing activated it
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_exploration_coefficient_may_move(hub: Path) -> None:
    settings = SETTINGS._replace(exploration_coef=Schedule(start=0.4, end=0.1))
    method = build_method("hub-pathway", load_hub(hub), Classification(4), settings).eval()
    images, targets = quadrant_images(16, seed=3)
    for progress, coef in ((0.0, 0.4), (0.5, 0.25), (1.0, 0.1)):
        method.progress = progress
        total, parts = method.loss(images, targets)
        expected = parts["task"] + coef * parts["exploration"] + 0.7 * parts["exploitation"]
        torch.testing.assert_close(total, expected)


def test_an_untrained_aggregator_is_the_weighted_sum(hub: Path) -> None:
    method = build_method("hub-pathway", load_hub(hub), Classification(4), SETTINGS).eval()
    images, _ = quadrant_images(8, seed=3)
    output, parts = method.model.route(images)
    expected = torch.zeros(8, 4)
    for i, rows_R, outputs_RO in parts:
        expected = expected.index_add(0, rows_R, output.weights[rows_R, i, None] * outputs_RO)
    torch.testing.assert_close(output.features, expected)


def test_one_activated_encoder_counts_whole(hub: Path) -> None:
    """Landmarks would be in the wrong place; the generator learns all the same."""
    settings = SETTINGS._replace(top_k=1)
    method = build_method("hub-pathway", load_hub(hub), Classification(4), settings).eval()
    spread(method)
    images, targets = quadrant_images(8, seed=3)
    output, parts = method.model.route(images)
    assert len(parts) > 1
    for _, rows_R, outputs_RO in parts:
        torch.testing.assert_close(output.features[rows_R], outputs_RO)
    # The gradient of the logarithm of the chosen probability, times what the output would change.
    scores = method.model.pathway.generator.scores.weight
    ours = torch.autograd.grad(method.task.losses(output.features, targets).sum(), scores)[0]
    outputs = output.features.detach().requires_grad_()
    slopes_BO = torch.autograd.grad(method.task.losses(outputs, targets).sum(), outputs)[0]
    log_BE = method.model.pathway.generator(images, None).log_softmax(dim=1)
    factors_B = (slopes_BO * outputs).sum(dim=1).detach()
    expected = torch.autograd.grad((factors_B * log_BE.amax(dim=1)).sum(), scores)[0]
    torch.testing.assert_close(ours, expected)
    assert float(ours.abs().max()) > 0


def test_evaluation_takes_an_encoders_share_at_a_time(hub: Path) -> None:
    method = build_method("hub-pathway", load_hub(hub), Classification(4), SETTINGS).eval()
    image, _ = quadrant_images(1, seed=3)
    images = image.expand(9, *image.shape[1:])  # all of them activate the same two encoders
    expected, pathway = method(images), method.model.pathway
    with torch.no_grad(), mock.patch.object(pathway, "encode", wraps=pathway.encode) as encode:
        torch.testing.assert_close(method(images), expected)
    n_rows = [len(call.args[2]) for call in encode.call_args_list]
    share = math.ceil(9 * 2 / len(pathway.encoders))
    assert max(n_rows) == share < 9
    assert sum(n_rows) == 18


def test_the_generator_is_settled_before_the_first_step(hub: Path) -> None:
    method = build_method("hub-pathway", load_hub(hub), Classification(4), SETTINGS)
    images, targets = quadrant_images(64, seed=3)
    method.begin("train", lambda: iter([(images, targets)]))
    generator = method.model.pathway.generator
    seen = images[::8].float().mean(dim=0) / 255
    torch.testing.assert_close(generator.image_mean.running_mean, seen)
    assert float(generator.feature_mean.n_rows) > 0
    assert not generator.training


def test_training_is_noisy_and_evaluation_is_not(hub: Path) -> None:
    method = build_method("hub-pathway", load_hub(hub), Classification(4), SETTINGS)
    images, targets = quadrant_images(16, seed=3)
    method.train()
    a, b = (method.loss(images, targets).total for _ in range(2))
    assert not torch.equal(a, b)
    method.eval()
    assert torch.equal(method(images), method(images))
