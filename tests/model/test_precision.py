"""Cutting, normalising and quantizing, against sentence-transformers."""

from __future__ import annotations

import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from embedq.model import ModelOptionError
from embedq.model.precision import postprocess

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


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_precisions_that_need_calibration_say_so_and_name_others(precision: str) -> None:
    with pytest.raises(ModelOptionError, match=r"calibration ranges.*ubinary"):
        postprocess(VECTORS, normalize=False, precision=precision)  # type: ignore[arg-type]


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
