"""Devices and number formats."""

from __future__ import annotations

import pytest
import torch

from hubrl.precision import check_device, fast_dtype


@pytest.mark.parametrize("is_native", [True, False])
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or is_native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    expected = torch.bfloat16 if is_native else torch.float32
    assert fast_dtype.__wrapped__("cuda") == expected


def test_devices_of_this_machine() -> None:
    assert check_device("--device", "cpu") == torch.device("cpu")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert check_device("--device", "auto").type == kind
    with pytest.raises(ValueError, match=r"--device is 'cuda:99', allowed on this machine: auto"):
        check_device("--device", "cuda:99")
    with pytest.raises(ValueError, match=r"train.device is 'abacus', allowed on this machine"):
        check_device("train.device", "abacus")
