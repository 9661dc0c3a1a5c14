"""Which algorithm learns from which observations with which actions; writes docs/can-i-use.md."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from sb3_agents import AGENTS
from small_hubs import nature_spec, write_hub

import hubrl

PAGE = Path(__file__).resolve().parents[1] / "docs" / "can-i-use.md"
IMAGE = (4, 36, 36)
YES, NO = "yes", ""
N_STEPS = 34  # one update of each algorithm

OBSERVATIONS: dict[str, gym.Space[Any]] = {
    "images": gym.spaces.Box(0, 255, IMAGE, np.uint8),
    "float images": gym.spaces.Box(0.0, 1.0, IMAGE, np.float32),
    "images and vectors": gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, IMAGE, np.uint8), "speed": gym.spaces.Box(-1, 1, (3,))}
    ),
}
ACTIONS: dict[str, gym.Space[Any]] = {
    "Discrete": gym.spaces.Discrete(3),
    "MultiDiscrete": gym.spaces.MultiDiscrete([2, 3]),
    "MultiBinary": gym.spaces.MultiBinary(3),
    "Box": gym.spaces.Box(-1.0, 1.0, (2,)),
}


class RandomEnv(gym.Env[Any, Any]):
    """Random observations in episodes of 10 steps; all actions are allowed."""

    def __init__(self, observations: str, actions: str) -> None:
        self.observation_space = OBSERVATIONS[observations]
        self.action_space = ACTIONS[actions]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._n = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._n += 1
        return self.observation_space.sample(), 1.0, self._n == 10, False, {}

    def action_masks(self) -> np.ndarray:
        widths = {"Discrete": 3, "MultiDiscrete": 5, "MultiBinary": 6}
        names = {id(space): name for name, space in ACTIONS.items()}
        return np.ones(widths[names[id(self.action_space)]], dtype=bool)


def try_it(algorithm: str, observations: str, actions: str, hub: Path) -> str:
    """``yes`` where an agent learns, predicts, and comes back from a file; else nothing."""
    agent = AGENTS[algorithm]
    is_dict = observations == "images and vectors"
    extractor = hubrl.HubCombinedExtractor if is_dict else hubrl.HubFeaturesExtractor
    kwargs = {"hub": str(hub), "precision": "float32"}
    policy_kwargs = {
        "features_extractor_class": extractor,
        "features_extractor_kwargs": kwargs,
        "net_arch": [],
        **agent.policy_kwargs,
    }
    policy = agent.policy.replace("Cnn", "MultiInput") if is_dict else agent.policy
    env = RandomEnv(observations, actions)
    try:
        model = agent.model(
            policy, env, seed=0, device="cpu", policy_kwargs=policy_kwargs, **agent.settings
        )
        model.learn(N_STEPS)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder, "model"))
            loaded = agent.model.load(Path(folder, "model"), device="cpu")
        observation = env.observation_space.sample()
        expected, _ = model.predict(observation, deterministic=True)
        found, _ = loaded.predict(observation, deterministic=True)
    except (AssertionError, TypeError, ValueError, KeyError, RuntimeError):
        return NO
    assert np.array_equal(found, expected)
    return YES


def page(hub: Path) -> str:
    """The page, from trying each combination."""
    columns = [(o, a) for o in OBSERVATIONS for a in ACTIONS]
    lines = [
        "# Can I use?",
        "",
        "Which observations and actions each algorithm takes with a hub. **yes**: the agent",
        "learns, predicts, and comes back from its file. Empty: the algorithm or its policy",
        "doesn't take the combination. `make docs` makes this page by trying each; the tests try",
        "them again.",
        "",
        "- For images alone give `net_arch=[]` to PPO, A2C, DQN and their kin. Leave it out for",
        "  Dict observations, and for SAC, TD3, DDPG, TQC and CrossQ, whose critics need layers",
        "  behind features and action.",
        "- Vectors beside images need `HubCombinedExtractor` and `MultiInputPolicy`.",
        "- Float images lie in 0..1.",
        "- CrossQ has no `CnnPolicy`: give it the extractor with `MlpPolicy`.",
        "",
    ]
    for observations in OBSERVATIONS:
        lines += [f"## {observations.capitalize()}", ""]
        lines += [_row("algorithm", list(ACTIONS)), _row("---", ["---"] * len(ACTIONS))]
        for name in AGENTS:
            cells = [try_it(name, o, a, hub) for o, a in columns if o == observations]
            lines.append(_row(f"`{name}`", cells))
        lines.append("")
    return "\n".join(lines)


def read_page() -> dict[tuple[str, str, str], str]:
    """What the committed page says: (algorithm, observations, actions) -> ``yes`` or nothing."""
    said: dict[tuple[str, str, str], str] = {}
    observations = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            observations = line.removeprefix("## ").lower()
        if line.startswith("| `"):
            algorithm, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            for actions, cell in zip(ACTIONS, cells, strict=True):
                said[algorithm.strip("`"), observations, actions] = cell
    return said


def _row(first: str, cells: list[str]) -> str:
    return "| " + " | ".join([first, *cells]) + " |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(write_hub(Path(folder, "hub"), [nature_spec(x) for x in "abc"])))
