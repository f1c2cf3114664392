"""Folders of all ages and kinds against sentence-transformers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tiny import edit_json, write_folder, write_json, write_modules, write_pooling

from embedq.model import ModelFormatError, SentenceEncoder
from embedq.model.modules import LEGACY_POOLING_SWITCHES, read_modules
from embedq.model.pooling import POOLING_MODES

TEXTS = ["the quick brown fox", "", "fox", "jumps over the dog, running! " * 12]
TOLERANCE = 2e-6


def load(folder: Path) -> SentenceEncoder:
    return SentenceEncoder.load(folder, device="cpu", dtype="float32")


def assert_as_sentence_transformers(folder: Path) -> SentenceEncoder:
    encoder = load(folder)
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    expected = theirs.encode(TEXTS, show_progress_bar=False)
    ours = encoder.encode(TEXTS)
    assert encoder.embedding_dim == ours.shape[1] == expected.shape[1]
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE * max(1, np.abs(expected).max()))
    return encoder


def save(folder: Path, *modules: Any, **options: Any) -> Path:
    """A folder as sentence-transformers of today writes it."""
    bare = write_folder(folder / "bare")
    transformer = Transformer(str(bare))
    SentenceTransformer(modules=[transformer, *modules], device="cpu", **options).save(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_every_pooling_mode_in_the_new_style(tmp_path: Path, mode: str) -> None:
    encoder = assert_as_sentence_transformers(save(tmp_path, Pooling(24, pooling_mode=mode), Normalize()))
    assert encoder.default_normalize


def test_several_modes_are_concatenated_in_the_order_given(tmp_path: Path) -> None:
    folder = save(tmp_path, Pooling(24, pooling_mode=("lasttoken", "mean", "cls")))
    assert assert_as_sentence_transformers(folder).embedding_dim == 72


@pytest.mark.parametrize("switches", [[switch] for switch in LEGACY_POOLING_SWITCHES] + [list(LEGACY_POOLING_SWITCHES)])
def test_pooling_switches_in_the_old_style(tmp_path: Path, switches: list[str]) -> None:
    write_folder(tmp_path)
    write_modules(tmp_path, "Pooling")
    write_pooling(tmp_path, **{switch: switch in switches for switch in LEGACY_POOLING_SWITCHES})
    assert_as_sentence_transformers(tmp_path)


@pytest.mark.parametrize("activation", [torch.nn.Tanh(), torch.nn.Identity()])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_behind_cls(tmp_path: Path, activation: torch.nn.Module, bias: bool) -> None:
    torch.manual_seed(1)
    dense = Dense(24, 10, bias=bias, activation_function=activation)
    folder = save(tmp_path, Pooling(24, pooling_mode="cls"), dense, Dense(10, 6), Normalize())
    assert assert_as_sentence_transformers(folder).embedding_dim == 6


def test_a_bare_transformers_folder_is_mean_pooling_without_normalising(tmp_path: Path) -> None:
    encoder = assert_as_sentence_transformers(write_folder(tmp_path))
    assert not encoder.default_normalize
    assert encoder.max_seq_length == 64


def test_the_transformer_may_have_its_own_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "0_Transformer")
    write_modules(tmp_path, "Pooling", transformer="0_Transformer")
    write_pooling(tmp_path, pooling_mode_mean_tokens=True)
    assert_as_sentence_transformers(tmp_path)


def test_prompts_and_the_default_prompt(tmp_path: Path) -> None:
    prompts = {"query": "the dog: ", "other": "over "}
    folder = save(tmp_path, Pooling(24), prompts=prompts, default_prompt_name="query")
    encoder = assert_as_sentence_transformers(folder)
    assert {name: encoder.prompts[name] for name in prompts} == prompts
    assert encoder.resolve_prompt(None, None) == "the dog: "
    assert encoder.resolve_prompt(None, "other") == "over "
    assert encoder.resolve_prompt("", None) == ""


@pytest.mark.parametrize(
    ("sentence_bert", "tokenizer", "expected"),
    [
        ({"max_seq_length": 7}, 9, 7),
        ({"max_seq_length": None}, 9, 9),
        ({}, 9, 9),
        ({}, int(1e30), 64),
        ({"max_seq_length": 512}, 9, 64),
        ({}, None, 64),
    ],
)
def test_where_the_longest_sequence_is_written(
    own_folder: Path, sentence_bert: dict[str, Any], tokenizer: int | None, expected: int
) -> None:
    write_json(own_folder / "sentence_bert_config.json", sentence_bert)
    edit_json(own_folder / "tokenizer_config.json", model_max_length=tokenizer)
    assert load(own_folder).max_seq_length == expected


@pytest.mark.parametrize("value", [0, -1, "8", 2.5])
def test_a_bad_longest_sequence_names_file_and_field(own_folder: Path, value: Any) -> None:
    write_json(own_folder / "sentence_bert_config.json", {"max_seq_length": value})
    with pytest.raises(ModelFormatError, match=r"sentence_bert_config\.json.*max_seq_length"):
        read_modules(own_folder)


@pytest.mark.parametrize("kind", ["CNN", "WeightedLayerPooling", "LSTM"])
def test_an_unknown_module_is_named(own_folder: Path, kind: str) -> None:
    write_modules(own_folder, "Pooling", kind)
    with pytest.raises(ModelFormatError, match=rf"modules\.json.*sentence_transformers\.models\.{kind}.*not supported"):
        read_modules(own_folder)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "must hold a list"),
        ([], "first module must be a Transformer"),
        ([{"type": "sentence_transformers.models.Transformer", "path": ""}], "second module must be a Pooling"),
        ([{"type": "mine.Transformer", "path": ""}], "'mine.Transformer' is not supported"),
        ([{"type": "sentence_transformers.models.Transformer", "path": "../x"}], "leads out of the model folder"),
        ([{"path": ""}], "'type' is missing"),
    ],
)
def test_a_bad_modules_file_is_named(own_folder: Path, modules: Any, message: str) -> None:
    write_json(own_folder / "modules.json", modules)
    with pytest.raises(ModelFormatError, match=rf"modules\.json.*{message}"):
        read_modules(own_folder)


def test_normalize_before_dense_is_out_of_place(own_folder: Path) -> None:
    write_modules(own_folder, "Pooling", "Normalize", "Dense")
    with pytest.raises(ModelFormatError, match=r"Normalize .* is out of place"):
        read_modules(own_folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "attention"}, "'attention' is unknown"),
        ({"pooling_mode": []}, "is unknown"),
        ({"include_prompt": "no"}, "'include_prompt' must be true or false"),
        ({"word_embedding_dimension": 7}, "Pooling is for 7 dimensions, the encoder has 24"),
    ],
)
def test_a_bad_pooling_is_named(own_folder: Path, config: dict[str, Any], message: str) -> None:
    write_pooling(own_folder, **config)
    with pytest.raises(ModelFormatError, match=message):
        load(own_folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.Softmax"}, "Softmax' is not supported"),
        ({"activation_function": "mine.ReLU"}, "'mine.ReLU' is not supported"),
        ({"activation_function": ["Tanh"]}, "is not supported"),
        ({"in_features": None}, "'in_features' is missing"),
        ({"in_features": 7}, "takes 7 dimensions and is given 24"),
        ({"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ({}, r"2_Dense/model\.safetensors is missing"),
    ],
)
def test_a_bad_dense_is_named(own_folder: Path, config: dict[str, Any], message: str) -> None:
    write_modules(own_folder, "Pooling", "Dense")
    write_json(own_folder / "2_Dense" / "config.json", {"in_features": 24, "out_features": 3})
    edit_json(own_folder / "2_Dense" / "config.json", **config)
    with pytest.raises(ModelFormatError, match=message):
        load(own_folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prompts": ["query"]}, "'prompts' must be an object"),
        ({"default_prompt_name": ["query"]}, "not among the prompts"),
        ({"default_prompt_name": "query"}, "not among the prompts"),
    ],
)
def test_bad_prompts_are_named(own_folder: Path, config: dict[str, Any], message: str) -> None:
    write_json(own_folder / "config_sentence_transformers.json", config)
    with pytest.raises(ModelFormatError, match=rf"config_sentence_transformers\.json.*{message}"):
        read_modules(own_folder)


@pytest.mark.parametrize("limit", [float("inf"), float("nan"), True, "many", 0])
def test_a_tokenizer_length_that_is_none_is_no_limit(own_folder: Path, limit: Any) -> None:
    edit_json(own_folder / "tokenizer_config.json", model_max_length=limit)
    assert read_modules(own_folder).max_seq_length is None
