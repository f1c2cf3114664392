"""A short way through the fuzzer, and by hypothesis what it holds for: see tests/fuzz."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.producer import JobFailedError, WireError, wire
from tests import fuzz


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_bytes_are_a_value_or_a_clear_error_to_every_reader(seed: int) -> None:
    found = fuzz.run(300_000, seed)
    assert len(found) == len(fuzz.targets())
    for name, figures in found.items():
        assert figures.inputs > 20, name
    # Not all so damaged that none is looked into.
    assert sum(figures.read for figures in found.values()) > 100


@pytest.mark.parametrize("target", fuzz.targets(), ids=lambda target: target.name)
def test_every_seed_is_read(target: fuzz.Target) -> None:
    assert any(fuzz.check(target, target.wrap(blob)) for blob in target.seeds)


@given(st.binary(max_size=400))
def test_noise_is_a_failure_or_a_wire_error_as_a_reason(noise: bytes) -> None:
    try:
        assert isinstance(wire.decode_exc_string(noise), JobFailedError)
    except WireError as err:
        assert "\n" not in str(err)  # noqa: PT017


def test_a_small_blob_that_claims_a_large_tensor_takes_no_memory() -> None:
    tensor = b'{"dtype":"F32","shape":[1,4000000000],"data_offsets":[0,16000000000]}'
    header = b'{"__metadata__":{"num_tokens":"[3]"},"embeddings":%b}' % tensor
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            wire.decode_result(len(header).to_bytes(8, "little") + header)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
