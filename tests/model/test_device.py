"""Choosing device and dtype, with the machine's abilities set by the test."""

from __future__ import annotations

import logging

import pytest
import torch

from embedq.model import DeviceError
from embedq.model import device as devices


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a CPU only; `give_cuda` and `give_mps` add to it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


def give_cuda(machine: pytest.MonkeyPatch, count: int = 2, capability: tuple[int, int] = (9, 0)) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: count)
    machine.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    machine.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")


def give_mps(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.backends.mps, "is_available", lambda: True)


def test_auto_takes_cuda_then_mps_then_the_cpu(machine: pytest.MonkeyPatch) -> None:
    assert devices.resolve_device("auto") == torch.device("cpu")
    give_mps(machine)
    assert devices.resolve_device("auto") == torch.device("mps")
    give_cuda(machine)
    assert devices.resolve_device("auto") == torch.device("cuda:0")


def test_a_device_by_name(machine: pytest.MonkeyPatch) -> None:
    give_cuda(machine)
    assert devices.resolve_device("cuda") == torch.device("cuda:0")
    assert devices.resolve_device("cuda:1") == torch.device("cuda:1")
    assert devices.resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there_says_what_is(machine: pytest.MonkeyPatch, device: str) -> None:
    with pytest.raises(DeviceError, match=rf"'{device}' is not available here: use auto, cpu$"):
        devices.resolve_device(device)


def test_a_gpu_too_many_says_what_is_there(machine: pytest.MonkeyPatch) -> None:
    give_cuda(machine)
    with pytest.raises(DeviceError, match="use auto, cuda:0, cuda:1, cpu"):
        devices.resolve_device("cuda:2")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:all", "cuda:-1", "CPU"])
def test_an_unknown_device_says_what_is_known(machine: pytest.MonkeyPatch, device: str) -> None:
    with pytest.raises(DeviceError, match="unknown device"):
        devices.resolve_device(device)


@pytest.mark.parametrize(
    ("capability", "expected", "why"),
    [((8, 0), torch.bfloat16, "tensor cores"), ((7, 5), torch.float16, "no bfloat16 units")],
)
def test_auto_dtype_on_cuda_goes_by_capability_and_says_why(
    machine: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    expected: torch.dtype,
    why: str,
) -> None:
    give_cuda(machine, capability=capability)
    with caplog.at_level(logging.INFO, logger="embedq.model.device"):
        assert devices.resolve_dtype("auto", torch.device("cuda:0")) == expected
    assert why in caplog.text


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_auto_dtype_elsewhere_is_float32(device: str) -> None:
    assert devices.resolve_dtype("auto", torch.device(device)) == torch.float32


def test_a_dtype_by_name() -> None:
    assert devices.resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_int8_says_that_it_is_not_supported_yet() -> None:
    with pytest.raises(DeviceError, match=r"does not support quantized weights.*float32, float16, bfloat16"):
        devices.resolve_dtype("int8", torch.device("cpu"))


def test_an_unknown_dtype_says_what_is_known() -> None:
    with pytest.raises(DeviceError, match="unknown dtype 'fp32'"):
        devices.resolve_dtype("fp32", torch.device("cpu"))
