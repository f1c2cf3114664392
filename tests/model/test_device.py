"""Choosing device and dtype, with the machine's abilities set by the test."""

from __future__ import annotations

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
