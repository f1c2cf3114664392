"""config.json and the weights: what is read, and one clear error for everything that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_json, random_sequences, reference, reference_states, write_folder, write_json

from embedq.model import ModelFormatError, WeightsError
from embedq.model.backend import choose_backend
from embedq.model.config import read_config
from embedq.model.mpnet import MPNet
from embedq.model.packing import pack
from embedq.model.weights import Checkpoint, is_finite

Tensors = dict[str, torch.Tensor]


def states(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    config = read_config(folder)
    model = MPNet(config, Checkpoint(folder), choose_backend(torch.device("cpu"), dtype, config))
    with torch.inference_mode():
        return model(pack(random_sequences([9, 4])))


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path)


def test_the_config_is_read(own_folder: Path) -> None:
    config = read_config(own_folder)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim, config.max_length) == (24, 3, 8, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, r"config.json.*model_type is 'bert'.*only 'mpnet'"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"hidden_size": None}, "config.json: field 'hidden_size' is missing"),
        ({"num_hidden_layers": "two"}, "config.json: field 'num_hidden_layers' must be int, not 'two'"),
        ({"vocab_size": True}, "config.json: field 'vocab_size' must be int"),
        ({"hidden_size": 25}, r"config.json: hidden_size 25 is not divisible by num_attention_heads 3"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers must be above 0"),
        ({"max_position_embeddings": 2}, "config.json: max_position_embeddings 2"),
        ({"relative_attention_num_buckets": 3}, "config.json: relative_attention_num_buckets"),
        ({"relative_attention_num_buckets": 512}, "relative_attention_num_buckets must be below 512"),
        ({"layer_norm_eps": float("nan")}, "'layer_norm_eps' must be a finite number"),
        ({"layer_norm_eps": float("inf")}, "'layer_norm_eps' must be a finite number"),
        ({"layer_norm_eps": 10**400}, "'layer_norm_eps' must be a finite number"),
        ({"hidden_act": "relu"}, "config.json: hidden_act is 'relu'"),
    ],
)
def test_a_bad_config_names_file_and_field(own_folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(own_folder / "config.json", **changes)
    with pytest.raises(ModelFormatError, match=message):
        read_config(own_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[" * 100_000, "cannot be read as JSON"), ("[]", "must hold a JSON object")],
)
def test_a_config_that_is_no_json_object_names_the_file(own_folder: Path, content: str, message: str) -> None:
    (own_folder / "config.json").write_text(content)
    with pytest.raises(ModelFormatError, match=rf"config\.json.*{message}"):
        read_config(own_folder)


def test_a_missing_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"config\.json is missing"):
        read_config(tmp_path)


def test_other_numbers_of_buckets_are_honoured_with_a_warning(
    own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(own_folder / "config.json", relative_attention_num_buckets=20)
    assert read_config(own_folder).relative_attention_num_buckets == 20
    assert "relative_attention_num_buckets" in caplog.text


def test_a_prefix_and_known_extras_do_not_matter(own_folder: Path) -> None:
    expected = states(own_folder)

    def as_masked_lm(tensors: Tensors) -> Tensors:
        extras = {
            "lm_head.dense.weight": torch.zeros(2, 2),
            "lm_head.bias": torch.zeros(2),
            "mpnet.pooler.dense.bias": torch.zeros(24),
            "mpnet.embeddings.position_ids": torch.arange(66)[None],
        }
        return {f"mpnet.{name}": tensor for name, tensor in tensors.items() if "pooler" not in name} | extras

    rewrite(own_folder, as_masked_lm)
    assert torch.equal(states(own_folder), expected)


def test_shards_are_read(own_folder: Path) -> None:
    expected = states(own_folder)
    whole = own_folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in part}, own_folder / file)
        weight_map |= dict.fromkeys(part, file)
    whole.unlink()
    write_json(own_folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    assert torch.equal(states(own_folder), expected)
    assert len(Checkpoint(own_folder).sha256()) == 64
    (own_folder / file).unlink()
    with pytest.raises(ModelFormatError, match="names files that are missing: model-00002"):
        Checkpoint(own_folder)


def test_an_index_without_a_map_names_the_field(own_folder: Path) -> None:
    (own_folder / "model.safetensors").unlink()
    write_json(own_folder / "model.safetensors.index.json", {})
    with pytest.raises(ModelFormatError, match="weight_map"):
        Checkpoint(own_folder)


def test_one_error_names_every_tensor_that_does_not_fit(own_folder: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        del tensors["encoder.layer.1.attention.attn.q.bias"]
        tensors["encoder.layer.0.output.dense.bias"] = torch.zeros(7)
        tensors["encoder.layer.0.output.dense.weight"] = tensors["encoder.layer.0.output.dense.weight"].long()
        return tensors | {"encoder.layer.2.surprise": torch.zeros(1)}

    rewrite(own_folder, spoil)
    with pytest.raises(WeightsError) as caught:
        states(own_folder)
    message = str(caught.value)
    for part in (
        "encoder.layer.1.attention.attn.q.bias is missing",
        "encoder.layer.2.surprise is unexpected",
        "encoder.layer.0.output.dense.bias has shape (7,), expected (24,)",
        "encoder.layer.0.output.dense.weight has dtype I64",
    ):
        assert part in message


def test_a_long_list_of_problems_is_shortened(own_folder: Path) -> None:
    edit_json(own_folder / "config.json", num_hidden_layers=12)
    with pytest.raises(WeightsError, match=r"is missing; .* and 152 more$"):
        states(own_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    ["encoder.layer.1.intermediate.dense.weight", "embeddings.LayerNorm.bias", "embeddings.word_embeddings.weight"],
)
def test_a_tensor_that_is_not_finite_is_named(own_folder: Path, name: str, value: float) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[-1] = value
        return tensors

    rewrite(own_folder, spoil)
    with pytest.raises(WeightsError, match=rf"{name} holds NaN or Inf"):
        states(own_folder)


def test_large_weights_are_no_infinity(own_folder: Path) -> None:
    def enlarge(tensors: Tensors) -> Tensors:
        tensors["embeddings.word_embeddings.weight"][:] = 3e38  # the sum of two is none
        return tensors

    rewrite(own_folder, enlarge)
    assert is_finite(Checkpoint(own_folder).read(["embeddings.word_embeddings.weight"]).popitem()[1])


def test_weights_beyond_float16_are_named_where_it_is_asked_for(own_folder: Path) -> None:
    def enlarge(tensors: Tensors) -> Tensors:
        tensors["encoder.layer.0.output.dense.weight"][3, 3] = 70000.0
        return tensors

    rewrite(own_folder, enlarge)
    assert states(own_folder).isfinite().all()
    with pytest.raises(WeightsError, match=r"encoder.layer.0.output.dense.weight has weights beyond float16's 65504"):
        states(own_folder, torch.float16)


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 21, "num_attention_heads": 3, "intermediate_size": 37},
        {"hidden_size": 770, "num_attention_heads": 10, "intermediate_size": 99, "num_hidden_layers": 1},
        {"hidden_size": 5, "num_attention_heads": 5, "intermediate_size": 1},
        {"hidden_size": 13, "num_attention_heads": 1, "intermediate_size": 7},
    ],
    ids=lambda shape: f"{shape['hidden_size']} in {shape['num_attention_heads']} heads",
)
def test_odd_sizes_give_the_references_numbers(tmp_path: Path, shape: dict[str, Any]) -> None:
    folder = write_folder(tmp_path, **shape)
    ours, theirs = states(folder), reference(folder)
    expected = torch.cat([reference_states(theirs, ids)[-1] for ids in random_sequences([9, 4])])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    half = states(folder, torch.bfloat16).float()
    assert torch.nn.functional.cosine_similarity(half, expected).min() > 0.98


def test_a_tensor_that_is_there_twice_is_an_error(own_folder: Path) -> None:
    name = "embeddings.LayerNorm.bias"
    rewrite(own_folder, lambda tensors: tensors | {f"mpnet.{name}": tensors[name].clone()})
    with pytest.raises(WeightsError, match=f"{name} is there twice"):
        states(own_folder)


@pytest.mark.parametrize("kept_bytes", [0, 4, 1000, -100])
def test_a_file_cut_short_is_named_with_what_to_do(own_folder: Path, kept_bytes: int) -> None:
    path = own_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ModelFormatError, match=r"model\.safetensors is corrupt or cut short.*fetch the model again"):
        states(own_folder)


def test_a_corrupt_header_is_named(own_folder: Path) -> None:
    path = own_folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"x" * 32
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"model\.safetensors is corrupt"):
        states(own_folder)


def test_pickle_is_not_read_and_the_error_says_how_to_convert(own_folder: Path) -> None:
    (own_folder / "model.safetensors").rename(own_folder / "pytorch_model.bin")
    with pytest.raises(ModelFormatError, match=r"pytorch_model\.bin, a pickle.*not read.*save it again"):
        Checkpoint(own_folder)


def test_missing_weights_are_named(own_folder: Path) -> None:
    (own_folder / "model.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"model\.safetensors is missing"):
        Checkpoint(own_folder)
