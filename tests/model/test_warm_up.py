"""Finding the budget that fits, on devices whose memory the test decides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedq.model import DeviceError, SentenceEncoder
from embedq.model.embedder import Embedder
from embedq.model.runtime import HostRuntime, Memory
from embedq.model.warm_up import proven_budget


class SmallDevice(HostRuntime):
    """Takes micro-batches of so many tokens."""

    def __init__(self, most: int) -> None:
        super().__init__(torch.device("cpu"))
        self._most = most
        self.batches: list[list[int]] = []
        self.num_releases = 0

    def encode(self, sequences: Sequence[Any]) -> None:
        self.batches.append([len(ids) for ids in sequences])
        if sum(self.batches[-1]) > self._most:
            raise torch.OutOfMemoryError("out of memory")

    def memory(self) -> Memory:
        return Memory(3 << 30, 16 << 30, 1 << 30, 1 << 29)

    def release_cache(self) -> None:
        self.num_releases += 1


def test_a_budget_that_fits_is_kept_and_said(caplog: pytest.LogCaptureFixture) -> None:
    device = SmallDevice(1000)
    with caplog.at_level(logging.INFO, logger="embedq.model"):
        assert proven_budget(device.encode, device, longest=64, num_tokens=1000) == 1000
    assert device.batches == [[64] * 15, [5] + [1] * 995]
    [record] = caplog.records
    assert "micro-batches of 1000 tokens fit; 3.0 of 16.0 GiB are free, torch holds 1.0 GiB" in record.message


def test_out_of_memory_halves_the_budget_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    device = SmallDevice(300)
    with caplog.at_level(logging.WARNING, logger="embedq.model"):
        assert proven_budget(device.encode, device, longest=64, num_tokens=1000) == 250
    assert [record.message for record in caplog.records] == [
        "cpu: out of memory with micro-batches of 1000 tokens; trying 500",
        "cpu: out of memory with micro-batches of 500 tokens; trying 250",
    ]
    assert device.num_releases == 2


def test_the_last_try_is_one_longest_text() -> None:
    device = SmallDevice(70)
    assert proven_budget(device.encode, device, longest=64, num_tokens=100) == 64
    with pytest.raises(DeviceError, match="cpu has not enough memory for one text of 64 tokens"):
        proven_budget(SmallDevice(63).encode, device, longest=64, num_tokens=100)


def test_a_budget_below_the_longest_text_is_tried_with_that_text() -> None:
    device = SmallDevice(64)
    assert proven_budget(device.encode, device, longest=64, num_tokens=3) == 3
    assert device.batches == [[64], [3]]


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def broken(sequences: Sequence[Any]) -> None:
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert"):
        proven_budget(broken, SmallDevice(1), longest=64, num_tokens=100)


def test_an_encoder_warms_up_where_it_is_asked_to(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="embedq.model.warm_up")
    cold = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32", max_batch_tokens=200)
    assert "warmed up" not in caplog.text
    warm = SentenceEncoder.load(tiny_folder, device="cpu", dtype="float32", max_batch_tokens=200, warm_up=True)
    assert "warmed up" in caplog.text
    assert warm.max_batch_tokens == 200
    np.testing.assert_array_equal(warm.encode("the fox"), cold.encode("the fox"))

    whole = Embedder.encode_packed

    def cramped(encoder: Embedder, sequences: Sequence[Any]) -> torch.Tensor:
        if sum(map(len, sequences)) > 150:
            raise torch.OutOfMemoryError("out of memory")
        return whole(encoder, sequences)

    monkeypatch.setattr(Embedder, "encode_packed", cramped)
    assert (
        SentenceEncoder.load(
            tiny_folder, device="cpu", dtype="float32", max_batch_tokens=200, warm_up=True
        ).max_batch_tokens
        == 100
    )
