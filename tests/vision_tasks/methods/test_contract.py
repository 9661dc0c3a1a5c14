"""What every method promises, by one set of tests over all of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_images import (
    SIZE,
    StopsAfter,
    landmark_data,
    quadrant_data,
    small_vision_config,
    write_rgb_hub,
)

from hubrl.encoder_list import EncoderList
from hubrl.encoders import build_encoder, is_encoder_weight
from hubrl.signals import StopSignal
from hubrl.specs import HubSpec, load_hub
from vision_tasks.methods import METHODS, Method, Settings, build_method
from vision_tasks.methods.method import Batches
from vision_tasks.tasks import Classification, Landmarks, Task
from vision_tasks.training import Trainer

NAMES = ["single:b" if name == "single" else name for name in METHODS]
TASKS: dict[str, Task] = {
    "classification": Classification(4),
    "landmarks": Landmarks(3, ((1,), (2,))),
}
DATA = {"classification": quadrant_data(16), "landmarks": landmark_data(16)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rgb_hub(tmp_path_factory.mktemp("hubs") / "rgb")


def build(name: str, hub: Path, task: str = "classification") -> Method:
    return build_method(name, load_hub(hub), TASKS[task], Settings(0, SIZE))


def train(
    method: Method, name: str, folder: Path, stop: StopSignal, task: str = "classification"
) -> None:
    """One epoch of two steps of each phase."""
    config = small_vision_config(Path(method.hub.name), name, train__epochs=1)
    Trainer(method, DATA[task], config, folder).run(stop)


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "method.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_gives_the_same_bytes(name: str, hub: Path, tmp_path: Path) -> None:
    """Stopped in the first phase and in the last; the weights are the same, so are the scores."""
    steps = 2 * len(METHODS[name.partition(":")[0]].phases)
    method = build(name, hub)
    train(method, name, tmp_path / "whole", StopSignal())
    for stop in (StopsAfter(1), StopsAfter(steps - 2), StopSignal()):
        train(build(name, hub), name, tmp_path / "cut", stop)
    whole, cut = last_weights(tmp_path / "whole"), last_weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "cut")]
    assert results[0]["test"] == results[1]["test"]
    outputs_BO = method.eval()(DATA["classification"].test[0][0][None])
    assert outputs_BO.shape == (1, 4)
    assert outputs_BO.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_what_learns_moves_and_nothing_else(name: str, hub: Path, tmp_path: Path) -> None:
    """With landmarks. Weights of frozen encoders are those of their files."""
    method = build(name, hub, "landmarks")
    n_phases = 0
    begin, before = method.begin, {}

    def noting(phase: str, batches: Batches) -> None:
        begin(phase, batches)
        before.clear()
        before.update({key: weight.clone() for key, weight in method.named_parameters()})

    def compare(batches: Batches) -> None:
        nonlocal n_phases
        n_phases += 1
        for key, weight in method.named_parameters():
            if weight.requires_grad and weight.ndim > 1:
                assert not torch.equal(weight, before[key]), key
            elif not weight.requires_grad:
                assert torch.equal(weight, before[key]), key

    method.begin, method.choose = noting, compare
    train(method, name, tmp_path, StopSignal(), "landmarks")
    assert n_phases == len(method.phases)
    for encoders in (module for module in method.modules() if isinstance(module, EncoderList)):
        for i, spec in enumerate(method.hub.encoders):
            if encoders[i].is_frozen:
                fresh = build_encoder(method.hub, spec).state_dict()
                state = encoders[i].state_dict()
                assert all(torch.equal(state[key], fresh[key]) for key in fresh)
    outputs_BO = method.eval()(DATA["landmarks"].test[0][0][None])
    assert outputs_BO.shape == (1, 6)


#: Encoders of three that learn at their own rate, in each phase.
N_LEARNING = {"single:b": [1], "attention": [0], "logme": [1], "knowledge-flow": [1]}
N_LEARNING["distill"] = [3, 1]


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_encoders_are_marked(name: str, hub: Path) -> None:
    """They learn more slowly, and heads don't; the mark is lost where a tensor is copied."""
    method = build(name, hub)
    one = sum(weight.numel() for weight in build("single:b", hub).model.encoder.parameters())
    counts = []
    for phase in method.phases:
        method.begin(phase, lambda: iter([DATA["classification"].train.tensors]))
        learning = [weight for weight in method.parameters() if weight.requires_grad]
        counts.append(sum(weight.numel() for weight in learning if is_encoder_weight(weight)))
    assert counts == [n * one for n in N_LEARNING.get(name, [3])]


@pytest.mark.parametrize("name", ["zoo-tuning", "model-soup"])
def test_hubs_of_one_architecture_alone(name: str, hub: Path) -> None:
    first, *others = load_hub(hub).encoders
    wide = dataclasses.replace(first, architecture="nature_conv_wide", features_dim=128)
    message = r"hub 'm' has encoders of different architecture \(b: nature_conv, a: nature_conv_w"
    with pytest.raises(ValueError, match=message):
        build_method(
            name, HubSpec(name="m", encoders=(*others, wide)), TASKS["landmarks"], Settings(0, SIZE)
        )
    wider = dataclasses.replace(first, architecture="nature_cnn", features_dim=32)
    wide = dataclasses.replace(wider, name="wide", features_dim=64)
    widths = HubSpec(name="m", encoders=(wider, wide))
    with pytest.raises(ValueError, match=r"of different features_dim \(a: 32, wide: 64\)"):
        build_method(name, widths, TASKS["landmarks"], Settings(0, SIZE, pretrained=False))
    brighter = dataclasses.replace(first, mean=(0.5,))
    with pytest.raises(ValueError, match=r"of different mean .* python -m vision_tasks.pretrain"):
        build_method(
            name,
            HubSpec(name="m", encoders=(*others, brighter)),
            TASKS["landmarks"],
            Settings(0, SIZE),
        )


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_follow_from_the_seed(name: str, hub: Path) -> None:
    """``--random-init`` builds the same method twice, whatever random numbers were drawn before."""
    settings = Settings(3, SIZE, pretrained=False)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        method = build_method(name, load_hub(hub), TASKS["classification"], settings)
        method.begin(method.phases[-1], lambda: iter([DATA["classification"].train.tensors]))
        states.append(method.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
