"""What a device's failures come to, with errors as torch, CUDA and the host's allocators word them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedq.model import DeviceLostError, ModelError, ModelOptionError, OutOfMemoryError, SentenceEncoder
from embedq.model.device_errors import LOST, device_errors, is_device_lost, is_out_of_memory
from embedq.model.embedder import Embedder
from embedq.model.runtime import HostRuntime

CPU = torch.device("cpu")
#: What torch adds to what CUDA says.
ADVICE = (
    "\nSearch for `cudaErrorAssert' in the documentation.\nCUDA kernel errors might be asynchronously reported at some"
    " other API call, so the stacktrace below might be incorrect.\nDevice-side assertion tracking was not enabled.\n"
)


def cuda_error(said: str, code: int | None = None) -> RuntimeError:
    """As torch raises it, with the number from version 2.8 on."""
    kind = RuntimeError if code is None else torch.AcceleratorError
    err = kind(f"CUDA error: {said}{ADVICE}")
    if code is not None:
        err.error_code = code  # type: ignore[attr-defined]
    return err


@pytest.mark.parametrize(
    ("err", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (cuda_error("out of memory", 2), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle, ...)`"), False),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (OutOfMemoryError("cpu is out of memory"), True),
        (ValueError("out of memory"), False),
        (cuda_error("device-side assert triggered", 710), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(err: Exception, expected: bool) -> None:
    assert is_out_of_memory(err) is expected


def test_what_the_cpus_allocator_really_raises_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 50)
    assert is_out_of_memory(of_numpy.value)


@pytest.mark.parametrize(
    "err",
    [
        cuda_error("device-side assert triggered", 710),
        cuda_error("an illegal memory access was encountered", 700),
        cuda_error("an illegal instruction was encountered"),
        cuda_error("misaligned address"),
        cuda_error("unspecified launch failure"),
        cuda_error("the launch timed out and was terminated"),
        cuda_error("uncorrectable ECC error encountered"),
        cuda_error("all CUDA-capable devices are busy or unavailable"),
        cuda_error("unknown error"),
        cuda_error("words of a later version", 719),
        RuntimeError("HIP error: an illegal memory access was encountered"),
        RuntimeError("CUDA driver error: unspecified launch failure"),
    ],
)
def test_a_lost_device_is_known_by_its_number_or_its_words(err: RuntimeError) -> None:
    assert is_device_lost(err)


@pytest.mark.parametrize(
    "err",
    [
        cuda_error("out of memory", 2),
        cuda_error("invalid configuration argument", 9),
        cuda_error("no kernel image is available for execution on the device", 209),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("probability tensor contains either `inf`, `nan` or element < 0"),
        RuntimeError("could not create a primitive: unknown error"),
        ValueError("CUDA error: device-side assert triggered"),
    ],
)
def test_what_one_call_alone_suffers_from_is_no_lost_device(err: Exception) -> None:
    assert not is_device_lost(err)


class SickDevice(HostRuntime):
    """Says at its next synchronization what went wrong on it."""

    def __init__(self, pending: Exception | None = None) -> None:
        super().__init__(CPU)
        self.pending = pending

    def synchronize(self) -> None:
        if self.pending is not None:
            raise self.pending


@pytest.mark.parametrize(
    ("pending", "expected"),
    [
        (cuda_error("an illegal memory access was encountered", 700), DeviceLostError),
        (cuda_error("invalid configuration argument", 9), RuntimeError),
        (None, RuntimeError),
    ],
)
def test_a_library_that_only_says_that_it_failed_makes_the_device_be_asked(
    pending: Exception | None, expected: type[Exception]
) -> None:
    err = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`")
    with pytest.raises(expected) as caught, device_errors(SickDevice(pending)):
        raise err
    assert type(caught.value) is expected
    if expected is DeviceLostError:
        assert str(caught.value) == (
            "cpu is lost to this process (an illegal memory access was encountered): start a new one"
        )
        assert caught.value.__cause__ is err


@pytest.mark.parametrize("code", LOST)
def test_messages_quote_nothing_that_a_library_said(code: int) -> None:
    with pytest.raises(DeviceLostError) as caught, device_errors(SickDevice()):
        raise cuda_error("secret words", code)
    assert (caught.value.code, caught.value.retryable) == ("device_lost", True)
    assert LOST[code] in str(caught.value)
    assert "secret" not in str(caught.value)


def test_out_of_memory_is_a_memory_error_whoever_raised_it() -> None:
    with pytest.raises(MemoryError) as caught, device_errors(SickDevice()):
        raise torch.OutOfMemoryError("CUDA out of memory: secret")
    assert isinstance(caught.value, ModelError)
    assert isinstance(caught.value, OutOfMemoryError)
    assert (caught.value.code, caught.value.retryable) == ("out_of_memory", True)
    assert str(caught.value) == "cpu is out of memory: encode fewer tokens at a time"


def test_our_own_errors_and_those_of_others_go_through_as_they_are() -> None:
    for err in (ModelOptionError("no such thing"), KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(err)) as caught, device_errors(SickDevice()):
            raise err
        assert caught.value is err


Call = Callable[[SentenceEncoder], object]


@pytest.mark.parametrize(
    "call",
    [
        lambda encoder: encoder.encode(["the fox"]),
        lambda encoder: encoder.encode(["the fox"], output="tokens"),
        lambda encoder: encoder.encode_tokens(encoder.tokenize(["the fox"])),
        lambda encoder: encoder.encode_states(encoder.tokenize(["the fox"])),
        lambda encoder: encoder.warm_up(),
    ],
    ids=["encode", "token output", "encode_tokens", "encode_states", "warm_up"],
)
def test_an_encoder_says_that_its_device_is_lost(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    encoder = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32")

    def broken(*_: Any) -> Any:
        raise cuda_error("device-side assert triggered", 710)

    monkeypatch.setattr(encoder._embedder.model, "place", broken)
    with pytest.raises(DeviceLostError, match="device-side assert triggered"):
        call(encoder)
    assert not torch.is_inference_mode_enabled()


def test_giving_memory_back_to_a_lost_device_says_so(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32")

    def broken() -> None:
        raise cuda_error("unspecified launch failure", 719)

    monkeypatch.setattr(encoder._embedder.runtime, "release_cache", broken)
    with pytest.raises(DeviceLostError, match="unspecified launch failure"):
        encoder.release_memory()


def test_an_attempt_without_memory_holds_nothing_once_its_error_is_dropped(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a collection: what the next, smaller attempt needs must be free by then."""
    encoder = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32")
    held: list[weakref.ref[torch.Tensor]] = []
    whole = Embedder.encode_packed

    def hungry(embedder: Embedder, sequences: Sequence[Any]) -> torch.Tensor:
        if len(sequences) == 1:
            return whole(embedder, sequences)
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Embedder, "encode_packed", hungry)
    gc.disable()
    try:
        for _ in range(3):
            try:
                encoder.encode(["the fox", "the dog"])
            except OutOfMemoryError:
                assert held[-1]() is not None
            assert held[-1]() is None
    finally:
        gc.enable()
    assert encoder.encode(["the fox"]).shape == (1, 24)
