"""The stand-in encoder: stable, unit length, and honest about truncation."""

from __future__ import annotations

import numpy as np
import pytest

from embedq.model import (
    ModelNotFoundError,
    ModelOptionError,
    NoopEncoder,
    TextTooLongError,
    dequantize,
    shipped_ranges,
)
from embedq.model.precision import postprocess_states

#: What "hello world" gave in the first release, whole and its first four dimensions.
HELLO_4 = [0.3722769, -0.5632804, -0.5676196, 0.4710979]
HELLO_768 = [-0.0171947, -0.0511424, 0.0462565, -0.0422349]


def encode(encoder: NoopEncoder, texts: list[str], prompt: str = "") -> np.ndarray:
    return encoder.encode_tokens(encoder.tokenize(texts, prompt=prompt))


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 127, 128, 130, 768, 1000])
def test_vectors_have_length_one_and_differ_between_texts(dim: int) -> None:
    vectors = encode(NoopEncoder(dim), [f"text {index}" for index in range(200)] + [""])
    assert vectors.shape == (201, dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert len(np.unique(vectors, axis=0)) == (201 if dim > 1 else 2)


def test_the_vector_of_a_text_is_fixed_for_all_versions() -> None:
    np.testing.assert_allclose(encode(NoopEncoder(4), ["hello world"])[0], HELLO_4, atol=1e-6)
    np.testing.assert_allclose(encode(NoopEncoder(768), ["hello world"])[0, :4], HELLO_768, atol=1e-6)


def test_a_prompt_changes_the_vector_as_the_same_text_would() -> None:
    encoder = NoopEncoder(32)
    assert np.array_equal(encode(encoder, ["dog"], prompt="query: "), encode(encoder, ["query: dog"]))
    assert not np.array_equal(encode(encoder, ["dog"], prompt="query: "), encode(encoder, ["dog"]))


def test_order_and_batch_do_not_change_a_vector() -> None:
    encoder = NoopEncoder(768)
    texts = [f"text {index}" for index in range(20)]
    assert np.array_equal(encode(encoder, texts)[::-1], encode(encoder, texts[::-1]))
    assert np.array_equal(encode(encoder, texts)[3:4], encode(encoder, texts[3:4]))
    assert encode(encoder, []).shape == (0, 768)


def test_a_word_is_a_token_and_long_texts_are_cut() -> None:
    encoder = NoopEncoder(8)
    words = [f"w{index}" for index in range(500)]
    short, exact, over = encoder.tokenize(["two words", " ".join(words[:382]), " ".join(words[:383])])
    assert (short.num_tokens, short.truncated) == (4, False)
    assert (exact.num_tokens, exact.truncated) == (384, False)
    assert (over.num_tokens, over.truncated) == (384, True)


def test_what_was_cut_away_has_no_say() -> None:
    encoder = NoopEncoder(8)
    words = " ".join(f"w{index}" for index in range(400))
    right = encoder.tokenize([words, words + " more"])
    assert np.array_equal(right[0].ids, right[1].ids)
    left = encoder.tokenize([words, "more " + words], truncation_side="left")
    assert np.array_equal(left[0].ids, left[1].ids)
    assert not np.array_equal(left[0].ids, right[0].ids)


def test_an_over_long_text_is_an_error_if_truncation_is_declined() -> None:
    with pytest.raises(TextTooLongError, match="402 tokens") as caught:
        NoopEncoder(8).tokenize(["fine", "w " * 400], truncate=False)
    assert caught.value.text_index == 1


def test_a_lone_surrogate_is_an_option_error_that_names_the_text() -> None:
    with pytest.raises(ModelOptionError, match="text 1"):
        NoopEncoder(8).tokenize(["fine", "\ud800"])


@pytest.mark.parametrize("name", ["noop", "noop:", "noop:0", "noop:-3", "noop:65537", "noop:x", "noop:1.5", "mpnet:8"])
def test_a_bad_name_is_not_found_and_says_how_to_write_it(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="noop:768"):
        NoopEncoder.parse(name)


def test_a_good_name_is_the_reported_name() -> None:
    encoder = NoopEncoder.parse("noop:65536")
    assert (encoder.name, encoder.revision, encoder.embedding_dim) == ("noop:65536", "noop", 65536)


def test_it_has_no_named_prompts() -> None:
    encoder = NoopEncoder(8)
    assert encoder.resolve_prompt(None, None) == ""
    assert encoder.resolve_prompt("find: ", None) == "find: "
    with pytest.raises(ModelOptionError, match="query"):
        encoder.resolve_prompt(None, "query")


def test_postprocess_cuts_and_quantizes() -> None:
    encoder = NoopEncoder(64)
    vectors = encode(encoder, ["a", "b"])
    assert np.linalg.norm(encoder.postprocess(vectors, dimensions=16), axis=1) == pytest.approx([1, 1])
    assert encoder.postprocess(vectors, precision="ubinary").shape == (2, 8)


def test_bytes_are_steps_from_minus_one_to_one() -> None:
    encoder = NoopEncoder(64)
    vectors = encode(encoder, ["a", "b"])
    assert encoder.calibration_digest == "unit"
    for dimensions in (64, 10):
        wanted = encoder.postprocess(vectors, dimensions=dimensions)
        ours = encoder.postprocess(vectors, dimensions=dimensions, precision="int8")
        assert ours.dtype == np.int8
        np.testing.assert_allclose(dequantize(ours, shipped_ranges("unit", dimensions)), wanted, atol=1 / 255)


def test_token_vectors_are_fixed_by_the_text_and_the_place() -> None:
    encoder = NoopEncoder(16)
    first, second = encoder.encode_states(encoder.tokenize(["two words", "one"]))
    assert (first.shape, second.shape, encoder.token_dim) == ((4, 16), (3, 16), 16)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)
    assert len(np.unique(np.concatenate((first, second)), axis=0)) == 7
    assert np.array_equal(encoder.encode_states(encoder.tokenize(["one"]))[0], second)
    np.testing.assert_allclose(
        postprocess_states(first, normalize=None, dimensions=3, precision="float16"), first[:, :3], atol=1e-3
    )


def test_windows_are_words_with_the_prompt_before_each() -> None:
    encoder = NoopEncoder(8)
    words = [f"w{index}" for index in range(1000)]
    short, long = encoder.tokenize_windows(["two words", " ".join(words)], prompt="say: ", overlap=10)
    assert short.windows[0].ids.tolist() == encoder.tokenize(["say: two words"])[0].ids.tolist()
    assert (short.num_tokens, long.num_tokens) == (5, 1003)
    first, *_, last = encoder.tokenize([" ".join(["say:", *words[:381]]), " ".join(["say:", *words[-381:]])])
    assert len(long.windows) == 3
    assert long.windows[0].ids.tolist() == first.ids.tolist()
    assert long.windows[-1].ids.tolist() == last.ids.tolist()
    with pytest.raises(TextTooLongError, match="text 1 has more than the") as caught:
        encoder.tokenize_windows(["fine", "w " * 500_000])
    assert caught.value.text_index == 1
