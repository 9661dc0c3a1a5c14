"""Each cell of the page "Can I use?" is true."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from can_i_use import ACTIONS, OBSERVATIONS, read_page, try_it
from sb3_agents import AGENTS

#: The others are tried in the slow tests; each algorithm learns in the default ones, too.
QUICK = [(name, "images", actions) for name in ("ppo", "qrdqn", "sac") for actions in ACTIONS]
SLOW = [
    pytest.param(*cell, marks=pytest.mark.slow)
    for cell in itertools.product(AGENTS, OBSERVATIONS, ACTIONS)
    if cell not in QUICK
]


@pytest.mark.parametrize(("algorithm", "observations", "actions"), [*QUICK, *SLOW])
def test_the_page_is_true(algorithm: str, observations: str, actions: str, hub5: Path) -> None:
    said = read_page()[algorithm, observations, actions]
    assert try_it(algorithm, observations, actions, hub5) == said


def test_each_algorithm_takes_images() -> None:
    said = read_page()
    assert len(said) == len(AGENTS) * len(OBSERVATIONS) * len(ACTIONS)
    for name in AGENTS:
        assert "yes" in [said[name, "images", actions] for actions in ACTIONS]
