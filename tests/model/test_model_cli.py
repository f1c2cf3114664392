"""`embedq model fetch|inspect|verify`, run through click on a tiny model and, where it is cached, on the real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from fake_hub import COMMIT, running_hub
from safetensors.numpy import load_file, save_file
from tiny_model_folder import CONFIG, write_tiny_model

from embedq.model import SentenceEncoder, verify
from embedq.model.cli import model_group
from embedq.model.errors import DeviceError, ModelFormatError, ModelNotFoundError
from embedq.model.mpnet import tensor_shapes
from embedq.model.terminal import BarProgress, LineProgress


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EMBEDQ_MODEL", "EMBEDQ_REVISION", "EMBEDQ_DEVICE", "EMBEDQ_DTYPE", "EMBEDQ_MODEL_SOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("EMBEDQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    write_tiny_model(folder)
    return folder


def _run(*args: str | Path) -> Result:
    """With the errors the command raises: the main command line shows them."""
    return CliRunner().invoke(model_group, [str(arg) for arg in args], catch_exceptions=False)


def _checks(folder: Path, *options: str) -> tuple[int, dict[str, bool]]:
    result = _run("verify", folder, "--device", "cpu", "--json", *options)
    document = json.loads(result.stdout)
    assert document["ok"] == (result.exit_code == 0)
    return result.exit_code, {check["name"]: check["ok"] for check in document["checks"]}


def test_fetch_prints_the_folder_and_nothing_else_on_stdout(tiny: Path) -> None:
    result = _run("fetch", tiny)
    assert result.exit_code == 0
    assert result.stdout == f"{tiny}\n"


def test_the_model_may_come_from_the_environment(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_MODEL", str(tiny))
    assert _run("fetch").stdout == f"{tiny}\n"


def test_fetch_takes_a_revision_of_a_hub_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.relative_to(tiny).as_posix(): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    with running_hub("org/tiny", files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        path = Path(_run("fetch", "org/tiny", "--revision", "v1").stdout.strip())
        assert path.name == COMMIT
        assert json.loads(_run("inspect", "org/tiny", "--json").stdout)["revision"] == COMMIT
        assert _run("verify", "org/tiny").exit_code == 0
        (path / "config.json").write_bytes(files["config.json"].replace(b"32", b"23"))
        result = _run("verify", "org/tiny")
    assert result.exit_code == 1
    assert "FAILED  files: config.json differ" in result.stdout


def test_errors_are_raised_not_printed() -> None:
    with pytest.raises(ModelNotFoundError):
        _run("fetch", "./nothing/here")


def test_inspect_json_says_what_the_files_say(tiny: Path) -> None:
    found = json.loads(_run("inspect", tiny, "--json").stdout)
    shapes = tensor_shapes(CONFIG).values()
    assert found == {
        "name": "tiny",
        "path": str(tiny),
        "source": "folder",
        "revision": None,
        "hidden_size": 16,
        "layers": 2,
        "heads": 2,
        "vocab_size": 64,
        "max_positions": 66,
        "max_seq_length": 32,
        "pooling": ["mean"],
        "normalize": True,
        "embedding_dim": 16,
        "prompts": {"query": "find: "},
        "similarity": "cosine",
        "calibration": None,
        "calibrated_dimensions": [],
        "tensors": len(shapes),
        "parameters": sum(int(np.prod(shape)) for shape in shapes),
        "bytes": (tiny / "model.safetensors").stat().st_size,
        "dtype": "float32",
    }


def test_inspect_is_readable_by_people(tiny: Path) -> None:
    output = _run("inspect", tiny).stdout
    assert f"path        {tiny}\n" in output
    assert "2 layers, 2 heads, hidden size 16" in output
    assert "query: 'find: '" in output


def test_inspect_of_a_folder_without_weights_says_so(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"model\.safetensors is missing"):
        _run("inspect", tiny)


def test_inspect_of_weights_cut_short_says_so(tiny: Path) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelFormatError, match="corrupt or cut short"):
        _run("inspect", tiny)


def test_verify_prints_a_line_for_each_check(tiny: Path) -> None:
    result = _run("verify", tiny, "--device", "cpu")
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "ok      files",
        "ok      load",
        "ok      finite",
        "ok      unit length",
        "ok      batch equals single",
    ]


def test_verify_takes_a_dtype(tiny: Path) -> None:
    result = _run("verify", tiny, "--device", "cpu", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "16 dimensions, bfloat16 on cpu" in result.stdout


def test_verify_finds_vectors_that_are_not_finite(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.weight"][:] = 3e38
    save_file(weights, tiny / "model.safetensors")
    exit_code, checks = _checks(tiny)
    assert exit_code == 1
    assert checks == {"files": True, "load": True, "finite": False}


def test_verify_names_a_weight_that_is_not_finite(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.weight"][3] = np.nan
    save_file(weights, tiny / "model.safetensors")
    result = _run("verify", tiny, "--device", "cpu")
    assert result.exit_code == 1
    assert "encoder.layer.1.output.LayerNorm.weight holds NaN or Inf" in result.stdout


def test_verify_counts_weights_that_cannot_be_loaded_as_a_failed_check(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    del weights["encoder.layer.1.output.LayerNorm.weight"]
    save_file(weights, tiny / "model.safetensors")
    exit_code, checks = _checks(tiny)
    assert exit_code == 1
    assert checks == {"files": True, "load": False}


def test_verify_finds_a_model_that_computes_something_else(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_known_name", lambda _: verify.ALL_MPNET_BASE_V2)
    exit_code, checks = _checks(tiny)
    assert exit_code == 1
    assert not checks["expected cosines"]


def test_verify_of_a_device_that_is_not_here_is_an_error(tiny: Path) -> None:
    with pytest.raises(DeviceError):
        _run("verify", tiny, "--device", "abacus")


@pytest.mark.parametrize("command", ["fetch", "inspect", "verify"])
def test_every_help_text_has_an_example(command: str) -> None:
    output = _run(command, "--help").stdout
    assert "Example" in output
    assert f"embedq model {command}" in output


@pytest.mark.real_model
def test_verify_of_the_real_model_passes(real_model_path: Path) -> None:
    exit_code, checks = _checks(real_model_path, "--dtype", "float32")
    assert exit_code == 0
    assert checks["expected cosines"]


@pytest.mark.real_model
def test_inspect_of_a_copy_under_another_name_names_the_ranges_that_its_vectors_get(
    real_model_path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in real_model_path.iterdir():
        (copy / entry.name).symlink_to(entry)
    found = json.loads(_run("inspect", copy, "--json").stdout)
    assert (found["name"], found["revision"]) == ("copy", None)
    assert found["calibration"] == SentenceEncoder.load(copy, device="cpu", dtype="float32").calibration_digest != ""
    assert 768 in found["calibrated_dimensions"]


def test_away_from_a_terminal_progress_is_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with LineProgress() as progress:
        progress.start("small", 1000)
        progress.start("download", 400_000_000)
        for done_bytes in range(0, 400_000_000, 1_000_000):
            progress.update(done_bytes)
        progress.note("a note")
    assert capsys.readouterr() == ("", "download: 400 MB\na note\n")


def test_on_a_terminal_a_finished_stage_is_shown_as_complete() -> None:
    with BarProgress() as progress:
        progress.start("download", 1000)
        progress.update(10)
        progress.start("verify", 2000)
        progress.note("a [note]")
    assert [task.completed for task in progress._bars.tasks] == [1000, 2000]
