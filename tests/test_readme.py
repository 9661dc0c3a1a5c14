"""What the README shows runs: its example, its commands, and its links to files."""

import re
from pathlib import Path

import pytest

import hubrl
from hubrl.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # The same lines, with a rollout and a run short enough for a test.
    short = example.replace("n_steps=128, batch_size=256", "n_steps=8, batch_size=16")
    short = short.replace("1_000_000", "64").replace("n_envs=8", "n_envs=2")
    assert short.count("n_steps=8") == short.count("64,") == short.count("n_envs=2") == 1
    names: dict[str, object] = {}
    exec(compile(short, "README.md", "exec"), names)
    model, env = names["model"], names["env"]
    assert model.num_timesteps >= 64
    assert isinstance(model.policy.features_extractor, hubrl.HubFeaturesExtractor)
    env.close()


def test_every_command_is_named() -> None:
    for name in COMMANDS:
        assert f"hubrl.{name}" in README or f"hubrl {name}" in README, name


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http|#)([^)]+)\)", README) or ["README.md"])
def test_linked_files_exist(target: str) -> None:
    assert (ROOT / target.split("#")[0]).exists()
