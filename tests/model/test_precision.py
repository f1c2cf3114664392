"""Cutting, normalising and quantizing, against sentence-transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from embedq.model import ModelOptionError
from embedq.model.precision import check_ranges, dequantize, postprocess, postprocess_states, quantize

VECTORS = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)


@pytest.mark.parametrize("precision", ["float32", "binary", "ubinary"])
def test_quantizes_as_sentence_transformers(precision: str) -> None:
    ours = postprocess(VECTORS, normalize=False, precision=precision)  # type: ignore[arg-type]
    theirs = quantize_embeddings(VECTORS, precision)  # type: ignore[arg-type]
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)


def test_dimensions_that_fill_no_whole_byte_are_padded_row_by_row() -> None:
    packed = postprocess(VECTORS, normalize=False, dimensions=12, precision="ubinary")
    assert packed.shape == (5, 2)
    assert np.array_equal(np.unpackbits(packed, axis=1)[:, :12], VECTORS[:, :12] > 0)  # type: ignore[arg-type]


def test_float16_is_the_rounded_float32() -> None:
    assert np.array_equal(postprocess(VECTORS, normalize=False, precision="float16"), VECTORS.astype(np.float16))


def test_dimensions_are_cut_before_normalising() -> None:
    ours = postprocess(VECTORS, normalize=True, dimensions=10)
    cut = VECTORS[:, :10]
    np.testing.assert_allclose(ours, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-7)
    assert ours.dtype == np.float32
    assert ours.flags.owndata


def test_a_zero_vector_stays_zero() -> None:
    assert np.array_equal(postprocess(np.zeros((2, 8), np.float32), normalize=True), np.zeros((2, 8)))


@pytest.mark.parametrize("precision", ["float32", "float16", "binary", "ubinary"])
def test_no_vectors_give_no_vectors(precision: str) -> None:
    empty = np.empty((0, 64), np.float32)
    assert len(postprocess(empty, normalize=True, precision=precision)) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("dimensions", [0, -1, 65, True, 2.0])
def test_dimensions_out_of_range_are_refused(dimensions: int) -> None:
    with pytest.raises(ModelOptionError, match="dimensions"):
        postprocess(VECTORS, normalize=False, dimensions=dimensions)


RANGES = np.stack((VECTORS.min(axis=0), VECTORS.max(axis=0)))


@pytest.mark.parametrize("precision", ["int8", "uint8"])
@pytest.mark.parametrize("scale", [1.0, 3.0, 1000.0])
def test_steps_of_a_range_are_sentence_transformers_and_clamp(precision: Any, scale: float) -> None:
    """Beyond scale 1 most numbers are out of range: they become the nearest end, and none wraps around."""
    vectors = scale * VECTORS
    ours = quantize(vectors, precision, RANGES)
    theirs = quantize_embeddings(vectors, precision, ranges=RANGES)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)
    highest = vectors > RANGES[1]
    assert (ours[highest] == (127 if precision == "int8" else 255)).all()
    assert (ours[vectors < RANGES[0]] == (-128 if precision == "int8" else 0)).all()


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_a_dimension_that_never_moved_has_one_step(precision: Any) -> None:
    ranges = np.stack((RANGES[0], np.where(np.arange(64) % 2, RANGES[0], RANGES[1])))
    assert np.array_equal(quantize(VECTORS, precision, ranges), quantize_embeddings(VECTORS, precision, ranges=ranges))
    assert np.array_equal(
        dequantize(quantize(VECTORS, precision, ranges), ranges)[:, 1::2], ranges[:1, 1::2].repeat(5, 0)
    )


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_steps_turn_back_into_floats_within_half_a_step(precision: Any) -> None:
    back = dequantize(quantize(VECTORS, precision, RANGES), RANGES)
    assert back.dtype == np.float32
    half = (RANGES[1] - RANGES[0]) / 510
    assert (np.abs(back - VECTORS) <= half + 1e-6).all()


def test_ranges_are_asked_for_by_the_dimensions_that_are_left() -> None:
    asked = []

    def find(count: int) -> Any:
        asked.append(count)
        return RANGES[:, :count]

    ours = postprocess(VECTORS, normalize=False, dimensions=10, precision="uint8", find_ranges=find)
    assert np.array_equal(ours, quantize(VECTORS[:, :10], "uint8", RANGES[:, :10]))
    postprocess(VECTORS, normalize=False, precision="binary", find_ranges=find)
    assert asked == [10]


def test_steps_without_ranges_are_refused() -> None:
    with pytest.raises(ModelOptionError, match="'int8' needs calibration ranges"):
        quantize(VECTORS, "int8")


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (np.zeros((2, 63)), "ranges are for 63 dimensions, the vectors have 64"),
        (np.zeros((3, 64)), r"must have the shape \(2, dimensions\), not \(3, 64\)"),
        (np.zeros(64), "must have the shape"),
        (np.full((2, 64), np.nan), "must be finite"),
        (RANGES[::-1], "the lowest values in the first row"),
        ("wide", "must be numbers, as many in both rows"),
        ([[0, 1], [2]], "must be numbers, as many in both rows"),
    ],
)
def test_ranges_that_cannot_be_are_refused(ranges: Any, message: str) -> None:
    with pytest.raises(ModelOptionError, match=message):
        check_ranges(ranges, 64)


def test_only_bytes_turn_back_into_floats() -> None:
    with pytest.raises(ModelOptionError, match="not float32"):
        dequantize(VECTORS, RANGES)


def test_tokens_vectors_keep_their_length_unless_asked() -> None:
    raw = postprocess_states(VECTORS, normalize=None, dimensions=8, precision="float16")
    assert np.array_equal(raw, VECTORS[:, :8].astype(np.float16))
    unit = postprocess_states(VECTORS, normalize=True, dimensions=None, precision="float32")
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    with pytest.raises(ModelOptionError, match="float32 or float16, not 'int8'"):
        postprocess_states(VECTORS, normalize=None, dimensions=None, precision="int8")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ModelOptionError, match="'int4'"):
        postprocess(VECTORS, normalize=False, precision="int4")  # type: ignore[arg-type]


def test_the_input_is_left_as_it_is() -> None:
    before = VECTORS.copy()
    postprocess(VECTORS, normalize=True, dimensions=3)
    assert np.array_equal(VECTORS, before)


def test_one_row_that_was_cut_keeps_no_wider_array_alive() -> None:
    ours = postprocess(VECTORS[:1], normalize=False, dimensions=3)
    assert ours.flags.owndata
    assert not np.shares_memory(ours, VECTORS)
