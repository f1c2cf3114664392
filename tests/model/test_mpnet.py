"""The encoder on tiny random models: against transformers, and packed against padded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import DEFAULTS, random_sequences, reference, reference_states, write_folder
from torch.nn import functional
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from embedq.model import attention, mpnet
from embedq.model.backend import choose_backend
from embedq.model.config import MPNetConfig, read_config
from embedq.model.mpnet import MPNet
from embedq.model.packing import pack
from embedq.model.position_bias import PositionBias, relative_position_bucket
from embedq.model.weights import Checkpoint

CPU = torch.device("cpu")
#: Largest difference of a hidden state; activations are of order 1 to 10.
HIDDEN_TOLERANCE = 1e-5
#: Least cosine of a token's last hidden state to float32's.
HALF_COSINE = {torch.float16: 0.99999, torch.bfloat16: 0.999}


def load(folder: Path, dtype: torch.dtype = torch.float32, max_scores: int = 1 << 20, **choice: str) -> MPNet:
    config = read_config(folder)
    return MPNet(config, Checkpoint(folder), choose_backend(CPU, dtype, config, max_scores=max_scores, **choice))


def last_states(model: MPNet, sequences: list[NDArray[np.int32]]) -> list[torch.Tensor]:
    """Per sequence; they must come longest first."""
    with torch.inference_mode():
        return list(model(pack(sequences)).float().split([len(sequence) for sequence in sequences]))


def test_a_model_that_keeps_no_layers_gives_the_same(tiny_folder: Path) -> None:
    config = read_config(tiny_folder)
    backend = choose_backend(CPU, torch.float32, config)
    frugal = MPNet(config, Checkpoint(tiny_folder), backend, keep_layers=False)
    sequences = random_sequences([30, 9, 1])
    for _ in range(2):
        for ours, theirs in zip(last_states(frugal, sequences), last_states(load(tiny_folder), sequences), strict=True):
            torch.testing.assert_close(ours, theirs, atol=HIDDEN_TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_buckets", [8, 20, 32, 64])
def test_buckets_are_transformers_for_every_offset(num_buckets: int) -> None:
    offsets = torch.arange(-600, 601)
    assert torch.equal(
        relative_position_bucket(offsets, num_buckets),
        MPNetEncoder.relative_position_bucket(offsets, num_buckets=num_buckets),
    )


@pytest.mark.parametrize("length", [1, 2, 33, 64])
def test_the_position_bias_is_transformers(tiny_folder: Path, length: int) -> None:
    encoder = reference(tiny_folder).encoder
    bias = PositionBias.from_buckets(encoder.relative_attention_bias.weight.detach(), max_length=64)
    assert torch.equal(bias.matrix(length), encoder.compute_position_bias(torch.empty(1, length, 1))[0])


@pytest.mark.parametrize(
    ("heads", "buckets"), [(1, 32), (3, 32), (4, 8), (3, 20), (6, 64)], ids=lambda value: str(value)
)
def test_every_layers_states_are_transformers(tmp_path: Path, heads: int, buckets: int) -> None:
    folder = write_folder(tmp_path, num_attention_heads=heads, relative_attention_num_buckets=buckets)
    ours, theirs = load(folder), reference(folder)
    sequences = random_sequences([64, 63, 40, 39, 37, 9, 2, 1, 1])
    with torch.inference_mode():
        states = [state.split([len(ids) for ids in sequences]) for state in ours.hidden_states(pack(sequences))]
    for place, ids in enumerate(sequences):
        expected = reference_states(theirs, ids)
        assert len(states) == len(expected) == 3
        for layer, state in zip(states, expected, strict=True):
            torch.testing.assert_close(layer[place], state, atol=HIDDEN_TOLERANCE, rtol=0)


def test_five_heads_and_a_padding_token_in_the_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, num_attention_heads=5, hidden_size=40)
    ids = np.array([0, 7, 1, 8, 1, 9, 2], dtype=np.int32)
    expected = reference(folder)(
        torch.from_numpy(ids.astype(np.int64))[None], attention_mask=torch.ones(1, len(ids))
    ).last_hidden_state[0]
    torch.testing.assert_close(last_states(load(folder), [ids])[0], expected, atol=HIDDEN_TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", HALF_COSINE, ids=str)
def test_half_precision_stays_near_float32(tiny_folder: Path, dtype: torch.dtype) -> None:
    sequences = random_sequences([64, 60, 30, 5, 1])
    exact = torch.cat(last_states(load(tiny_folder), sequences))
    half = torch.cat(last_states(load(tiny_folder, dtype), sequences))
    assert half.isfinite().all()
    assert functional.cosine_similarity(exact, half).min() > HALF_COSINE[dtype]


def naive_padded(folder: Path, sequences: list[NDArray[np.int32]]) -> list[torch.Tensor]:
    """The same model written plainly: one padded batch, three projections, a mask added in every layer."""
    config = MPNetConfig(**DEFAULTS)
    checkpoint = Checkpoint(folder)
    weights = checkpoint.read(mpnet.tensor_shapes(config))
    lengths = torch.tensor([len(ids) for ids in sequences])
    longest = int(lengths.max())
    ids = torch.ones(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    places = torch.arange(longest)
    mask = torch.where(places < lengths[:, None], 0.0, -1e9)[:, None, None, :]
    buckets = relative_position_bucket(places[None, :] - places[:, None], config.relative_attention_num_buckets)
    bias = weights["encoder.relative_attention_bias.weight"][buckets].permute(2, 0, 1)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], config.num_attention_heads, -1).transpose(1, 2)

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = norm(x + weights["embeddings.position_embeddings.weight"][places + 2], "embeddings.LayerNorm")
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layer.{index}"
        query, key, value = (heads(linear(x, f"{layer}.attention.attn.{part}")) for part in "qkv")
        scores = query @ key.transpose(-1, -2) / config.head_dim**0.5 + bias + mask
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = norm(linear(context, f"{layer}.attention.attn.o") + x, f"{layer}.attention.LayerNorm")
        inner = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(linear(inner, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
    return [x[row, : len(sequence)] for row, sequence in enumerate(sequences)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=12), max_scores=st.integers(1, 30_000))
def test_packed_is_padded_for_all_lengths(tiny_folder: Path, lengths: list[int], max_scores: int) -> None:
    sequences = random_sequences(sorted(lengths, reverse=True), seed=sum(lengths))
    packed = last_states(load(tiny_folder, max_scores=max_scores), sequences)
    for ours, naive in zip(packed, naive_padded(tiny_folder, sequences), strict=True):
        torch.testing.assert_close(ours, naive, atol=HIDDEN_TOLERANCE, rtol=0)


def test_scores_stay_under_their_bound(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    product = attention.batched_product

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, bias.numel())
        return product(query, key, value, bias)

    sequences = random_sequences([30] * 40)
    whole = last_states(load(tiny_folder), sequences)
    monkeypatch.setitem(attention.PRODUCTS, "bmm", watched)
    bound = 3 * 30 * 30 * 4  # heads * L * L for four texts
    in_parts = last_states(load(tiny_folder, max_scores=bound), sequences)
    assert largest == bound
    for ours, expected in zip(in_parts, whole, strict=True):
        torch.testing.assert_close(ours, expected, atol=HIDDEN_TOLERANCE, rtol=0)


def test_weights_in_float16_on_disk_load_into_float32(tmp_path: Path, tiny_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    stored = {name: tensor.half() for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors")
    sequences = random_sequences([20, 3])
    for ours, exact in zip(
        last_states(load(tmp_path), sequences), last_states(load(tiny_folder), sequences), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact, atol=2e-2, rtol=0)


#: A shape that the native kernels take, with two sizes of heads.
WIDE = {"hidden_size": 128, "intermediate_size": 96, "relative_attention_num_buckets": 20}
#: Mean difference of a hidden state to the reference, relative to the mean state: random wide weights magnify each
#: rounding.
SAME = {torch.float32: 1e-5, torch.bfloat16: 0.15}


@pytest.mark.parametrize("dtype", SAME, ids=str)
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    "choice",
    [{"kernels": "torch"}, {"kernels": "torch", "attention": "sdpa"}, {"attention": "bmm"}, {"attention": "sdpa"}, {}],
    ids=str,
)
def test_every_implementation_gives_the_same_states(
    tmp_path: Path, dtype: torch.dtype, heads: int, choice: dict[str, str]
) -> None:
    folder = write_folder(tmp_path, num_attention_heads=heads, **WIDE)
    sequences = random_sequences([64, 63, 49, 48, 33, 32, 31, 13, 12, 11, 3, 1])
    model = load(folder, dtype, **choice)
    theirs = reference(folder)
    for ours, ids in zip(last_states(model, sequences), sequences, strict=True):
        expected = reference_states(theirs, ids)[-1]
        assert (ours - expected).abs().mean() <= SAME[dtype] * expected.abs().mean()
