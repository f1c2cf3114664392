"""int8 weights: the formulas, the folder that `embedq model quantize` writes, and what is refused."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import bytes_to_load
from safetensors.torch import load_file, save_file
from tiny import edit_json, write_folder, write_modules, write_pooling
from torch.nn import functional

from embedq.model import ModelFormatError, ModelOptionError, SentenceEncoder, WeightsError
from embedq.model.calibration import CALIBRATION_FILE, Calibration
from embedq.model.cli import model_group
from embedq.model.fidelity import cosines, spearman_on_pairs
from embedq.model.linear import LinearWeights, PlainLinear
from embedq.model.quantization import Int8Linear, quantize, quantize_rows, quantize_weight
from embedq.model.quantizer import quantize_folder
from embedq.model.samples import sentence_pairs, sentences

CPU = torch.device("cpu")
#: Widths that the native kernels take, and some that they don't.
SHAPES = [{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}, {}]
#: Least cosine to float32 on real English text, of each text and of their mean.
LEAST_COSINE, MEAN_COSINE = 0.99, 0.997
SPEARMAN_TOLERANCE = 0.005
#: Of memory: the tokenizer, the first text's activations, one layer that is converted.
BYTES_BESIDE_WEIGHTS = 60_000_000


@given(rows=st.integers(1, 5), features=st.integers(1, 70), spread=st.floats(1e-6, 1e6), shift=st.floats(-3, 3))
@settings(deadline=None)
def test_a_quantized_row_is_off_by_half_a_step_at_most(rows: int, features: int, spread: float, shift: float) -> None:
    torch.manual_seed(features)
    x = (torch.randn(rows, features) + shift) * spread
    quantized = quantize_rows(x)
    restored = (quantized.values.float() - quantized.zero) * quantized.scale
    # Half a step by rounding, and another half where the zero point's rounding pushes an end out of the bytes.
    assert ((restored - x).abs() <= 1.01 * quantized.scale).all()
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    torch.testing.assert_close(quantized.scale[:, 0], (high - low) / 255)


def test_zero_stays_zero() -> None:
    quantized = quantize_rows(torch.tensor([[0.0, 0.0], [0.0, 5.0], [-7.0, 0.0]]))
    restored = (quantized.values.float() - quantized.zero) * quantized.scale
    torch.testing.assert_close(restored, torch.tensor([[0.0, 0.0], [0.0, 5.0], [-7.0, 0.0]]))


def test_a_weights_row_is_cut_where_that_makes_the_error_smaller() -> None:
    torch.manual_seed(0)
    weight = torch.rand(4, 20_000) * 2 - 1
    weight[0, 0], weight[3] = 1.05, 0  # cutting the first makes all steps of its row smaller
    values, scale = quantize_weight(weight)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (4,))
    largest = weight.abs().amax(1)
    assert scale[0] < 0.96 * largest[0] / 127
    torch.testing.assert_close(scale[1:3], largest[1:3] / 127)
    error = values[1:] * scale[1:, None] - weight[1:]
    assert (error.abs() <= 0.501 * scale[1:, None]).all()


@pytest.mark.parametrize("rows", [1, 16, 17, 33])
@pytest.mark.parametrize("smooth", [False, True])
def test_integer_products_are_near_the_float_ones(rows: int, smooth: bool) -> None:
    torch.manual_seed(rows)
    x, residual = torch.randn(rows, 96), torch.randn(rows, 40)
    x[:, 5] *= 50  # an outlier channel: what smoothing is for
    weights = LinearWeights(torch.randn(40, 96), torch.randn(40))
    quantized = quantize(weights, x.abs().amax(0) if smooth else None)
    ours, plain = Int8Linear(quantized, CPU), PlainLinear(quantized.dequantized())
    error = float((ours(x) - plain(x)).abs().mean() / plain(x).abs().mean())
    assert error < (0.01 if smooth else 0.05)
    torch.testing.assert_close(ours.gelu(x), functional.gelu(ours(x)))
    torch.testing.assert_close(ours.add(x, residual), ours(x) + residual)


def test_widths_that_no_gpu_takes_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, torch.Size]] = []
    product = torch._int_mm

    def watched(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append((left.shape, right.shape))
        return product(left, right)

    monkeypatch.setattr(torch, "_int_mm", watched)
    torch.manual_seed(0)
    quantized = quantize(LinearWeights(torch.randn(10, 13), torch.randn(10)), torch.rand(13) + 0.1)
    x = torch.randn(3, 13)
    got, expected = Int8Linear(quantized, CPU)(x), PlainLinear(quantized.dequantized())(x)
    assert seen == [((32, 16), (16, 16))]
    assert (got - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_smoothing_helps_where_a_channel_stands_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 96)
    x[:, 5] *= 50
    weights = LinearWeights(torch.randn(40, 96), torch.randn(40))
    exact = PlainLinear(weights)(x)

    def error(quantized: LinearWeights) -> float:
        return float((Int8Linear(quantized, CPU)(x) - exact).square().mean())

    assert error(quantize(weights, x.abs().amax(0))) < error(quantize(weights)) / 4


def folder(path: Path, **shape: int) -> Path:
    write_folder(path, num_hidden_layers=2, **shape)
    write_modules(path, "Pooling", "Normalize")
    write_pooling(path, pooling_mode_mean_tokens=True)
    edit_json(path / "1_Pooling" / "config.json", word_embedding_dimension=shape.get("hidden_size", 24))
    return path


TEXTS = [f"the {first} {second}" for first in ("quick", "brown", "fox", "dog") for second in ("jumps", "runs", "over")]


@pytest.mark.parametrize("shape", SHAPES, ids=["native", "torch"])
def test_a_quantized_folder_loads_like_any_other(tmp_path: Path, shape: dict[str, int]) -> None:
    source, target = folder(tmp_path / "source", **shape), tmp_path / "deep" / "target"
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"of the original")
    done = quantize_folder(source, target, texts=TEXTS, min_cosine=0.5)
    encoder = SentenceEncoder.load(target, device="cpu")
    assert (encoder.dtype, encoder.placement) == (torch.int8, "cpu int8")
    exact = SentenceEncoder.load(source, device="cpu", dtype="float32").encode(TEXTS)
    assert cosines(encoder.encode(TEXTS), exact).min() > 0.95
    # As floats it is the same model but for the rounding of inputs.
    floats = SentenceEncoder.load(target, device="cpu", dtype="float32")
    assert cosines(floats.encode(TEXTS), exact).min() > 0.95
    assert done.kept == {}
    assert done.bytes_after == (target / "model.safetensors").stat().st_size < done.bytes_before / 2
    assert done.texts == len(TEXTS) // 2
    assert sorted(path.name for path in target.iterdir()) == sorted(
        path.name for path in source.iterdir() if path.name != "onnx"
    )
    assert json.loads((target / "config.json").read_text())["quantization_config"]["quant_method"] == "embedq-int8"
    assert [path for path in target.parent.iterdir() if path != target] == []


def test_products_that_hurt_stay_in_floating_point(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", **SHAPES[0])
    done = quantize_folder(source, tmp_path / "target", texts=TEXTS, min_cosine=1 - 1e-6)
    assert len(done.kept) == 8  # no product bears that much
    assert list(done.kept.values()) == sorted(done.kept.values(), reverse=True)
    some = quantize_folder(source, tmp_path / "some", texts=TEXTS, min_cosine=0.9998)
    assert some.min_cosine >= 0.9998
    assert 0 < len(some.kept) < 8
    mixed = SentenceEncoder.load(tmp_path / "some", device="cpu")
    exact = SentenceEncoder.load(source, device="cpu", dtype="float32").encode(TEXTS)
    assert cosines(mixed.encode(TEXTS), exact).min() > 0.99


@pytest.mark.parametrize("shape", SHAPES, ids=["native", "torch"])
def test_float_weights_are_quantized_on_the_way_in(tmp_path: Path, shape: dict[str, int]) -> None:
    source = folder(tmp_path, **shape)
    exact = SentenceEncoder.load(source, device="cpu", dtype="float32").encode(TEXTS)
    assert cosines(SentenceEncoder.load(source, device="cpu", dtype="int8").encode(TEXTS), exact).min() > 0.95


def test_kernels_of_both_kinds_agree_on_a_quantized_folder(tmp_path: Path) -> None:
    quantize_folder(folder(tmp_path / "source", **SHAPES[0]), tmp_path / "target", texts=TEXTS, min_cosine=0.5)
    ours = SentenceEncoder.load(tmp_path / "target", device="cpu").encode(TEXTS)
    plain = SentenceEncoder.load(tmp_path / "target", device="cpu", kernels="torch").encode(TEXTS)
    assert cosines(ours, plain).min() > 0.99


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    quantize_folder(source, tmp_path / "target", texts=TEXTS, min_cosine=0.5)
    with pytest.raises(ModelFormatError, match="is quantized already"):
        quantize_folder(tmp_path / "target", tmp_path / "again", texts=TEXTS)
    with pytest.raises(ModelOptionError, match="is there already"):
        quantize_folder(source, tmp_path / "target", texts=TEXTS)
    with pytest.raises(ModelOptionError, match="min_cosine must be between 0 and 1, not 2"):
        quantize_folder(source, tmp_path / "new", texts=TEXTS, min_cosine=2)
    with pytest.raises(ModelOptionError, match="3 texts are too few"):
        quantize_folder(source, tmp_path / "new", texts=TEXTS[:3])
    (tmp_path / "a file").write_text("")
    with pytest.raises(ModelOptionError, match="cannot be written"):
        quantize_folder(source, tmp_path / "a file" / "new", texts=TEXTS, min_cosine=0.5)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "again").exists()


def test_a_copy_inside_its_own_source_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / "int8", tmp_path / "link" / "int8"):
        with pytest.raises(ModelOptionError, match="lies in the model that is copied"):
            quantize_folder(source, target, texts=TEXTS, min_cosine=0.5)
    assert not (source / "int8").exists()


def test_a_copy_of_links_and_read_only_files_is_a_folder_of_its_own(tmp_path: Path) -> None:
    """As a hub's cache has them, in which all files are links."""
    blobs, source, target = folder(tmp_path / "blobs"), tmp_path / "source", tmp_path / "target"
    (source / "1_Pooling").mkdir(parents=True)
    for path in [path for path in blobs.rglob("*") if path.is_file()]:
        path.chmod(0o444)
        (source / path.relative_to(blobs)).symlink_to(path)
    (source / "1_Pooling").chmod(0o555)
    source.chmod(0o555)
    quantize_folder(source, target, texts=TEXTS, min_cosine=0.5)
    copied = [path for path in target.rglob("*") if path.is_file()]
    assert len(copied) == len([path for path in blobs.rglob("*") if path.is_file()])
    for path in (target, *target.rglob("*")):
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o200


