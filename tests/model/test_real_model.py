"""all-mpnet-base-v2 with its published weights, against transformers and sentence-transformers in float32."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import bytes_to_load
from sentence_transformers import SentenceTransformer
from tiny import random_sequences, reference_states
from transformers import MPNetModel

from embedq.model import SentenceEncoder, TokenizedText
from embedq.model.packing import pack

pytestmark = pytest.mark.real_model

#: Largest difference of a normalised vector's component.
TOLERANCE = 2e-6
#: Largest difference of any layer's hidden state.
HIDDEN_TOLERANCE = 1e-4
#: Least cosine to float32.
BFLOAT16_COSINE = 0.9995

SENTENCE = "the committee agreed that trains between both cities should run every hour from next spring on "
TEXTS = [
    "",
    " \n\t ",
    "a",
    "How many people live in London?",
    "Wie viele Menschen leben in München? Äpfel, Öl, übermäßig.",
    "东京有多少人口? 日本語のテキスト",
    "👩‍👩‍👧‍👦 emoji 🏳️‍🌈 and symbols ∑∫√ ½ ﬁ",
    "a <mask> in </s> the [UNK] text <pad> here",
    "x" * 300,
    SENTENCE * 2,
    SENTENCE * 5,
    "long " * 500,
]
#: Around the one border between exact and shared buckets, and the position limit.
LENGTHS = [512, 384, 129, 128, 127, 2, 1]


@pytest.fixture(scope="module")
def encoder(real_model_path: Path) -> SentenceEncoder:
    return SentenceEncoder.load(real_model_path, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs(real_model_path: Path) -> SentenceTransformer:
    return SentenceTransformer(str(real_model_path), device="cpu", model_kwargs={"attn_implementation": "eager"})


@pytest.fixture(scope="module")
def their_model(theirs: SentenceTransformer) -> MPNetModel:
    model = theirs[0].auto_model
    assert isinstance(model, MPNetModel)
    return model


def test_the_folder_is_read_right(encoder: SentenceEncoder) -> None:
    assert (encoder.embedding_dim, encoder.max_seq_length, encoder.default_normalize) == (768, 384, True)


def test_ids_are_transformers(encoder: SentenceEncoder, theirs: SentenceTransformer) -> None:
    for side in ("right", "left"):
        theirs.tokenizer.truncation_side = side
        expected = theirs.tokenizer(TEXTS, truncation=True, max_length=384, padding=False)["input_ids"]
        ours = encoder.tokenize(TEXTS, truncation_side=side)  # type: ignore[arg-type]
        assert [text.ids.tolist() for text in ours] == expected
    theirs.tokenizer.truncation_side = "right"


def test_embeddings_are_sentence_transformers(encoder: SentenceEncoder, theirs: SentenceTransformer) -> None:
    together = encoder.encode(TEXTS)
    np.testing.assert_allclose(together, theirs.encode(TEXTS, batch_size=4), atol=TOLERANCE, rtol=0)
    singles = np.concatenate([encoder.encode(text) for text in TEXTS])
    np.testing.assert_allclose(together, singles, atol=TOLERANCE, rtol=0)


def test_every_layer_is_transformers_at_every_length_in_one_batch(
    encoder: SentenceEncoder, their_model: MPNetModel
) -> None:
    sequences = random_sequences(LENGTHS, vocab_size=30000)
    with torch.inference_mode():
        ours = [state.split(LENGTHS) for state in encoder._embedder.model.hidden_states(pack(sequences))]
    pooled = encoder.postprocess(encoder.encode_tokens([TokenizedText(ids, False) for ids in sequences]))
    for place, ids in enumerate(sequences):
        expected = reference_states(their_model, ids)
        assert len(expected) == len(ours) == 13
        for layer, state in zip(ours, expected, strict=True):
            torch.testing.assert_close(layer[place], state, atol=HIDDEN_TOLERANCE, rtol=0)
        mean = torch.nn.functional.normalize(expected[-1].mean(0), dim=0).numpy()
        np.testing.assert_allclose(pooled[place], mean, atol=TOLERANCE, rtol=0)


def test_bfloat16_stays_near_float32(encoder: SentenceEncoder, real_model_path: Path) -> None:
    half = SentenceEncoder.load(real_model_path, device="cpu", dtype="bfloat16")
    cosines = (half.encode(TEXTS) * encoder.encode(TEXTS)).sum(axis=1)
    assert cosines.min() > BFLOAT16_COSINE


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes there")
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1.2), ("bfloat16", 1.2), ("int8", 0.6)])
def test_the_weights_are_in_memory_about_once(real_model_path: Path, dtype: str, most: float) -> None:
    """most: as a share of the file, which is float32; int8 weights with bfloat16 embeddings are 0.31 of it."""
    assert bytes_to_load(real_model_path, dtype) < most * (real_model_path / "model.safetensors").stat().st_size
