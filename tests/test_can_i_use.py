"""Each cell of the page "Can I use?" is true."""

from __future__ import annotations

from pathlib import Path

import pytest
from can_i_use import ACTIONS, OBSERVATIONS, read_page, try_it
from sb3_agents import AGENTS

#: The other observations are tried in the slow tests.
QUICK = [(name, "images", actions) for name in AGENTS for actions in ACTIONS]
SLOW = [
    pytest.param(name, observations, actions, marks=pytest.mark.slow)
    for name in AGENTS
    for observations in OBSERVATIONS
    if observations != "images"
    for actions in ACTIONS
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
