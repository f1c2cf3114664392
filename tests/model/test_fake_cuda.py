"""The encoder on a GPU that is not there: what every operator of a micro-batch does with devices, types and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, Op, Watch, empty_model, fake_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from tiny import random_sequences, write_folder, write_json, write_modules

from embedq.model import SentenceEncoder
from embedq.model.backend import dtype_name
from embedq.model.budget import Footprint, tokens_that_fit
from embedq.model.config import MPNetConfig
from embedq.model.mpnet import MPNet
from embedq.model.packing import pack
from embedq.model.pooling import POOLING_MODES, pool
from embedq.model.runtime import CudaRuntime

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Three groups, two of them ragged.
LENGTHS = [64, 62, 60, 31, 30, 9, 6, 5, 2]
BASE = MPNetConfig(
    vocab_size=30527,
    hidden_size=768,
    num_hidden_layers=2,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=514,
    relative_attention_num_buckets=32,
    layer_norm_eps=1e-5,
)
MAX_SCORES = 1 << 27
#: How far the budget's arithmetic may be above what is live at most.
SLACK = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pooling modes, then a Dense: every operator there is behind the encoder."""
    folder = write_folder(tmp_path_factory.mktemp("all"))
    modes = list(POOLING_MODES)
    write_modules(folder, "Pooling", "Dense")
    write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 24, "pooling_mode": modes})
    pooled_dim = 24 * len(modes)
    write_json(
        folder / "2_Dense" / "config.json",
        {
            "in_features": pooled_dim,
            "out_features": 10,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        },
    )
    tensors = {"linear.weight": torch.zeros(10, pooled_dim), "linear.bias": torch.zeros(10)}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    return folder


