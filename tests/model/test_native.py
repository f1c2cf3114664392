"""The CPU kernels against double precision and against the same formulas in torch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from embedq.model import native
from embedq.model.attention import GroupedAttention, batched_product, sdpa_product
from embedq.model.linear import LinearWeights
from embedq.model.native import NativeAttention, NativeLinear
from embedq.model.position_bias import PositionBias
from embedq.model.quantization import Int8Linear, quantize

FLOAT_DTYPES = [torch.float32, torch.bfloat16]
#: Largest error relative to the largest output: one rounding of the type, and of the operands for bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def needs(dtype: torch.dtype) -> None:
    if not native.runs(dtype):
        pytest.skip(f"no native kernels for {dtype} on this CPU")


def test_the_kernels_are_built_where_everything_is_tested() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("an installation without a compiler is allowed elsewhere")
    assert native.missing() is None


@pytest.fixture
def _fresh_library() -> Iterator[None]:
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.usefixtures("_fresh_library")
@pytest.mark.parametrize("fault", ["absent", "no library", "another version's", "no such threads"])
def test_a_library_that_cannot_be_used_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    if fault in ("another version's", "no such threads"):
        needs(torch.float32)
        native._library.cache_clear()
    if fault in ("absent", "no library"):
        monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    if fault == "no library":
        (tmp_path / "_native.abi3.so").write_bytes(b"of another kind of CPU")
    if fault == "another version's":
        monkeypatch.setattr(native, "INTERFACE", -1)
    if fault == "no such threads":
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    reason = "not built with this installation" if fault == "absent" else "cannot be loaded"
    assert reason in str(native.missing())
    assert (reason in caplog.text) == (fault != "absent")
    assert not native.runs(torch.float32)
    with pytest.raises(ValueError, match="no kernels run in"):
        NativeLinear(random_weights(32, 32), torch.float32, torch.float32)


def random_weights(out_features: int, in_features: int) -> LinearWeights:
    return LinearWeights(torch.randn(out_features, in_features), torch.randn(out_features))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 100, 257])
@pytest.mark.parametrize(("out_features", "in_features"), [(32, 32), (96, 64), (64, 2080), (1120, 288)])
def test_products_are_those_of_double_precision(
    dtype: torch.dtype, x_dtype: torch.dtype, rows: int, out_features: int, in_features: int
) -> None:
    needs(dtype)
    torch.manual_seed(rows)
    weights = random_weights(out_features, in_features)
    x, residual = torch.randn(rows, in_features).to(x_dtype), torch.randn(rows, out_features)
    exact = functional.linear(*(tensor.double() for tensor in (x, weights.weight, weights.bias)))
    ours = NativeLinear(weights, dtype, dtype)
    for got, expected in (
        (ours(x), exact),
        (ours.gelu(x), functional.gelu(exact)),
        (ours.add(x, residual), exact + residual),
    ):
        assert (got.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    assert ours(x).dtype == ours.gelu(x).dtype == dtype
    assert ours.add(x, residual).dtype == torch.float32


def test_gelu_is_exact_from_tail_to_tail() -> None:
    needs(torch.float32)
    x = torch.cat([torch.linspace(-30, 30, 60_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])])
    x = functional.pad(x, (0, -len(x) % 32)).view(-1, 32)
    identity = NativeLinear(LinearWeights(torch.eye(32), torch.zeros(32)), torch.float32, torch.float32)
    expected = functional.gelu(x.double())
    assert ((identity.gelu(x) - expected).abs() <= 2e-7 * x.abs().clamp(min=1)).all()


def test_long_sums_round_no_worse_than_torchs() -> None:
    needs(torch.float32)
    torch.manual_seed(0)
    weights, x = random_weights(64, 3072), torch.randn(200, 3072)
    exact = functional.linear(*(tensor.double() for tensor in (x, weights.weight, weights.bias)))

    def error(y: torch.Tensor) -> float:
        return float((y - exact).square().mean().sqrt())

    ours = error(NativeLinear(weights, torch.float32, torch.float32)(x))
    assert ours <= 1.5 * error(functional.linear(x, weights.weight, weights.bias))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    in_features=st.sampled_from([32, 96, 768]),
    smooth=st.booleans(),
    spread=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_quantized_products_are_torchs(rows: int, in_features: int, smooth: bool, spread: float) -> None:
    needs(torch.int8)
    torch.manual_seed(rows)
    x = torch.randn(rows, in_features) * spread
    x[0] = 0
    weights = quantize(random_weights(64, in_features), torch.rand(in_features) + 0.1 if smooth else None)
    residual = torch.randn(rows, 64)
    ours = NativeLinear(weights, torch.int8, torch.float32)
    theirs = Int8Linear(weights, torch.device("cpu"))
    for got, expected in (
        (ours(x), theirs(x)),
        (ours.gelu(x), theirs.gelu(x)),
        (ours.add(x, residual), theirs.add(x, residual)),
    ):
        # A value at the border of two bytes may fall to either side: a 255th of the row's range, times a weight.
        torch.testing.assert_close(got, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
        assert (got - expected).abs().mean() <= 1e-3 * expected.abs().mean()


def test_rows_that_are_not_finite_stay_so() -> None:
    """A quantizer that clamps would turn them into numbers, and a broken vector would pass for a good one."""
    needs(torch.int8)
    x = torch.randn(4, 64)
    x[1, 3], x[2, 5], x[3, 7] = math.nan, math.inf, -math.inf
    for weights in (quantize(random_weights(32, 64)), random_weights(32, 64)):
        y = NativeLinear(weights, torch.int8 if weights.is_quantized else torch.float32, torch.float32)(x)
        assert y[0].isfinite().all()
        assert not y[1:].isfinite().any()


def test_what_no_kernel_takes_is_refused() -> None:
    """It would be read beyond its end."""
    with pytest.raises(ValueError, match="no multiple of 32"):
        NativeLinear(random_weights(40, 64), torch.float32, torch.float32)
    with pytest.raises(ValueError, match="float32 weights"):
        NativeLinear(random_weights(32, 64), torch.int8, torch.float32)
    for head_dim, max_length in ((24, 70), (32, native.MAX_KEYS + 1)):
        bias = PositionBias.from_buckets(torch.randn(32, 2), max_length)
        with pytest.raises(ValueError, match="attention does not run"):
            NativeAttention(bias, head_dim, torch.float32)


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.int8], ids=str)
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    needs(dtype)
    weights = random_weights(64, 32)
    linear = NativeLinear(quantize(weights) if dtype == torch.int8 else weights, dtype, torch.float32)
    assert linear(torch.empty(0, 32)).shape == linear.gelu(torch.empty(0, 32)).shape == (0, 64)
    if dtype != torch.int8:
        bias = PositionBias.from_buckets(torch.randn(32, 2), max_length=70)
        assert NativeAttention(bias, 32, dtype).prepare([], [])(torch.empty(0, 192)).shape == (0, 64)


def test_scales_of_any_float_type_are_read_as_numbers() -> None:
    needs(torch.int8)
    quantized = quantize(random_weights(64, 32), torch.rand(32) + 0.1)
    assert quantized.scale is not None
    assert quantized.input_factor is not None
    halves = LinearWeights(
        quantized.weight, quantized.bias.bfloat16(), quantized.scale.bfloat16(), quantized.input_factor.bfloat16()
    )
    x = torch.randn(5, 32)
    got, expected = NativeLinear(halves, torch.int8, torch.float32)(x), Int8Linear(halves, torch.device("cpu"))(x)
    torch.testing.assert_close(got, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)


def test_a_default_device_elsewhere_changes_nothing() -> None:
    needs(torch.float32)
    linear, x = NativeLinear(random_weights(64, 32), torch.float32, torch.float32), torch.randn(3, 32)
    expected = linear(x)
    with torch.device("meta"):
        assert torch.equal(linear(x), expected)


def test_threads_do_not_disturb_each_other() -> None:
    needs(torch.float32)
    linear = NativeLinear(random_weights(96, 64), torch.float32, torch.float32)
    inputs = [torch.randn(rows, 64) for rows in range(1, 60)]
    expected = [linear(x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        for got, alone in zip(threads.map(linear, inputs), expected, strict=True):
            assert torch.equal(got, alone)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_that_runs_out_is_an_error_and_no_end_of_the_process() -> None:
    needs(torch.float32)
    code = (
        "import resource, torch\n"
        "from embedq.model.linear import LinearWeights\n"
        "from embedq.model.native import NativeLinear\n"
        "linear = NativeLinear(LinearWeights(torch.randn(32, 2048), torch.randn(32)), torch.float32, torch.float32)\n"
        "x = torch.randn(20_000, 2048, dtype=torch.bfloat16)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 80_000_000, limit[1]))\n"
        "try: linear(x)\n"
        "except torch.OutOfMemoryError as err: print(err)\n"
        "resource.setrlimit(resource.RLIMIT_AS, limit)\n"
        "print(tuple(linear(x).shape))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.splitlines() == ["native kernels: can't allocate memory", "(20000, 32)"]


def naive_attention(qkv: torch.Tensor, lengths: list[int], bias: PositionBias) -> torch.Tensor:
    """(T, hidden): one text and one head at a time, in double precision."""
    contexts = []
    for text in qkv.double().split(lengths):
        length, width = len(text), text.shape[1] // 3
        heads = text.view(length, 3, bias.num_heads, -1).permute(1, 2, 0, 3)  # (3, heads, L, dim)
        scores = heads[0] @ heads[1].transpose(1, 2) / math.sqrt(heads.shape[-1])
        offsets = torch.arange(length)[None, :] - torch.arange(length)[:, None] + bias.reach
        attended = (scores + bias.by_offset.double()[:, offsets]).softmax(-1) @ heads[2]
        contexts.append(attended.transpose(0, 1).reshape(length, width))
    return torch.cat(contexts)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([32, 64, 96]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    name=st.sampled_from(["bmm", "sdpa", "native"]),
)
def test_every_attention_is_the_naive_one(
    lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, name: str
) -> None:
    if name == "native":
        needs(dtype)
    lengths.sort(reverse=True)
    torch.manual_seed(sum(lengths))
    bias = PositionBias.from_buckets(torch.randn(32, heads), max_length=70)
    qkv = (torch.randn(sum(lengths), 3 * heads * head_dim) * 2).to(dtype)
    if name == "native":
        attention = NativeAttention(bias, head_dim, dtype)
    else:
        product = {"bmm": batched_product, "sdpa": sdpa_product}[name]
        attention = GroupedAttention(PositionBias(bias.by_offset.to(dtype)), product, max_scores=heads * 5_000)
    arrays = [torch.from_numpy(array) for array in attention.host_arrays(lengths)]
    context = attention.prepare(lengths, arrays)(qkv)
    expected = naive_attention(qkv, lengths, bias)
    assert context.dtype == dtype
    assert (context.double() - expected).abs().max() <= 5 * TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_longest_texts_are_attended_to(dtype: torch.dtype) -> None:
    needs(dtype)
    torch.manual_seed(0)
    lengths = [native.MAX_KEYS, native.MAX_KEYS - 1, 1]
    bias = PositionBias.from_buckets(torch.randn(32, 2), max_length=native.MAX_KEYS)
    qkv = torch.randn(sum(lengths), 3 * 64).to(dtype)
    context = NativeAttention(bias, 32, dtype).prepare(lengths, [])(qkv)
    expected = naive_attention(qkv, lengths, bias)
    assert (context.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_one_thread_gives_what_many_give() -> None:
    needs(torch.float32)
    torch.manual_seed(0)
    linear, x = NativeLinear(random_weights(96, 64), torch.float32, torch.float32), torch.randn(300, 64)
    threads = torch.get_num_threads()
    many = linear(x)
    try:
        torch.set_num_threads(1)
        assert torch.equal(linear(x), many)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_text_gets_the_same_bits_whatever_shares_its_micro_batch(dtype: torch.dtype) -> None:
    needs(dtype)
    torch.manual_seed(0)
    weights = random_weights(192, 64)
    linear = NativeLinear(quantize(weights) if dtype == torch.int8 else weights, dtype, torch.float32)
    lengths = [40, 33, 13, 12, 5, 1]
    x = torch.randn(sum(lengths), 64)
    bias = PositionBias.from_buckets(torch.randn(32, 2), max_length=40)
    element = torch.float32 if dtype == torch.int8 else dtype
    attention = NativeAttention(bias, 32, element)

    def run(rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return attention.prepare(lengths, [])(linear(rows).to(element))

    together = run(x, lengths).split(lengths)
    for rows, expected in zip(x.split(lengths), together, strict=True):
        assert torch.equal(run(rows, [len(rows)]), expected)