def test_the_folders_own_calibration_comes_along(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    calibration = Calibration({24: np.array([[-1.0] * 24, [1.0] * 24], np.float32)}, normalized=True)
    (source / CALIBRATION_FILE).write_bytes(calibration.to_bytes({}))
    quantize_folder(source, tmp_path / "target", texts=TEXTS, min_cosine=0.5)
    assert SentenceEncoder.load(tmp_path / "target", device="cpu").calibration_digest == calibration.digest


@pytest.mark.parametrize("prefix", ["", "mpnet."])
def test_a_source_in_shards_becomes_one_file(tmp_path: Path, prefix: str) -> None:
    source = folder(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    shards = {prefix + name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(weights)}
    for shard in set(shards.values()):
        inside = {name: weights[name.removeprefix(prefix)] for name, file in shards.items() if file == shard}
        save_file(inside, source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    quantize_folder(source, tmp_path / "target", texts=TEXTS, min_cosine=0.5)
    written = tmp_path / "target" / "model.safetensors"
    assert list((tmp_path / "target").glob("model*")) == [written]
    vectors = SentenceEncoder.load(tmp_path / "target", device="cpu").encode(TEXTS)
    save_file({f"mpnet.{name}": tensor for name, tensor in load_file(written).items()}, written)
    assert np.array_equal(SentenceEncoder.load(tmp_path / "target", device="cpu").encode(TEXTS), vectors)


def test_a_full_disk_is_an_error_on_one_line(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", **SHAPES[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ModelOptionError, match=r"target cannot be written: .*File too large"):
            quantize_folder(source, tmp_path / "target", texts=TEXTS, min_cosine=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "source")

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("embedq.model.quantizer.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(source, tmp_path / "target", texts=TEXTS, min_cosine=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("encoder.layer.0.intermediate.dense.weight_scale"), r"weight_scale is missing"),
        (lambda tensors: tensors.pop("encoder.layer.0.attention.attn.k.input_factor"), "must be quantized alike"),
        (
            lambda tensors: tensors.update(
                {"encoder.layer.0.attention.attn.v.input_factor": torch.ones(24)},
            ),
            "must be quantized alike",
        ),
        (
            lambda tensors: tensors.update({"encoder.layer.1.output.dense.weight_scale": torch.full((24,), torch.nan)}),
            "encoder.layer.1.output.dense.weight_scale holds NaN",
        ),
        (
            lambda tensors: tensors.update({"encoder.layer.1.output.dense.weight_scale": torch.ones(23)}),
            r"weight_scale has shape \(23,\), expected \(24,\)",
        ),
        (
            lambda tensors: tensors.update({"embeddings.LayerNorm.weight": torch.ones(24, dtype=torch.int8)}),
            "LayerNorm.weight has dtype I8",
        ),
    ],
)
def test_broken_quantized_weights_are_named(tmp_path: Path, change: object, message: str) -> None:
    quantize_folder(folder(tmp_path / "source"), tmp_path / "target", texts=TEXTS, min_cosine=0.5)
    path = tmp_path / "target" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=message):
        SentenceEncoder.load(tmp_path / "target", device="cpu")


def test_the_command_shows_what_it_cost(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", **SHAPES[0])
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    arguments = ["quantize", str(source), str(tmp_path / "target"), "--texts", str(tmp_path / "texts")]
    result = CliRunner().invoke(model_group, [*arguments, "--min-cosine", "0.5"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "nothing: all products are int8" in result.stdout
    arguments = ["quantize", str(source), str(tmp_path / "other"), "--json"]
    as_json = CliRunner().invoke(model_group, arguments, catch_exceptions=False)
    assert json.loads(as_json.stdout)["path"] == str(tmp_path / "other")


@pytest.mark.real_model
@pytest.mark.slow
def test_a_quantized_all_mpnet_base_v2_keeps_its_meaning(real_model_path: Path, tmp_path: Path) -> None:
    done = quantize_folder(real_model_path, tmp_path / "int8")
    assert done.min_cosine >= LEAST_COSINE
    assert done.mean_cosine >= MEAN_COSINE
    assert abs(done.spearman_after - done.spearman_before) <= SPEARMAN_TOLERANCE
    assert done.bytes_after < done.bytes_before / 3
    assert done.kept == {}
    vectors = SentenceEncoder.load(tmp_path / "int8", device="cpu").encode("otters", precision="int8")
    assert vectors.dtype == np.int8  # the ranges that ship for the original came along
    assert bytes_to_load(tmp_path / "int8", "auto") < 1.2 * done.bytes_after + BYTES_BESIDE_WEIGHTS


@pytest.mark.real_model
def test_all_mpnet_base_v2_quantized_on_the_way_in_keeps_its_meaning(real_model_path: Path) -> None:
    texts = [*sentences()[::2], *(pair.first for pair in sentence_pairs()[::2])]
    exact = SentenceEncoder.load(real_model_path, device="cpu", dtype="float32")
    int8 = SentenceEncoder.load(real_model_path, device="cpu", dtype="int8")
    found = cosines(int8.encode(texts), exact.encode(texts))
    assert found.min() >= LEAST_COSINE
    assert found.mean() >= MEAN_COSINE
    before, after = (
        spearman_on_pairs(lambda pairs, encoder=encoder: np.asarray(encoder.encode(pairs))) for encoder in (exact, int8)
    )
    assert abs(after - before) <= SPEARMAN_TOLERANCE
