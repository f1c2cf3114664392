"""The published MPNets and what fine-tunes do to them, built small with random weights by the reference itself.

Each is loaded by us and by sentence-transformers and must give the same vectors, to the rounding of float32 sums in
another order: 2e-6 of the largest number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tiny import DEFAULTS, edit_json, write_folder, write_json, write_modules, write_pooling, write_tokenizer
from transformers import MPNetConfig, MPNetForMaskedLM

from embedq.model import ModelOptionError, SentenceEncoder
from embedq.model.pooling import POOLING_MODES
from embedq.model.similarity import SIMILARITY_FUNCTIONS, similarity

TOLERANCE = 2e-6
#: Empty, blank, one token, odd lengths, one too long.
TEXTS = ["", "  ", "fox", "the dog", "a, b. c!", "jumps over the quick brown dog " * 3, "running " * 31, "é中 " * 60]
WORDS = ["the", "dog", "fox", "runs", "ing", "a", "xyz", ",", ".", "中", "é", "<mask>", ""]
RANDOM_TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join), min_size=1, max_size=6)


def save(folder: Path, *modules: Any, **options: Any) -> Path:
    """A folder as sentence-transformers of today writes it."""
    transformer = Transformer(str(write_folder(folder / "bare")))
    SentenceTransformer(modules=[transformer, *modules], device="cpu", **options).save(str(folder / "saved"))
    return folder / "saved"


def all_mpnet_base_v2(folder: Path) -> Path:
    """Mean, normalised; config files as of sentence-transformers 2.0."""
    write_modules(write_folder(folder), "Pooling", "Normalize")
    write_pooling(folder, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True, pooling_mode_max_tokens=False)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"__version__": {"sentence_transformers": "2.0.0"}})
    return folder


def multi_qa_mpnet_base_cos_v1(folder: Path) -> Path:
    """The same modules, no version file of its own similarity, the longest sequence as long as positions allow."""
    all_mpnet_base_v2(folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    return folder


def multi_qa_mpnet_base_dot_v1(folder: Path) -> Path:
    """CLS without normalising, compared by dot product."""
    write_modules(write_folder(folder), "Pooling")
    write_pooling(folder, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "dot"})
    return folder


def paraphrase_mpnet_base_v2(folder: Path) -> Path:
    """Mean without normalising."""
    write_modules(write_folder(folder), "Pooling")
    write_pooling(folder, pooling_mode_mean_tokens=True)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    return folder


def microsoft_mpnet_base(folder: Path) -> Path:
    """A bare folder with the masked-LM head, as transformers saves it after pretraining."""
    torch.manual_seed(0)
    model = MPNetForMaskedLM(MPNetConfig(**DEFAULTS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def dense_modules(folder: Path) -> Path:
    """Two Dense modules, tanh and identity, then Normalize."""
    torch.manual_seed(2)
    identity = Dense(16, 9, activation_function=torch.nn.Identity())
    return save(folder, Pooling(24), Dense(24, 16, activation_function=torch.nn.Tanh()), identity, Normalize())


def prompts(folder: Path) -> Path:
    options = {"prompts": {"query": "the dog: ", "document": ""}, "default_prompt_name": "query"}
    return save(folder, Pooling(24, pooling_mode=("cls", "mean")), similarity_fn_name="euclidean", **options)


VARIANTS = {
    variant.__name__: (variant, similarity_name, normalized)
    for variant, similarity_name, normalized in (
        (all_mpnet_base_v2, "cosine", True),
        (multi_qa_mpnet_base_cos_v1, "cosine", True),
        (multi_qa_mpnet_base_dot_v1, "dot", False),
        (paraphrase_mpnet_base_v2, "cosine", False),
        (microsoft_mpnet_base, "cosine", False),
        (dense_modules, "cosine", True),
        (prompts, "euclidean", False),
    )
}


def both(folder: Path) -> tuple[SentenceEncoder, SentenceTransformer]:
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    return SentenceEncoder.load(folder, device="cpu", dtype="float32"), theirs


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    build, similarity_name, normalized = VARIANTS[request.param]
    return *both(build(tmp_path_factory.mktemp(request.param))), similarity_name, normalized


def assert_close(ours: Any, theirs: Any) -> None:
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * max(1, np.abs(theirs).max(initial=0)), rtol=0)


def test_vectors_and_similarities_are_sentence_transformers(variant: Any) -> None:
    encoder, theirs, similarity_name, normalized = variant
    expected = theirs.encode(TEXTS)
    ours = encoder.encode(TEXTS)
    assert_close(ours, expected)
    assert encoder.default_normalize == normalized
    assert encoder.similarity_fn_name == theirs.similarity_fn_name == similarity_name
    # Looser: cosines of vectors that differ in the last digits, and distances of vectors that are almost the same.
    np.testing.assert_allclose(
        encoder.similarity(expected, expected[2:5]), theirs.similarity(expected, expected[2:5]), rtol=1e-4, atol=2e-3
    )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=RANDOM_TEXTS, prompt=st.sampled_from([None, "", "the ", "xyz: ", "run"]))
def test_random_texts_and_prompts_are_sentence_transformers(variant: Any, texts: list[str], prompt: str | None) -> None:
    encoder, theirs = variant[:2]
    assert_close(encoder.encode(texts, prompt=prompt), theirs.encode(texts, prompt=prompt))


def test_token_output_is_sentence_transformers(variant: Any) -> None:
    encoder, theirs = variant[:2]
    expected = theirs.encode(TEXTS, output_value="token_embeddings")
    ours = encoder.encode(TEXTS, output="tokens")
    assert [part.shape for part in ours] == [tuple(part.shape) for part in expected]
    for mine, their in zip(ours, expected, strict=True):
        assert_close(mine, their)
        assert mine.flags.owndata


def test_token_output_pools_to_the_sentence(tmp_path: Path) -> None:
    """What late chunking does: the mean over any span of tokens."""
    encoder = SentenceEncoder.load(all_mpnet_base_v2(tmp_path), device="cpu", dtype="float32")
    tokens = encoder.encode(TEXTS, output="tokens")
    means = np.stack([part.mean(axis=0) for part in tokens])
    assert_close(means / np.linalg.norm(means, axis=1, keepdims=True), encoder.encode(TEXTS))
    cut = encoder.encode(TEXTS, output="tokens", dimensions=5, normalize=True, precision="float16")
    assert {part.dtype for part in cut} == {np.dtype(np.float16)}
    np.testing.assert_allclose(np.linalg.norm(cut[0].astype(np.float32), axis=1), 1, atol=2e-3)
    assert encoder.encode([], output="tokens") == []


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_a_prompt_may_be_left_out_of_pooling(tmp_path: Path, mode: str) -> None:
    folder = save(tmp_path, Pooling(24, pooling_mode=mode, include_prompt=False), Normalize())
    encoder, theirs = both(folder)
    for prompt in (None, "", "the dog: ", "fox", "xyz ", "running " * 50):
        expected = theirs.encode(TEXTS, prompt=prompt)
        assert_close(encoder.encode(TEXTS, prompt=prompt), expected)
    with_prompt = encoder.encode(TEXTS, prompt="the dog: ")
    edit_json(folder / "1_Pooling" / "config.json", include_prompt=True)
    assert not np.allclose(both(folder)[0].encode(TEXTS, prompt="the dog: "), with_prompt) or mode == "lasttoken"


def test_a_prompt_that_swallows_the_text_leaves_its_last_token(tmp_path: Path) -> None:
    """`th` and `e` are two tokens of a prompt and none of its own text; there sentence-transformers pools nothing."""
    folder = save(tmp_path, Pooling(24, pooling_mode=("max", "mean"), include_prompt=False))
    encoder, _ = both(folder)
    [text] = encoder.tokenize(["e"], prompt="th")
    assert (text.num_tokens, text.skipped) == (3, 2)
    vector = encoder.encode(["e"], prompt="th")[0]
    last = encoder.encode(["e"], prompt="th", output="tokens")[0][-1]
    assert_close(vector, np.concatenate((last, last)))


def test_windows_leave_the_prompt_out_too(tmp_path: Path) -> None:
    encoder, _ = both(save(tmp_path, Pooling(24, include_prompt=False)))
    [text] = encoder.tokenize_windows(["dog " * 200], prompt="the ")
    assert {window.skipped for window in text.windows} == {2}
    tokens = [encoder.encode_states([window])[0][2:].mean(axis=0) for window in text.windows]
    assert_close(encoder.encode(["dog " * 200], prompt="the ", chunk=True)[0], np.mean(tokens, axis=0))


@pytest.mark.parametrize(
    "activation",
    [
        *(torch.nn.ELU(), torch.nn.GELU(), torch.nn.LeakyReLU(), torch.nn.ReLU(), torch.nn.SiLU()),
        *(torch.nn.Sigmoid(), torch.nn.Tanh(), torch.nn.Identity()),
    ],
)
@pytest.mark.parametrize("width", [24, 10])
def test_dense_with_every_activation_and_a_residual(tmp_path: Path, activation: torch.nn.Module, width: int) -> None:
    torch.manual_seed(3)
    dense = Dense(24, width, activation_function=activation, use_residual=True)
    encoder, theirs = both(save(tmp_path, Pooling(24), dense, Dense(width, 6, activation_function=activation)))
    assert_close(encoder.encode(TEXTS), theirs.encode(TEXTS))


@pytest.mark.parametrize("stored", [None, "maxsim", 3, "Cosine"])
def test_a_similarity_that_is_none_of_the_four_is_the_default(own_folder: Path, stored: Any) -> None:
    write_json(own_folder / "config_sentence_transformers.json", {"similarity_fn_name": stored})
    assert SentenceEncoder.load(own_folder, device="cpu").similarity_fn_name == "cosine"


@pytest.mark.parametrize("name", SIMILARITY_FUNCTIONS)
def test_similarities_of_random_vectors_are_sentence_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers.util.similarity import SimilarityFunction

    monkeypatch.setattr("embedq.model.similarity.BLOCK_ELEMENTS", 300)
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(rows, 32)).astype(np.float32) for rows in (40, 9))
    a[3] = b[4]
    a[5] = 0
    theirs = SimilarityFunction.to_similarity_fn(name)
    ours = similarity(a, b, name)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs(a, b), atol=2e-5)
    np.testing.assert_allclose(similarity(a[0], b[0], name), theirs(a[0], b[0]), atol=2e-5)
    assert similarity(a[:0], b, name).shape == (0, 9)


def test_vectors_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ModelOptionError, match="vectors of 3 and of 4 dimensions"):
        similarity(np.ones(3), np.ones(4))
    with pytest.raises(ModelOptionError, match="not of 3 dimensions"):
        similarity(np.ones((1, 1, 3)), np.ones(3))
    for wrong in ("fox", [[1, 2], [3]]):
        with pytest.raises(ModelOptionError, match="vectors must be numbers, as many in each"):
            similarity(wrong, np.ones(3))
    with pytest.raises(ModelOptionError, match="unknown similarity 'maxsim': use one of cosine, dot"):
        similarity(np.ones(3), np.ones(3), "maxsim")
