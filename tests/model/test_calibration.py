"""Ranges for int8 and uint8: files, what ships, which one an encoder takes, and `embedq model calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save
from tiny import edit_json, write_json

from embedq.model import Calibration, ModelFormatError, ModelOptionError, SentenceEncoder, dequantize, shipped_ranges
from embedq.model.calibrate import calibrate_model
from embedq.model.calibration import CALIBRATION_FILE, shipped_calibration, unit_ranges
from embedq.model.cli import model_group
from embedq.model.embedder import Embedder
from embedq.model.known_files import ALL_MPNET_BASE_V2
from embedq.model.samples import sentences
from embedq.model.sources import resolve_model

TEXTS = ["the quick brown fox", "", "jumps over the dog", "fox, running!", "a - b", "中 é"]
RANDOM = np.random.default_rng(0)


def ranges(dimensions: int) -> np.ndarray:
    return np.sort(RANDOM.normal(size=(2, dimensions)).astype(np.float32), axis=0)


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(model_group, [str(part) for part in arguments], input=stdin, catch_exceptions=False)


def load(folder: Path, **options: Any) -> SentenceEncoder:
    return SentenceEncoder.load(folder, device="cpu", dtype="float32", **options)


def test_a_file_survives_and_so_does_its_digest(tmp_path: Path) -> None:
    written = Calibration({24: ranges(24), 8: ranges(8)}, normalized=True)
    path = tmp_path / "ranges.safetensors"
    path.write_bytes(written.to_bytes({"model": "mine"}))
    assert sorted(load_file(path)) == ["normalized", "ranges", "ranges.8"]
    back = Calibration.read(path)
    assert (back.digest, back.dimensions, back.normalized) == (written.digest, [8, 24], True)
    np.testing.assert_array_equal(back.ranges_for(8), written.ranges_for(8))


def test_a_digest_tells_numbers_and_length_apart() -> None:
    some = ranges(8)
    digests = {
        Calibration({8: some}, normalized=True).digest,
        Calibration({8: some}, normalized=False).digest,
        Calibration({8: some + 1}, normalized=True).digest,
        Calibration({8: some, 4: some[:, :4]}, normalized=True).digest,
    }
    assert len(digests) == 4
    assert all(len(digest) == 12 for digest in digests)


ONE = np.ones(1, np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no safetensors", "not a safetensors file"),
        (save({"ranges": ranges(4)}), "`ranges` and `normalized` are not both there"),
        (save({"ranges.4": ranges(4), "normalized": ONE}), "are not both there"),
        (save({"ranges": ranges(4), "normalized": ONE, "other": ONE}), "tensor 'other' is unexpected"),
        (save({"ranges": ranges(4), "normalized": ONE, "ranges.3": ranges(2)}), "'ranges.3' is for 2 dimensions"),
        (save({"ranges": ranges(4)[:1], "normalized": ONE}), "must have the shape"),
        (save({"ranges": np.ones((2, 4), np.int32), "normalized": ONE}), "floating-point"),
        (save({"ranges": ranges(4)[::-1].copy(), "normalized": ONE}), "the lowest values in the first row"),
        (save({"ranges": ranges(4) * np.float32(np.inf), "normalized": ONE}), "must be finite"),
    ],
)
def test_a_file_that_is_none_is_named_with_what_to_do(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=rf"bad\.safetensors: .*{message}.*embedq model calibrate") as caught:
        Calibration.read(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, own_folder: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"nowhere\.safetensors cannot be read \(No such file"):
        load(own_folder, calibration=tmp_path / "nowhere.safetensors")


def test_a_file_for_another_model_is_refused_at_once(tmp_path: Path, own_folder: Path) -> None:
    file = tmp_path / "other.safetensors"
    file.write_bytes(Calibration({23: ranges(23)}, normalized=True).to_bytes({}))
    with pytest.raises(ModelFormatError, match=r"the calibration is for 23 dimensions, .* has 24"):
        load(own_folder, calibration=file)


def test_other_dimensions_and_other_lengths_are_refused_with_what_to_do() -> None:
    calibration = Calibration({24: ranges(24)}, normalized=True)
    with pytest.raises(ModelOptionError, match="no ranges for 8 dimensions, only for 24: calibrate again with --dim"):
        calibration.ranges_for(8)
    with pytest.raises(ModelOptionError, match="is for vectors with unit length: ask for normalize=true"):
        calibration.ranges_for(24, normalized=False)


def test_an_encoder_takes_the_callers_ranges_then_the_file_then_the_folders_own(
    own_folder: Path, tmp_path: Path
) -> None:
    vectors = load(own_folder).encode(TEXTS)
    with pytest.raises(ModelOptionError, match="has none: write them with embedq model calibrate"):
        load(own_folder).encode(TEXTS, precision="int8")
    own, given = (Calibration({24: ranges(24)}, normalized=True) for _ in range(2))
    (own_folder / CALIBRATION_FILE).write_bytes(own.to_bytes({}))
    encoder = load(own_folder)
    assert encoder.calibration_digest == own.digest
    half_a_step = (own.ranges[24][1] - own.ranges[24][0]) / 510
    clamped = np.clip(vectors, *own.ranges[24])
    back = dequantize(encoder.encode(TEXTS, precision="int8"), own.ranges[24])
    assert (np.abs(back - clamped) <= half_a_step + 1e-6).all()
    file = tmp_path / "given.safetensors"
    file.write_bytes(given.to_bytes({}))
    assert load(own_folder, calibration=str(file)).calibration_digest == given.digest
    mine = np.stack((vectors.min(axis=0), vectors.max(axis=0)))
    ours = encoder.encode(TEXTS, precision="uint8", ranges=mine)
    assert (np.abs(dequantize(ours, mine) - vectors) <= (mine[1] - mine[0]) / 510 + 1e-6).all()


def test_a_calibration_for_other_options_is_refused_before_anything_is_encoded(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folder / CALIBRATION_FILE).write_bytes(Calibration({24: ranges(24)}, normalized=True).to_bytes({}))
    encoder = load(own_folder)
    monkeypatch.setattr(Embedder, "encode_packed", None)
    for options in ({"dimensions": 8}, {"normalize": False}, {"ranges": ranges(23)}):
        with pytest.raises(ModelOptionError):
            encoder.encode(TEXTS, precision="uint8", **options)  # type: ignore[call-overload]


def test_what_ships_is_for_all_mpnet_base_v2_under_any_name() -> None:
    shipped = shipped_calibration(ALL_MPNET_BASE_V2, "whatever")
    assert shipped is not None
    assert shipped_calibration("my-copy", "78c0197b6159") is shipped
    assert shipped_calibration("my-copy", "") is shipped_calibration("my-copy", "0" * 12) is None
    assert shipped.dimensions == [64, 128, 256, 384, 512, 768]
    np.testing.assert_array_equal(shipped_ranges(shipped.digest, 256), shipped.ranges_for(256))
    np.testing.assert_array_equal(shipped_ranges("unit", 3), unit_ranges(3))
    with pytest.raises(ModelOptionError, match="no ranges ship under 'abc'"):
        shipped_ranges("abc", 768)


def test_calibrate_writes_ranges_that_no_text_of_the_sample_leaves(own_folder: Path, tmp_path: Path) -> None:
    lines, file = tmp_path / "lines.txt", tmp_path / "ranges.safetensors"
    lines.write_text("\n".join([*TEXTS, "  ", ""]), encoding="utf-8")
    shown = run("calibrate", own_folder, "--texts", lines, "--output", file, "--dimensions", 8, "--device", "cpu")
    assert (shown.exit_code, shown.stdout) == (0, "")
    calibration = Calibration.read(file)
    assert f"calibration {calibration.digest} from 5 texts, for 8, 24 dimensions" in shown.stderr
    assert "only 5 texts" in shown.stderr
    encoder = load(own_folder, calibration=file)
    texts = [text for text in TEXTS if text]
    for options in ({}, {"dimensions": 8}):
        vectors = encoder.encode(texts, **options)  # type: ignore[call-overload]
        wanted = np.stack((vectors.min(axis=0), vectors.max(axis=0)))
        np.testing.assert_allclose(calibration.ranges_for(vectors.shape[1]), wanted, atol=1e-6)


def test_calibrate_takes_the_shipped_sentences_and_the_models_own_length(own_folder: Path, tmp_path: Path) -> None:
    write_json(own_folder / "modules.json", json.loads((own_folder / "modules.json").read_text())[:-1])
    file = own_folder / CALIBRATION_FILE
    shown = run("calibrate", own_folder, "-o", file)
    assert "from 400 texts" in shown.stderr
    assert not Calibration.read(file).normalized
    assert load(own_folder).encode(TEXTS, precision="int8").dtype == np.int8
    found = json.loads(run("inspect", own_folder, "--json").stdout)
    assert (found["calibration"], found["calibrated_dimensions"]) == (Calibration.read(file).digest, [24])
    assert f"{found['calibration']}, for 24 dimensions" in run("inspect", own_folder).stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ((), "one text", "two texts at least, not 1"),
        (("--dimensions", 25), "a\nb", "dimensions must be 1 to 24"),
        ((), b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_sample_that_cannot_do_is_refused(
    own_folder: Path, tmp_path: Path, arguments: Any, stdin: Any, message: str
) -> None:
    with pytest.raises(ModelOptionError, match=message):
        run("calibrate", own_folder, "--texts", "-", "-o", tmp_path / "r", *arguments, stdin=stdin)


def test_where_the_ranges_go_is_checked_before_anything_is_encoded(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelOptionError, match="cannot be written"):
        run("calibrate", own_folder, "--texts", "-", "-o", own_folder / ("r" * 300), stdin="a\nb")
    monkeypatch.setattr(SentenceEncoder, "encode", None)
    shown = run("calibrate", own_folder, "-o", own_folder / "no" / "r")
    assert shown.exit_code == 2
    assert f"no folder {own_folder / 'no'}" in shown.stderr
    with pytest.raises(ModelOptionError, match="dimensions must be 1 to 24"):
        calibrate_model(resolve_model(str(own_folder)), TEXTS, [25], device="cpu")


def test_a_prompt_named_in_the_config_is_part_of_what_is_calibrated(own_folder: Path) -> None:
    write_json(own_folder / "config_sentence_transformers.json", {"prompts": {"q": "the "}, "default_prompt_name": "q"})
    with_prompt = calibrate_model(resolve_model(str(own_folder)), TEXTS, device="cpu")
    edit_json(own_folder / "config_sentence_transformers.json", default_prompt_name=None)
    assert calibrate_model(resolve_model(str(own_folder)), TEXTS, device="cpu").digest != with_prompt.digest


@pytest.mark.real_model
@pytest.mark.parametrize("dimensions", [768, 256])
def test_the_shipped_ranges_are_those_of_the_shipped_sentences(real_model_path: Path, dimensions: int) -> None:
    """Of each tenth sentence: no number leaves its range, and about a tenth of the ends are theirs."""
    encoder = SentenceEncoder.load(real_model_path, device="cpu", dtype="float32")
    vectors = encoder.encode(sentences()[::10], dimensions=dimensions)
    lowest, highest = shipped_ranges(encoder.calibration_digest, dimensions)
    assert (vectors >= lowest - 2e-6).all()
    assert (vectors <= highest + 2e-6).all()
    reached = [np.abs(vectors.min(axis=0) - lowest) < 2e-6, np.abs(vectors.max(axis=0) - highest) < 2e-6]
    assert 0.05 < np.mean(reached) < 0.2


@pytest.mark.real_model
def test_the_real_models_bytes_keep_the_meaning(real_model_path: Path) -> None:
    """Of texts that were not in the sample; a few of their numbers are clamped."""
    texts = ["Where do otters sleep?", "Der Fluss trat über die Ufer.", "import numpy as np", "kelp", "42 " * 50]
    encoder = SentenceEncoder.load(real_model_path, device="cpu", dtype="float32")
    for dimensions in (768, 256):
        vectors = encoder.encode(texts, dimensions=dimensions)
        as_bytes = encoder.encode(texts, dimensions=dimensions, precision="int8")
        assert as_bytes.dtype == np.int8
        back = dequantize(as_bytes, shipped_ranges(encoder.calibration_digest, dimensions))
        cosines = (back * vectors).sum(axis=1) / np.linalg.norm(back, axis=1)
        assert cosines.min() > 0.995
