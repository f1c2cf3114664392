"""Texts that come out with NaN or Inf in another number type: once more in float32, by the same model."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import fake_gpu
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedq.model import DeviceLostError, NoopEncoder, SentenceEncoder
from embedq.model.mpnet import MPNet
from embedq.model.quantizer import quantize_folder
from embedq.producer import EmbedOptions, JobFailedError
from embedq.producer.wire import EmbedRequest
from embedq.worker.engine import Engine

TEXTS = ["the fox", "a dog jumps over the fox", "dog", ""]
#: Largest difference of a normalised vector's component between two ways through float32.
TOLERANCE = 2e-6
#: Least cosine of a vector in half precision to float32's.
COSINE = 0.99


def load(folder: Path, dtype: str) -> SentenceEncoder:
    return SentenceEncoder.load(folder, device="cpu", dtype=dtype)


def plant_nan(encoder: SentenceEncoder, layer: int, num_tokens: int) -> None:
    """From here on every text of so many tokens that is encoded alone or with others comes out of `layer` as NaN."""
    layers = encoder._embedder.model.layers
    whole = layers[layer]

    def broken(hidden: Tensor, attend: Any) -> Tensor:
        out = whole(hidden, attend)
        return out * torch.nan if len(out) >= num_tokens else out

    layers[layer] = broken  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_the_float32_form_is_the_same_model(tiny_folder: Path, dtype: str) -> None:
    exact = load(tiny_folder, dtype).in_float32()
    assert exact is not None
    reference = load(tiny_folder, "float32")
    np.testing.assert_allclose(exact.encode(TEXTS), reference.encode(TEXTS), atol=TOLERANCE, rtol=0)
    states = exact.encode(TEXTS, output="tokens")
    for ours, theirs in zip(states, reference.encode(TEXTS, output="tokens"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    assert exact.placement == "cpu float32"


def test_it_is_loaded_once_and_a_float32_encoder_needs_none(tiny_folder: Path) -> None:
    half = load(tiny_folder, "bfloat16")
    exact = half.in_float32()
    assert exact is not None
    assert half.in_float32() is exact
    assert exact.in_float32() is None
    assert load(tiny_folder, "float32").in_float32() is None
    assert NoopEncoder(8).in_float32() is None
    assert half.placement == "cpu bfloat16"


def test_a_quantized_folder_has_one_too(tiny_folder: Path, tmp_path: Path) -> None:
    """Its weights are int8 still; the sums between them are not."""
    quantize_folder(tiny_folder, tmp_path / "int8")
    quantized = load(tmp_path / "int8", "auto")
    exact = quantized.in_float32()
    assert exact is not None
    near = np.sum(np.asarray(exact.encode(TEXTS)) * np.asarray(quantized.encode(TEXTS)), axis=1)
    assert near.min() > COSINE


def test_on_a_cpu_its_layers_are_read_anew_each_time_and_on_a_gpu_they_are_kept(tiny_folder: Path) -> None:
    on_cpu = load(tiny_folder, "bfloat16").in_float32()
    assert on_cpu is not None
    assert on_cpu._embedder.model.layers == []
    with fake_gpu() as watch:
        encoder = SentenceEncoder(
            tiny_folder, name="tiny", revision="0", device=torch.device("cuda:0"), dtype="bfloat16", max_batch_tokens=64
        )
        before = watch.live_bytes()
        exact = encoder.in_float32()
        assert exact is not None
        assert exact.device == encoder.device
        assert len(exact._embedder.model.layers) == 2
        assert watch.live_bytes() > 2 * before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), OSError("gone")])
def test_where_it_cannot_be_had_that_is_said_once_and_not_tried_again(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    half = load(tiny_folder, "bfloat16")
    released: list[bool] = []
    monkeypatch.setattr(half._embedder.runtime, "release_cache", lambda: released.append(True))

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    with caplog.at_level(logging.INFO, logger="embedq.model.sentence_encoder"):
        monkeypatch.setattr(MPNet, "__init__", refuse)
        assert half.in_float32() is None
        assert half.in_float32() is None
    [record] = caplog.records
    assert "could not be loaded in float32 as well: " in record.message
    assert released == [True]


def test_a_device_that_is_lost_while_it_is_loaded_is_lost(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = load(tiny_folder, "bfloat16")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(MPNet, "__init__", broken)
    with pytest.raises(DeviceLostError):
        half.in_float32()


@pytest.mark.parametrize("output", ["sentence", "tokens"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_worker_serves_a_text_whose_vector_was_not_finite(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture, output: Any, dtype: str
) -> None:
    encoder = load(tiny_folder, dtype)
    long = "the quick brown fox jumps over the dog"
    [tokens] = encoder.tokenize([long])
    # The budget keeps the others in micro-batches below what breaks.
    engine = Engine(encoder, max_batch_tokens=tokens.num_tokens)
    expected = engine.run(EmbedRequest(["fox", "dog"], EmbedOptions(output=output)))
    plant_nan(encoder, 1, tokens.num_tokens)
    with caplog.at_level(logging.INFO, logger="embedq.worker"):
        found = engine.run(EmbedRequest(["fox", long, "dog"], EmbedOptions(output=output)))
    reference = Engine(load(tiny_folder, "float32")).run(EmbedRequest([long], EmbedOptions(output=output)))
    ours = list(found.tokens) if output == "tokens" else list(found.vectors)
    others = list(expected.tokens) if output == "tokens" else list(expected.vectors)
    [exact] = list(reference.tokens) if output == "tokens" else list(reference.vectors)
    np.testing.assert_allclose(ours[1], exact, atol=1e-5, rtol=0)
    for place, other in ((0, others[0]), (2, others[1])):
        np.testing.assert_allclose(ours[place], other, atol=0.02, rtol=0)
    assert engine.isolation.num_in_float32 == 1
    [warning] = [
        record for record in caplog.records if record.name == "embedq.worker" and record.levelno == logging.WARNING
    ]
    assert warning.message.startswith(f"a vector was not finite by cpu {dtype} and was made in float32")


def test_what_float32_does_not_hold_fails_its_job_alone(own_folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(own_folder / "model.safetensors").items()}
    tensors["embeddings.word_embeddings.weight"][40] = 2e38  # its variance overflows float32
    save_file(tensors, own_folder / "model.safetensors")
    engine = Engine(load(own_folder, "bfloat16"))
    works = [engine.tokenize(EmbedRequest(texts, EmbedOptions())) for texts in (["fox"], ["dog", "ai"], ["the fox"])]
    engine.encode([(work, place) for work in works for place in range(len(work.tokens))])
    assert [work.failure is None for work in works] == [True, False, True]
    with pytest.raises(JobFailedError, match=r"^text 1: .* already in the embeddings") as caught:
        engine.finish(works[1])
    assert (caught.value.code, caught.value.text_index, caught.value.retryable) == ("non_finite", 1, False)
    assert engine.isolation.num_in_float32 == 0


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_real_model_recovers_in_float32(real_model_path: Path, dtype: str) -> None:
    encoder = load(real_model_path, dtype)
    long = "the committee agreed that trains between both cities should run every hour from next spring on"
    [tokens] = encoder.tokenize([long])
    engine = Engine(encoder, max_batch_tokens=tokens.num_tokens)
    plant_nan(encoder, 5, tokens.num_tokens)
    found = engine.run(EmbedRequest(["a short one", long], EmbedOptions()))
    reference = load(real_model_path, "float32").encode(["a short one", long])
    np.testing.assert_allclose(found.vectors[1], reference[1], atol=TOLERANCE, rtol=0)
    assert float(found.vectors[0] @ reference[0]) > COSINE - (0.02 if dtype == "int8" else 0)
    assert engine.isolation.num_in_float32 == 1


@pytest.mark.real_model
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is the process's own memory")
def test_the_real_models_float32_form_leaves_its_weights_in_the_file(real_model_path: Path) -> None:
    """A process that the system ends for want of memory would take other jobs with it."""
    code = (
        "import re, sys\n"
        "from embedq.model import SentenceEncoder\n"
        "def own(): return 1024 * int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "encoder = SentenceEncoder.load(sys.argv[1], device='cpu', dtype='bfloat16')\n"
        "encoder.encode(['word ' * 100])\n"
        "before = own()\n"
        "encoder.in_float32().encode(['word ' * 100])\n"
        "print(own() - before)"
    )
    command = [sys.executable, "-c", code, str(real_model_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert int(shown.stdout) < 0.2 * (real_model_path / "model.safetensors").stat().st_size
