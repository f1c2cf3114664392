"""The text that ships with the package: it is well-formed, and corpora have the lengths that they are named for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev

import numpy as np
import pytest

from embedq.model import SentenceEncoder
from embedq.model.fidelity import spearman_on_pairs
from embedq.model.samples import CORPORA, CorpusName, corpus, sentence_pairs, sentences

#: Mean tokens a text, and how far a corpus of a hundred texts may be from it.
MEANS: dict[CorpusName, tuple[float, float]] = {"short": (12, 0.5), "mixed": (45, 1.0), "long": (300, 2.0)}
#: Least rank correlation of all-mpnet-base-v2's cosines with the grades of the pairs; measured: 0.825.
REAL_SPEARMAN = 0.80
#: How far a smaller number type may move it.
SPEARMAN_TOLERANCE = 0.005


def num_words(texts: Sequence[str]) -> list[int]:
    """As a tokenizer that knows every word would count, with start and end."""
    return [len(text.split()) + 2 for text in texts]


def test_the_sentences_are_many_and_all_different() -> None:
    assert len(sentences()) == len(set(sentences())) == 400


def test_the_pairs_are_many_and_all_different_whichever_way_round() -> None:
    pairs = sentence_pairs()
    assert len(pairs) >= 300
    assert len({frozenset((pair.first, pair.second)) for pair in pairs}) == len(pairs)
    assert all(pair.first != pair.second for pair in pairs)


def test_the_grades_are_half_steps_and_each_is_given_about_as_often() -> None:
    counts = Counter(pair.grade for pair in sentence_pairs())
    assert sorted(counts) == [step / 2 for step in range(11)]
    assert max(counts.values()) <= 1.2 * min(counts.values())


def test_the_pairs_are_clean_sentences_of_5_to_40_words() -> None:
    for text in {text for pair in sentence_pairs() for text in (pair.first, pair.second)}:
        assert 5 <= len(text.split()) <= 40, text
        assert text == text.strip(), text
        assert text[0].isupper(), text
        assert text[-1] in ".!?", text


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_has_its_mean_length_and_the_same_texts_each_time(name: CorpusName) -> None:
    texts = corpus(name, 100, num_words)
    wanted, tolerance = MEANS[name]
    assert len(texts) == 100
    assert abs(mean(num_words(texts)) - wanted) <= tolerance
    assert texts == corpus(name, 100, num_words)
    assert texts != corpus(name, 100, num_words, seed=1)


def test_mixed_lengths_are_log_normal() -> None:
    logarithms = np.log(num_words(corpus("mixed", 1000, num_words)))
    assert abs(pstdev(logarithms) - 0.8) < 0.05
    assert abs(float(np.mean(((logarithms - logarithms.mean()) / logarithms.std()) ** 3))) < 0.2


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_may_be_of_one_text(name: CorpusName) -> None:
    (text,) = corpus(name, 1, num_words)
    assert text


@pytest.mark.real_model
@pytest.mark.parametrize("name", CORPORA)
def test_in_the_models_own_tokens_too(name: CorpusName, real_encoder: SentenceEncoder) -> None:
    def num_tokens(texts: Sequence[str]) -> list[int]:
        return [text.num_tokens for text in real_encoder.tokenize(texts)]

    wanted, tolerance = MEANS[name]
    texts = corpus(name, 100, num_tokens)
    assert abs(mean(num_tokens(texts)) - wanted) <= tolerance
    assert not any(text.truncated for text in real_encoder.tokenize(texts))


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_agrees_with_the_grades_and_bfloat16_with_it(
    real_encoder: SentenceEncoder, real_model_path: Path
) -> None:
    exact = spearman_on_pairs(lambda texts: np.asarray(real_encoder.encode(texts), dtype=np.float32))
    assert exact > REAL_SPEARMAN
    half = SentenceEncoder.load(real_model_path, device="cpu", dtype="bfloat16")
    rounded = spearman_on_pairs(lambda texts: np.asarray(half.encode(texts), dtype=np.float32))
    assert abs(rounded - exact) < SPEARMAN_TOLERANCE


@pytest.fixture(scope="module")
def real_encoder(real_model_path: Path) -> SentenceEncoder:
    return SentenceEncoder.load(real_model_path, device="cpu", dtype="float32")
