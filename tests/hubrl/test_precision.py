"""Devices and number formats."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hubrl import precision
from hubrl.architectures import NatureConv
from hubrl.precision import NATURE_CONVOLUTIONS, check_device, fast_dtype


@pytest.mark.parametrize("is_native", [True, False])
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or is_native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    expected = torch.bfloat16 if is_native else torch.float32
    assert fast_dtype.__wrapped__("cuda") == expected


def test_the_probe_is_nature_cnn_and_moves_no_random_numbers() -> None:
    convolutions = [module for module in NatureConv(4).modules() if isinstance(module, nn.Conv2d)]
    expected = tuple((tuple(each.weight.shape), each.stride[0]) for each in convolutions)
    assert expected == NATURE_CONVOLUTIONS
    before = torch.get_rng_state()
    assert fast_dtype.__wrapped__("cpu") in (torch.float32, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("gain", "expected"), [(1.29, "float32"), (1.31, "bfloat16")])
def test_a_gain_that_is_worth_the_rounding(
    gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: gain, torch.bfloat16: 1.0}
    monkeypatch.setattr(precision, "_probe", seconds.__getitem__)
    assert fast_dtype.__wrapped__("cpu") == getattr(torch, expected)


def test_the_first_to_ask_may_be_in_inference_mode() -> None:
    with torch.inference_mode():
        assert precision._probe(torch.float32) > 0


def test_devices_of_this_machine() -> None:
    assert check_device("--device", "cpu") == torch.device("cpu")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert check_device("--device", "auto").type == kind
    with pytest.raises(ValueError, match=r"--device is 'cuda:99', allowed on this machine: auto"):
        check_device("--device", "cuda:99")
    for name in ("abacus", "meta"):
        with pytest.raises(ValueError, match=rf"train.device is '{name}', allowed on this machine"):
            check_device("train.device", name)
