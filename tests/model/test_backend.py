"""Which implementation is chosen, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import pytest
import torch
from tiny_model_folder import CONFIG

from embedq.model import DeviceError, ModelOptionError, backend, native
from embedq.model.backend import choose_backend, resolve_dtype
from embedq.model.config import MPNetConfig
from embedq.model.linear import LinearWeights
from embedq.model.quantization import Int8Linear, quantize

CPU = torch.device("cpu")
BASE = MPNetConfig(
    vocab_size=30527,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=514,
    relative_attention_num_buckets=32,
    layer_norm_eps=1e-5,
)
QUANTIZED = quantize(LinearWeights(torch.ones(32, 32), torch.ones(32)))
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    give_cpu(monkeypatch, [*AVX512, "avx512_vnni", "avx512_bf16"])
    return monkeypatch


def give_cpu(monkeypatch: pytest.MonkeyPatch, flags: Iterable[str], *, built: bool = True) -> None:
    for module in (backend, native):
        monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(native, "missing", lambda: None if built else "they were not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_cpu_with_everything_runs_native_kernels(cpu: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    chosen = choose_backend(CPU, dtype, BASE)
    assert chosen.description == "native kernels, native attention"
    assert chosen.residual_dtype == torch.float32
    assert chosen.activation_dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)


def test_int8_without_bfloat16_units_keeps_float32_between_products(cpu: pytest.MonkeyPatch) -> None:
    give_cpu(cpu, [*AVX512, "avx512_vnni"])
    chosen = choose_backend(CPU, torch.int8, BASE)
    assert (chosen.activation_dtype, chosen.description) == (torch.float32, "native kernels, native attention")


def test_amx_multiplies_bfloat16_by_onednn(cpu: pytest.MonkeyPatch) -> None:
    give_cpu(cpu, [*AVX512, "avx512_vnni", "avx512_bf16", "amx_bf16"])
    cpu.setattr(backend, "onednn_agrees", lambda dtype: dtype == torch.bfloat16)
    assert choose_backend(CPU, torch.bfloat16, BASE).description == "torch kernels, native attention"
    assert choose_backend(CPU, torch.int8, BASE).description == "native kernels, native attention"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_old_cpu_runs_torch(cpu: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    give_cpu(cpu, ["avx2"])
    chosen = choose_backend(CPU, dtype, BASE)
    assert chosen.description == "torch kernels, bmm attention"
    assert chosen.residual_dtype == chosen.activation_dtype == dtype


def test_int8_without_vnni_works_with_a_warning_about_speed(
    cpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give_cpu(cpu, AVX512)
    chosen = choose_backend(CPU, torch.int8, BASE)
    assert chosen.description == "torch kernels, native attention"
    assert "int8 runs by torch's operators: this CPU lacks what they need" in caplog.text


def test_quantized_weights_without_vnni_are_left_to_torch(cpu: pytest.MonkeyPatch) -> None:
    """As when a model is quantized: in float32 by native kernels, with quantized products among them."""
    give_cpu(cpu, AVX512)
    linear = choose_backend(CPU, torch.float32, BASE).make_linear(QUANTIZED)
    assert isinstance(linear, Int8Linear)


def test_sizes_that_no_tile_fits_run_torch(cpu: pytest.MonkeyPatch) -> None:
    assert choose_backend(CPU, torch.float32, CONFIG).description == "torch kernels, bmm attention"


@pytest.mark.parametrize(
    ("flags", "built", "config", "reason"),
    [
        (AVX512, False, BASE, "they were not built"),
        (["avx2"], True, BASE, "this CPU lacks what they need"),
        (AVX512, True, CONFIG, "multiples of 32"),
    ],
)
def test_insisting_on_native_kernels_says_what_is_in_the_way(
    cpu: pytest.MonkeyPatch, flags: tuple[str, ...], built: bool, config: MPNetConfig, reason: str
) -> None:
    give_cpu(cpu, flags, built=built)
    with pytest.raises(DeviceError, match=reason):
        choose_backend(CPU, torch.float32, config, kernels="native")
    with pytest.raises(DeviceError, match="native attention cannot run"):
        choose_backend(CPU, torch.float32, config, attention="native")


def test_native_kernels_are_for_a_cpu() -> None:
    with pytest.raises(DeviceError, match="they run on a CPU, not on cuda"):
        choose_backend(torch.device("cuda"), torch.bfloat16, BASE, kernels="native")
    assert choose_backend(torch.device("cuda"), torch.bfloat16, BASE).description == "torch kernels, bmm attention"


def test_float16_on_a_cpu_has_no_native_kernels(cpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="they have no such type"):
        choose_backend(CPU, torch.float16, BASE, kernels="native")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ModelOptionError, match="unknown kernels 'fast': use one of auto, native, torch"):
        choose_backend(CPU, torch.float32, BASE, kernels="fast")
    with pytest.raises(ModelOptionError, match="unknown attention 'flash': use one of auto, bmm, sdpa, native"):
        choose_backend(CPU, torch.float32, BASE, attention="flash")


@pytest.mark.parametrize(
    ("capability", "expected", "why"),
    [((8, 0), torch.bfloat16, "tensor cores"), ((7, 5), torch.float16, "no bfloat16 units")],
)
def test_auto_dtype_on_cuda_goes_by_capability_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    expected: torch.dtype,
    why: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    with caplog.at_level(logging.INFO, logger="embedq.model.backend"):
        assert resolve_dtype("auto", torch.device("cuda:0")) == expected
    assert why in caplog.text


@pytest.mark.parametrize(
    ("flags", "speedup", "expected", "why"),
    [
        (["avx2"], 9.0, torch.float32, "neither AVX512_BF16 nor AMX"),
        (["avx512_bf16"], 2.0, torch.bfloat16, "2.0 times as fast"),
        (["amx_bf16"], 4.0, torch.bfloat16, "4.0 times as fast"),
        (["avx512_bf16"], 1.1, torch.float32, "only 1.1 times as fast"),
    ],
)
def test_auto_dtype_on_a_cpu_goes_by_features_and_a_trial(
    cpu: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flags: list[str],
    speedup: float,
    expected: torch.dtype,
    why: str,
) -> None:
    give_cpu(cpu, flags)
    cpu.setattr(backend, "_bfloat16_speedup", lambda: speedup)
    with caplog.at_level(logging.INFO, logger="embedq.model.backend"):
        assert resolve_dtype("auto", CPU) == expected
    assert why in caplog.text


@pytest.fixture
def _fresh_trial() -> Iterator[None]:
    backend._bfloat16_speedup.cache_clear()
    yield
    backend._bfloat16_speedup.cache_clear()


@pytest.mark.usefixtures("_fresh_trial")
def test_the_trial_measures_something_and_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    backend._bfloat16_speedup.cache_clear()
    assert 0.01 < backend._bfloat16_speedup() < 100
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("_fresh_trial")
def test_the_trial_measures_what_would_run(cpu: pytest.MonkeyPatch) -> None:
    give_cpu(cpu, [*AVX512, "avx512_bf16", "amx_bf16"])
    cpu.setattr(backend, "onednn_agrees", lambda dtype: dtype == torch.bfloat16)
    plain, tried = backend._torch_numbers(CPU, torch.float32), []
    cpu.setattr(backend, "_native_numbers", lambda dtype: tried.append(("native", dtype)) or plain)
    cpu.setattr(backend, "_torch_numbers", lambda _device, dtype: tried.append(("torch", dtype)) or plain)
    assert backend._bfloat16_speedup() > 0
    assert tried == [("native", torch.float32), ("torch", torch.bfloat16)]


def test_auto_dtype_takes_quantized_weights_as_they_are() -> None:
    assert resolve_dtype("auto", CPU, is_quantized=True) == torch.int8


def test_int8_is_for_devices_with_integer_products() -> None:
    mps = torch.device("mps")
    assert resolve_dtype("auto", mps, is_quantized=True) == torch.float32
    with pytest.raises(DeviceError, match="int8 runs on cpu and cuda, not on mps: use auto or float32"):
        choose_backend(mps, torch.int8, BASE)


@pytest.mark.parametrize(("name", "dtype"), backend.DTYPES.items())
def test_a_dtype_by_name(name: str, dtype: torch.dtype) -> None:
    assert resolve_dtype(name, CPU) == dtype


def test_auto_dtype_on_mps_is_float32() -> None:
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32


def test_an_unknown_dtype_says_what_is_known() -> None:
    with pytest.raises(DeviceError, match="unknown dtype 'fp32': use auto, float32, float16, bfloat16, int8"):
        resolve_dtype("fp32", CPU)