def encode(watch: Watch, folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """A micro-batch's vectors; `watch` then knows what it took."""
    encoder = SentenceEncoder(folder, name="fake", revision="0", device=CUDA, dtype=dtype_name(dtype))
    watch.reset()
    with torch.no_grad():
        vectors = encoder._embedder.encode_packed(random_sequences(LENGTHS))
        encoder._embedder.runtime.download(vectors)
    return vectors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_micro_batch_stays_on_the_gpu_between_two_copies(folder: Path, dtype: torch.dtype) -> None:
    with fake_gpu() as watch:
        vectors = encode(watch, folder, dtype)
        assert (str(vectors.device), vectors.dtype, tuple(vectors.shape)) == ("cuda:0", torch.float32, (9, 10))
    crossing = [op for op in watch.ops if {spec.device for spec in (*op.inputs, *op.outputs)} == {"cuda:0", "cpu"}]
    assert [op.name for op in crossing] == ["copy_.default"] * 2
    up, down = crossing
    assert [(spec.device, spec.dtype) for spec in up.inputs] == [("cuda:0", torch.uint8), ("cpu", torch.uint8)]
    assert [(spec.device, spec.dtype) for spec in down.inputs] == [("cpu", torch.float32), ("cuda:0", torch.float32)]
    assert [op for op in watch.ops if op.synchronizes] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layers_compute_in_their_dtype_and_what_follows_in_float32(folder: Path, dtype: torch.dtype) -> None:
    with fake_gpu() as watch:
        encode(watch, folder, dtype)
    for name in ("addmm", "baddbmm", "bmm", "native_layer_norm", "gelu", "_softmax"):
        assert len(dtypes_of(watch, name)) > 0, name
    for name in ("baddbmm", "bmm", "gelu", "_softmax"):
        assert dtypes_of(watch, name) == {dtype}, name
    # mean and deviation of a half precision LayerNorm are float32, its result is not
    assert {op.outputs[0].dtype for op in ops(watch, "native_layer_norm")} == {dtype}
    assert dtypes_of(watch, "addmm") == {dtype, torch.float32}  # layers, Dense
    assert dtypes_of(watch, "segment_reduce") == {torch.float32}


def test_quantized_products_are_of_sizes_that_cublas_takes(tmp_path: Path) -> None:
    """Neither the model's widths are, nor the rows of a text of one token."""
    folder = write_folder(tmp_path, hidden_size=36, intermediate_size=44)
    with fake_gpu() as watch:
        encoder = SentenceEncoder(folder, name="fake", revision="0", device=CUDA, dtype="int8")
        for lengths in (LENGTHS, [1]):
            watch.reset()
            with torch.no_grad():
                encoder._embedder.encode_packed(random_sequences(lengths))
            products = ops(watch, "_int_mm")
            assert len(products) == 4 * 2
            for op in products:
                left, right = (spec.shape for spec in op.inputs)
                assert left[0] > 16
                assert left[1] % 8 == right[1] % 8 == 0
            assert dtypes_of(watch, "bmm") == {torch.bfloat16}
            assert [op for op in watch.ops if op.synchronizes and op.name != "copy_.default"] == []


def ops(watch: Watch, name: str) -> list[Op]:
    return [op for op in watch.ops if op.name.split(".")[0] == name]


def dtypes_of(watch: Watch, name: str) -> set[torch.dtype]:
    return {op.outputs[0].dtype for op in ops(watch, name)}


def test_linears_see_no_padding(folder: Path) -> None:
    with fake_gpu() as watch:
        encode(watch, folder, torch.float16)
    rows = {op.outputs[0].shape[0] for op in ops(watch, "addmm") if op.outputs[0].dtype == torch.float16}
    assert rows == {sum(LENGTHS)}
    scores = [op.outputs[0].shape for op in ops(watch, "baddbmm")]
    groups = [(3 * 3, 64, 64), (2 * 3, 31, 31), (3 * 3, 9, 9), (1 * 3, 2, 2)]
    assert scores == groups * 2


@pytest.mark.parametrize("part", ["ids", "positions", "lengths", "gather", "scatter", "is_padding"])
def test_a_tensor_left_on_the_host_is_an_error(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """The check of the tests above can fail."""
    upload = CudaRuntime.upload
    place = ["ids", "positions", "lengths", "gather", "scatter", "is_padding"].index(part)

    def forgetful(runtime: CudaRuntime, arrays: Sequence[Any]) -> list[torch.Tensor]:
        tensors = upload(runtime, arrays)
        tensors[place] = tensors[place].to("cpu")
        return tensors

    monkeypatch.setattr(CudaRuntime, "upload", forgetful)
    with fake_gpu(), torch.no_grad():
        model = empty_model(BASE, torch.float16, MAX_SCORES)
        with pytest.raises(RuntimeError, match="at least two devices"):
            pooled(model, random_sequences([9, 8]), ["mean"])


def test_a_look_at_a_value_is_seen() -> None:
    """The check for synchronising operators can fail."""
    with fake_gpu() as watch:
        hidden = torch.empty(3, 4, device=CUDA)
        hidden.to(torch.device("cpu"))
        assert [op.name for op in watch.ops if op.synchronizes] == ["_to_copy.default"]
        with pytest.raises(RuntimeError):
            hidden.sum().item()


def pooled(model: MPNet, sequences: list[NDArray[np.int32]], modes: list[str]) -> torch.Tensor:
    placed = model.place(pack(sequences))
    return pool(model.run(placed), placed.lengths, modes)


def peak_bytes(lengths: list[int], dtype: torch.dtype, modes: list[str], config: MPNetConfig = BASE) -> int:
    """What a micro-batch has live at most beside the weights."""
    with fake_gpu() as watch, torch.no_grad():
        model = empty_model(config, dtype, MAX_SCORES)
        watch.reset()
        weights = watch.live_bytes()
        pooled(model, [np.zeros(length, dtype=np.int32) for length in lengths], modes)
        return watch.peak_bytes - weights


def bound(lengths: list[int], dtype: torch.dtype, modes: list[str], config: MPNetConfig = BASE) -> int:
    pooled_dim = len(modes) * config.hidden_size
    element_bytes = 4 if dtype == torch.int8 else dtype.itemsize  # the sums of bytes
    return Footprint(config, element_bytes, MAX_SCORES, lengths[0], pooled_dim).num_bytes(sum(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [[512] * 32, [384] * 6, [512], [128] * 128, [12] * 300, [1] * 500, [300, 280, 200, 64, 64, 60, 9, 8, 7, 2] * 1],
    ids=lambda lengths: f"{len(lengths)} of {lengths[0]}",
)
def test_the_budget_is_above_what_is_live_and_not_far(lengths: list[int], dtype: torch.dtype) -> None:
    peak = peak_bytes(lengths, dtype, ["mean"])
    assert peak <= bound(lengths, dtype, ["mean"]) <= SLACK * peak


@pytest.mark.parametrize(
    "lengths", [[5] + [1] * 2000, [6] + [2] * 2000, [40, *[35] * 100], [512, *[448] * 20]], ids=lambda ids: str(ids[:2])
)
def test_the_budget_holds_for_the_worst_padding(lengths: list[int]) -> None:
    assert peak_bytes(lengths, torch.float16, ["mean"]) <= bound(lengths, torch.float16, ["mean"])


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=60),
    intermediate=st.sampled_from([8, 96, 400]),
    heads=st.sampled_from([1, 4, 24]),
    modes=st.lists(st.sampled_from(list(POOLING_MODES)), min_size=1, max_size=6, unique=True),
)
def test_the_budget_holds_for_any_shape(lengths: list[int], intermediate: int, heads: int, modes: list[str]) -> None:
    config = MPNetConfig(100, 96, 1, heads, intermediate, 66, 32, 1e-5)
    lengths = sorted(lengths, reverse=True)
    assert peak_bytes(lengths, torch.float16, modes, config) <= bound(lengths, torch.float16, modes, config)


def test_scores_are_bounded_however_long_the_batch() -> None:
    footprint = Footprint(BASE, 2, MAX_SCORES, 512, 768)
    per_token = (footprint.num_bytes(1 << 22) - footprint.num_bytes(1 << 21)) / (1 << 21)
    assert per_token == (footprint.num_bytes(1 << 24) - footprint.num_bytes(1 << 23)) / (1 << 23)


@pytest.mark.parametrize(
    ("free_bytes", "expected"), [(139 << 30, 16384), (4 << 30, 16384), (1 << 30, 8192), (300 << 20, 2048), (0, 512)]
)
def test_the_default_budget_comes_from_the_free_memory(free_bytes: int, expected: int) -> None:
    tokens = tokens_that_fit(Footprint(BASE, 2, MAX_SCORES, 512, 768), free_bytes, 16384)
    assert tokens == expected


def test_an_encoder_takes_its_budget_from_the_gpu(folder: Path) -> None:
    with fake_gpu(total_bytes=1 << 30):
        roomy = SentenceEncoder(folder, name="fake", revision="0", device=CUDA, dtype="float16")
    with fake_gpu(total_bytes=10 << 20):
        cramped = SentenceEncoder(folder, name="fake", revision="0", device=CUDA, dtype="float16")
        told = SentenceEncoder(folder, name="fake", revision="0", device=CUDA, dtype="float16", max_batch_tokens=9000)
        told.warm_up()
    assert roomy.max_batch_tokens == 16384
    assert 64 < cramped.max_batch_tokens < 16384
    assert told.max_batch_tokens == 9000
