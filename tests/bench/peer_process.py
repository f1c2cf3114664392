"""One peer in a process of its own: `python peer_process.py SYSTEM MODEL MODELS THREADS`.

SYSTEM is one of SYSTEMS, MODEL a sentence-transformers folder, MODELS where exported models are kept. Requests and
answers are lines of JSON on stdin and stdout:

    (start)                                                  {"load_s": 1.2, "versions": {"onnxruntime": "1.32.0"}}
    {"texts": [...], "batch_size": 8}                        {"seconds": 0.8}
    {"texts": [...], "batch_size": 8, "save": "file.npy"}    the same, and the vectors are in the file

Runs in the peers' environment: imports nothing of embedq.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

PROVIDER = "CPUExecutionProvider"
#: The first set of instructions that this CPU has decides which of the published recipes quantizes.
QUANTIZATIONS = (("avx512_vnni", "avx512_vnni"), ("avx512f", "avx512"), ("avx2", "avx2"), ("", "arm64"))


def main() -> None:
    system, model, models, threads = sys.argv[1:]
    # Libraries print to stdout; answers go to a copy of it.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(int(threads))
    load, packages = SYSTEMS[system]
    began_at = time.perf_counter()
    encoder = load(Path(model), Path(models), int(threads))
    load_s = time.perf_counter() - began_at
    versions = {name: version(name) for name in ("sentence-transformers", "transformers", *packages)}
    print(json.dumps({"load_s": load_s, "versions": versions}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(encoder, json.loads(line))), file=answers)


def answer(encoder: SentenceTransformer, request: dict[str, Any]) -> dict[str, Any]:
    began_at = time.perf_counter()
    vectors = encoder.encode(request["texts"], batch_size=request["batch_size"], show_progress_bar=False)
    seconds = time.perf_counter() - began_at
    if "save" in request:
        np.save(request["save"], vectors)
    return {"seconds": seconds}


def load_torch(model: Path, models: Path, threads: int) -> SentenceTransformer:
    return SentenceTransformer(str(model), device="cpu")


def load_onnx(model: Path, models: Path, threads: int) -> SentenceTransformer:
    return onnx_session(onnx_folder(model, models), "model.onnx", threads)


def load_onnx_qint8(model: Path, models: Path, threads: int) -> SentenceTransformer:
    from sentence_transformers import export_dynamic_quantized_onnx_model

    folder = onnx_folder(model, models)
    recipe = quantization()
    file_name = f"model_qint8_{recipe}.onnx"
    if not (folder / "onnx" / file_name).exists():
        plain = onnx_session(folder, "model.onnx", threads)
        export_dynamic_quantized_onnx_model(plain, recipe, str(folder))
    return onnx_session(folder, file_name, threads)


def onnx_session(folder: Path, file_name: str, threads: int) -> SentenceTransformer:
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    kwargs = {"provider": PROVIDER, "file_name": f"onnx/{file_name}", "session_options": options}
    return SentenceTransformer(str(folder), device="cpu", backend="onnx", model_kwargs=kwargs)


def onnx_folder(model: Path, models: Path) -> Path:
    return exported(models / "onnx", lambda: SentenceTransformer(str(model), device="cpu", backend="onnx"))


def quantization() -> str:
    path = Path("/proc/cpuinfo")
    info = path.read_text() if path.exists() else ""
    return next(recipe for flag, recipe in QUANTIZATIONS if flag in info)


def load_openvino(model: Path, models: Path, threads: int) -> SentenceTransformer:
    """In the precision that OpenVINO chooses itself: bfloat16 where the CPU has it."""
    return openvino_model(model, models, {"INFERENCE_NUM_THREADS": str(threads)})


def load_openvino_f32(model: Path, models: Path, threads: int) -> SentenceTransformer:
    config = {"INFERENCE_NUM_THREADS": str(threads), "INFERENCE_PRECISION_HINT": "f32"}
    return openvino_model(model, models, config)


def openvino_model(model: Path, models: Path, config: dict[str, str]) -> SentenceTransformer:
    folder = exported(models / "openvino", lambda: SentenceTransformer(str(model), device="cpu", backend="openvino"))
    return SentenceTransformer(str(folder), device="cpu", backend="openvino", model_kwargs={"ov_config": config})


def exported(folder: Path, export: Callable[[], SentenceTransformer]) -> Path:
    """Made on first use, in one step: an export that breaks off leaves nothing that looks whole."""
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            export().save_pretrained(str(Path(scratch) / folder.name))
            (Path(scratch) / folder.name).rename(folder)
    return folder


#: How each is loaded, and which packages' versions matter beside sentence-transformers'.
SYSTEMS: dict[str, tuple[Callable[[Path, Path, int], SentenceTransformer], tuple[str, ...]]] = {
    "torch": (load_torch, ("torch",)),
    "onnx": (load_onnx, ("onnxruntime",)),
    "onnx-qint8": (load_onnx_qint8, ("onnxruntime",)),
    "openvino-f32": (load_openvino_f32, ("openvino",)),
    "openvino": (load_openvino, ("openvino",)),
}

if __name__ == "__main__":
    main()
