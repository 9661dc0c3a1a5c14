"""``EncoderScaledAdam``: numbers by hand, SB3's learning rate schedule, copies and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from sb3_agents import make_agent
from torch import nn
from torch.optim import Adam

import hubrl


def two_weights() -> tuple[nn.Parameter, nn.Parameter]:
    """One of an encoder and one of something else, with a gradient of 1 each."""
    encoder, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    encoder.is_encoder = True  # type: ignore[attr-defined]
    for weight in (encoder, other):
        weight.grad = torch.ones(3)
    return encoder, other


def test_first_step_by_hand() -> None:
    """Adam's first step is the learning rate, whatever the gradient."""
    encoder, other = two_weights()
    hubrl.EncoderScaledAdam([encoder, other], lr=0.5, encoder_lr_scale=0.1, eps=0.0).step()
    torch.testing.assert_close(encoder.detach(), torch.full((3,), 0.95))
    torch.testing.assert_close(other.detach(), torch.full((3,), 0.5))


@pytest.mark.parametrize("fused", [False, True])
def test_many_steps_are_those_of_two_adams(fused: bool) -> None:
    torch.manual_seed(0)
    encoder, other = two_weights()
    twins = [nn.Parameter(weight.detach().clone()) for weight in (encoder, other)]
    ours = hubrl.EncoderScaledAdam(
        iter([other, encoder]), lr=0.01, encoder_lr_scale=0.3, fused=fused
    )
    theirs = [Adam([twins[0]], lr=0.003), Adam([twins[1]], lr=0.01)]
    for _ in range(20):
        for weight, twin in zip((encoder, other), twins, strict=True):
            weight.grad = torch.randn(3)
            twin.grad = weight.grad.clone()
        ours.step()
        for adam in theirs:
            adam.step()
    torch.testing.assert_close(encoder, twins[0])
    torch.testing.assert_close(other, twins[1])
    assert [group["lr"] for group in ours.param_groups] == [0.01, 0.01]


def test_a_copy_has_the_scale() -> None:
    encoder, other = two_weights()
    optimizer = copy.deepcopy(
        hubrl.EncoderScaledAdam([encoder, other], lr=0.5, encoder_lr_scale=0.1)
    )
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(3)
    optimizer.step()
    moved = [1 - group["params"][0].detach()[0].item() for group in optimizer.param_groups]
    assert moved == pytest.approx([0.5, 0.05], rel=1e-4)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_a_scale_that_is_none(scale: float) -> None:
    with pytest.raises(ValueError, match=r"encoder_lr_scale is .*above 0; .*freeze='all'"):
        hubrl.EncoderScaledAdam(list(two_weights()), encoder_lr_scale=scale)


@pytest.mark.parametrize("name", ["ppo", "dqn", "sac"])
def test_in_an_agent_encoders_alone_learn_slowly(name: str, hub5: Path) -> None:
    """With a billionth of the rate encoders stay in place (to 1e-6), and all else moves."""
    optimizer = {
        "optimizer_class": hubrl.EncoderScaledAdam,
        "optimizer_kwargs": {"encoder_lr_scale": 1e-9},
    }
    model = make_agent(name, hub5, policy=optimizer)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(40)
    after = model.policy.state_dict()
    moved = {
        key: float((after[key].float() - old.float()).abs().max()) for key, old in before.items()
    }
    encoders = [distance for key, distance in moved.items() if ".encoders." in key]
    layers = [distance for key, distance in moved.items() if "aggregator.linear.weight" in key]
    assert max(encoders) < 1e-6
    assert max(layers) > 1e-6


def test_a_copied_policys_encoders_are_known(hub5: Path) -> None:
    policy = make_agent("ppo", hub5).policy
    for one in (policy, copy.deepcopy(policy)):
        optimizer = hubrl.EncoderScaledAdam(one.parameters(), lr=0.5, encoder_lr_scale=0.1)
        counts = {group["lr_scale"]: len(group["params"]) for group in optimizer.param_groups}
        assert counts[0.1] == 5 * 6, "weights and biases of three layers of five encoders"


def test_a_saved_agent_goes_on_with_the_scale(hub5: Path, tmp_path: Path) -> None:
    optimizer = {
        "optimizer_class": hubrl.EncoderScaledAdam,
        "optimizer_kwargs": {"encoder_lr_scale": 0.25},
    }
    model = make_agent("ppo", hub5, policy=optimizer)
    model.learn(32)
    model.save(tmp_path / "agent")
    again = type(model).load(tmp_path / "agent", env=model.get_env())
    again.learn(32)
    assert [group["lr_scale"] for group in again.policy.optimizer.param_groups] == [1.0, 0.25]
