"""`embedq bench encoder` on a tiny random model: tables, JSON, file, what is skipped, and an end by Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_model_folder import write_tiny_model

from embedq.model import DeviceError, ModelOptionError, NonFiniteError, SentenceEncoder
from embedq.model import bench as bench_module
from embedq.model.bench import BenchSettings, EncoderBench, Variant, load_variant
from embedq.model.bench_cli import ATTENTIONS, DTYPES, bench_group
from embedq.model.bench_report import document, markdown
from embedq.model.machine import PeakMemory, describe_machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_single_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "SINGLE_TEXTS", 3)
    for name in ("EMBEDQ_MODEL", "EMBEDQ_DEVICE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    write_tiny_model(folder)
    return folder


def _run(tiny: Path, *args: str | Path) -> Result:
    words = ["encoder", str(tiny), "--device", "cpu", "--rounds", "2", "--num-texts", "4", *map(str, args)]
    return CliRunner().invoke(bench_group, words, catch_exceptions=False)


def _settings(tiny: Path, **changes: Any) -> BenchSettings:
    few = {"rounds": 2, "num_texts": 3, "max_batch_tokens": (16, 64), "dtypes": ("float32", "bfloat16")}
    return BenchSettings(str(tiny), device="cpu", **(few | changes))


def _ignore(label: str, share: float) -> None: ...


def _ran(tiny: Path, **changes: Any) -> EncoderBench:
    bench = EncoderBench(_settings(tiny, **changes))
    bench.run(_ignore)
    return bench


def test_the_tables_name_the_machine_and_every_variant(tiny: Path) -> None:
    result = _run(tiny, "--dtype", "float32", "--dtype", "bfloat16", "--attention", "auto")
    assert result.exit_code == 0
    assert result.stdout.startswith("# tiny on cpu\n")
    assert f"torch {torch.__version__}" in result.stdout
    rows = [line.split("|")[1:4] for line in result.stdout.splitlines() if line.startswith("| ")]
    speeds = [tuple(cell.strip() for cell in row) for row in rows]
    for dtype in ("float32", "bfloat16"):
        assert [corpus for found, _, corpus in speeds if found == dtype][:3] == ["short", "mixed", "long"]
    assert "2,048 tokens" in result.stdout


def test_json_has_the_same_numbers_for_programs(tiny: Path) -> None:
    result = _run(tiny, "--json", "--dtype", "float32", "--corpus", "mixed", "--max-batch-tokens", "32")
    found = json.loads(result.stdout)
    (variant,) = found["variants"]
    (corpus,) = variant["corpora"]
    assert (found["device"], found["rounds"], found["interrupted"]) == ("cpu", 2, False)
    assert (variant["dtype"], variant["attention"]) == ("float32", "auto")
    assert (corpus["min_cosine"], variant["spearman_difference"]) == (pytest.approx(1, abs=1e-6), 0)
    (measured,) = found["corpora"]
    assert corpus["tokens_per_s"] / corpus["texts_per_s"] == pytest.approx(measured["tokens"] / measured["texts"])
    assert corpus["lowest_tokens_per_s"] <= corpus["tokens_per_s"] <= corpus["highest_tokens_per_s"]
    assert 0 < variant["latency_ms"]["p50"] <= variant["latency_ms"]["p99"]
    assert list(variant["max_batch_tokens"]) == ["32"]


def test_the_tables_go_to_a_file_too(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    result = _run(tiny, "--dtype", "float32", "--corpus", "short", "--output", path)
    assert path.read_text() == result.stdout


def test_a_file_that_cannot_be_written_costs_no_results(tiny: Path, tmp_path: Path) -> None:
    words = ["bench", "encoder", tiny, "--dtype", "float32", "--corpus", "short", "--rounds", "1", "--num-texts", "2"]
    command = [sys.executable, "-m", "embedq.worker.cli", *words, "--output", tmp_path / ("x" * 300)]
    shown = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert shown.returncode == 6
    assert shown.stdout.startswith("# tiny on cpu\n")
    assert shown.stderr.splitlines()[-1].endswith("cannot be written (File name too long)")


def test_a_variant_that_is_refused_is_named_with_the_reason(tiny: Path) -> None:
    def load(model: str, *, device: str, variant: Variant) -> SentenceEncoder:
        if variant.attention == "native":
            raise ModelOptionError("attention native needs a compiler")
        return load_variant(model, device=device, variant=Variant(variant.dtype, "auto"))

    settings = _settings(tiny, dtypes=("float32",), attentions=("bmm", "native"))
    bench = EncoderBench(settings, load=load)
    bench.run(_ignore)
    found = document(bench, "tiny", interrupted=False)
    assert [variant["attention"] for variant in found["variants"]] == ["bmm"]
    assert found["skipped"] == [
        {"dtype": "float32", "attention": "native", "reason": "attention native needs a compiler"}
    ]
    assert "Skipped: float32, attention native: attention native needs a compiler" in markdown(found)


def test_a_variant_without_finite_vectors_is_skipped_and_the_others_are_measured(tiny: Path) -> None:
    class Overflowing(SentenceEncoder):
        def encode(self, *_args: Any, **_kwargs: Any) -> Any:
            raise NonFiniteError("NaN or Inf first in layer 2 of 12; float16 ends at 65504", 3)

    def load(model: str, *, device: str, variant: Variant) -> SentenceEncoder:
        kind = Overflowing if variant.dtype == "bfloat16" else SentenceEncoder
        return kind.load(model, device=device, dtype=variant.dtype)

    bench = EncoderBench(_settings(tiny), load=load)
    bench.run(_ignore)
    assert [result.variant.dtype for result in bench.results] == ["float32"]
    assert [skipped.reason for skipped in bench.skipped] == [
        "text 3: NaN or Inf first in layer 2 of 12; float16 ends at 65504"
    ]
    assert [len(found.seconds) for found in bench.results[0].corpora] == [2, 2, 2]


def test_nothing_to_measure_is_an_error_with_the_reason(tiny: Path) -> None:
    def load(model: str, *, device: str, variant: Variant) -> SentenceEncoder:
        raise DeviceError(f"no {variant.dtype} here")

    with pytest.raises(ModelOptionError, match="nothing to measure: no float32 here; no bfloat16 here"):
        EncoderBench(_settings(tiny), load=load).run(_ignore)


def test_the_others_are_compared_with_float32_whatever_the_order(tiny: Path) -> None:
    dtypes = [result.variant.dtype for result in _ran(tiny, dtypes=("bfloat16", "float32")).results]
    assert dtypes == ["float32", "bfloat16"]
    (alone,) = _ran(tiny, dtypes=("bfloat16",), num_texts=12).results
    assert 0.99 < min(found.min_cosine for found in alone.corpora) < 1 - 1e-7
    assert 0 < abs(alone.spearman_difference) < 0.05


def test_each_measurement_is_made_once_a_round(tiny: Path) -> None:
    bench = _ran(tiny, corpora=("short", "long"), rounds=3)
    for result in bench.results:
        assert [len(found.seconds) for found in result.corpora] == [3, 3]
        assert {budget: len(seconds) for budget, seconds in result.sweep.items()} == {16: 3, 64: 3}
        assert len(result.latencies_s) == 3 * 3
    assert bench.sweep_corpus.name == "short"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("too much"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")]
)
def test_a_micro_batch_that_does_not_fit_has_speed_zero(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    encode = SentenceEncoder.encode

    def limited(self: SentenceEncoder, *args: Any, **kwargs: Any) -> Any:
        if self.max_batch_tokens == 64:
            raise error
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(SentenceEncoder, "encode", limited)
    (variant,) = document(_ran(tiny, dtypes=("float32",)), "tiny", interrupted=False)["variants"]
    assert variant["max_batch_tokens"]["16"] > 0
    assert variant["max_batch_tokens"]["64"] == 0


def test_ctrl_c_shows_what_was_measured_so_far(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = EncoderBench._measure

    def once(self: EncoderBench, *args: Any) -> None:
        if self.results[0].latencies_s:
            raise KeyboardInterrupt
        measure(self, *args)

    monkeypatch.setattr(EncoderBench, "_measure", once)
    result = _run(tiny, "--json", "--dtype", "float32", "--dtype", "bfloat16")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    first, second = found["variants"]
    assert found["interrupted"]
    assert first["corpora"][0]["tokens_per_s"] > 0
    assert second["corpora"][0]["tokens_per_s"] is None
    assert second["corpora"][0]["min_cosine"] > 0.9
    assert "Interrupted" in markdown(found)
    assert "- to -" in markdown(found)


def test_ctrl_c_before_anything_was_measured_is_just_the_end(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: EncoderBench, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EncoderBench, "_prepare", interrupted)
    assert _run(tiny).exit_code == 1
    assert "Aborted" in _run(tiny).stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--dtype", "float64"),
        ("--attention", "flash"),
        ("--corpus", "novels"),
        ("--rounds", "0"),
        ("--num-texts", "-1"),
        ("--max-batch-tokens", "0"),
        ("--output", "/nowhere/at/all.md"),
    ],
)
def test_a_bad_option_is_named_before_anything_is_loaded(option: str, value: str, tiny: Path) -> None:
    result = _run(tiny.parent / "missing", option, value)
    assert result.exit_code == 2
    assert option in result.stderr


def test_a_device_that_is_not_here_is_an_error(tiny: Path) -> None:
    with pytest.raises(DeviceError, match="tpu"):
        CliRunner().invoke(bench_group, ["encoder", str(tiny), "--device", "tpu"], catch_exceptions=False)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"num_texts": 0}, {"max_batch_tokens": (8, 0)}])
def test_settings_that_measure_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelOptionError, match="must be above 0"):
        BenchSettings("model", **wrong)


def test_what_is_measured_by_default_can_be_chosen_too() -> None:
    assert {"auto"}.union(*bench_module.DTYPES.values()) == set(DTYPES)
    assert set().union(*bench_module.ATTENTIONS.values()) <= set(ATTENTIONS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_was_freed_again() -> None:
    memory = PeakMemory(CPU)
    before_bytes = memory.growth_bytes()
    torch.ones(64 << 20)
    after_bytes = memory.growth_bytes()
    assert before_bytes is not None
    assert after_bytes is not None
    # 256 MiB: more than an allocator keeps for the next time
    assert 240 << 20 < after_bytes - before_bytes < 300 << 20


def test_the_machine_is_described_by_cores_threads_and_versions() -> None:
    machine = describe_machine(CPU)
    assert f"{torch.get_num_threads()} threads" in machine.details
    assert machine.versions["torch"] == torch.__version__
    assert machine.lines()[0] == f"{machine.device} ({machine.details})"


def test_the_command_is_there_without_loading_torch() -> None:
    code = "import sys; from embedq.worker.cli import main; print('torch' in sys.modules, sorted(main.commands))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert shown.stdout.startswith("False")
    assert "'bench'" in shown.stdout
