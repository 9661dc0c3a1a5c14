"""Every dependency has a lower and an upper bound."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())
GROUPS = {
    "build-system": PROJECT["build-system"]["requires"],
    "dependencies": PROJECT["project"]["dependencies"],
    **PROJECT["project"]["optional-dependencies"],
}


@pytest.mark.parametrize("group", GROUPS)
def test_dependencies_are_bounded(group: str) -> None:
    for text in GROUPS[group]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["project"]["name"]:
            assert requirement.extras <= GROUPS.keys(), text
            continue
        signs = {specifier.operator for specifier in requirement.specifier}
        assert signs & {">=", ">", "=="}, f"{text} has no lower bound"
        assert signs & {"<", "<=", "=="}, f"{text} has no upper bound"
