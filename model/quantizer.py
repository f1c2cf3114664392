"""Writes a quantized copy of a model folder: linear layers in int8, embedding tables in bfloat16, the rest as it is.

Which products cannot bear it is measured, not assumed: on texts that were not used to find the smoothing factors, by
the cosine between a text's vector and its float32 vector. Knows folders and layers; the formulas are `quantization`'s.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from embedq.model.calibration import CALIBRATION_FILE
from embedq.model.errors import ModelFormatError, ModelOptionError
from embedq.model.fidelity import MIN_COSINE, Floats, cosines, spearman_on_pairs
from embedq.model.folder import read_json_object
from embedq.model.linear import Linear, LinearWeights
from embedq.model.manifest import MANIFEST_FILE
from embedq.model.modules import read_modules
from embedq.model.mpnet import INPUT_FACTOR, RELATIVE_BIAS, SCALE, linear_weights, stack, tensor_shapes
from embedq.model.progress import Progress, SilentProgress
from embedq.model.quantization import quantize
from embedq.model.samples import sentence_pairs, sentences
from embedq.model.sentence_encoder import SentenceEncoder
from embedq.model.weights import WEIGHTS_FILE, Checkpoint

#: Texts on which products are compared with each other; all measured texts decide when it is enough.
SENSITIVITY_TEXTS = 48
#: Fewer texts than this find no smoothing worth the name, and leave too few to measure.
MIN_TEXTS = 8
#: What config.json says of the folder, so that other software refuses it instead of misreading it.
QUANT_METHOD = "embedq-int8"

#: The products of a layer by the fields of `mpnet.Layer`, with the linear layers that share each.
_PRODUCTS = {
    "qkv": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    "out": ("attention.attn.o",),
    "intermediate": ("intermediate.dense",),
    "output": ("output.dense",),
}
#: Copies of the weights in other formats, which would not be those of the folder.
_OTHER_WEIGHTS = (".bin", ".h5", ".ot", ".msgpack", ".onnx", ".safetensors", ".index.json")
_NOT_COPIED = ("onnx", "openvino", ".git", ".cache", MANIFEST_FILE)


@dataclass(frozen=True, slots=True)
class Product:
    layer: int
    field: str

    @property
    def names(self) -> list[str]:
        """Its linear layers as the checkpoint calls them."""
        return [f"encoder.layer.{self.layer}.{name}" for name in _PRODUCTS[self.field]]

    def __str__(self) -> str:
        return f"layer {self.layer} {self.field}"


@dataclass(frozen=True, slots=True)
class Quantized:
    """What came of it. Field names are the keys of `--json`."""

    path: str
    #: of the weights' files
    bytes_before: int
    bytes_after: int
    #: texts that were measured, and their vectors' cosines to float32
    texts: int
    min_cosine: float
    mean_cosine: float
    #: of the cosines of the shipped sentence pairs with their grades
    spearman_before: float
    spearman_after: float
    #: products left in floating point, with the mean cosine that each alone would have cost
    kept: dict[str, float]


def quantize_folder(
    source: Path,
    target: Path,
    *,
    texts: Sequence[str] | None = None,
    min_cosine: float = MIN_COSINE,
    progress: Progress | None = None,
) -> Quantized:
    """Writes `target` whole or not at all. Runs on the CPU.

    texts: every other one finds the smoothing factors, the rest is measured (None: sentences that ship with embedq).
    min_cosine: the most harmful products stay in floating point until every measured text has it.
    Raises ModelFormatError and WeightsError for the source, ModelOptionError for the rest.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise ModelOptionError(f"{target} lies in the model that is copied: name a folder elsewhere")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelOptionError(f"{target} is there already: name a folder that is not")
    if not 0 < min_cosine < 1:
        raise ModelOptionError(f"min_cosine must be between 0 and 1, not {min_cosine:g}")
    if texts is not None and len(texts) < MIN_TEXTS:
        raise ModelOptionError(f"{len(texts)} texts are too few to measure anything: give {MIN_TEXTS} or more")
    quantizer = _Quantizer(source, default_texts() if texts is None else texts, progress or SilentProgress())
    kept = quantizer.choose_kept(min_cosine)
    fidelity = quantizer.cosines([product for product in quantizer.products if product not in kept])
    with _written_whole(target) as folder:
        bytes_after = quantizer.write(folder, kept)
    return Quantized(
        path=str(target),
        bytes_before=sum(file.stat().st_size for file in quantizer.checkpoint.files),
        bytes_after=bytes_after,
        texts=len(fidelity),
        min_cosine=float(fidelity.min()),
        mean_cosine=float(fidelity.mean()),
        spearman_before=spearman_on_pairs(quantizer.encode),
        spearman_after=spearman_on_pairs(_encode_by(SentenceEncoder.load(target, device="cpu"))),
        kept={str(product): harm for product, harm in kept.items()},
    )


def default_texts() -> list[str]:
    """The sample sentences, and the same again in threes: what is long has other extremes than what is short."""
    short = [*sentences(), *(pair.first for pair in sentence_pairs())]
    return [*short, *(" ".join(short[start : start + 3]) for start in range(0, len(short), 12))]


def _encode_by(encoder: SentenceEncoder) -> Callable[[Sequence[str]], Floats]:
    return lambda texts: encoder.encode(texts).astype(np.float32)


class _Quantizer:
    """One model in float32, any of whose products may be exchanged for its quantized form."""

    def __init__(self, source: Path, texts: Sequence[str], progress: Progress) -> None:
        self._source = source
        self._transformer = read_modules(source).transformer
        self.checkpoint = Checkpoint(self._transformer)
        if self.checkpoint.is_quantized:
            raise ModelFormatError(f"{source} is quantized already: quantize the original")
        self._encoder = SentenceEncoder(
            source, name=source.name, revision=None, device=torch.device("cpu"), dtype="float32"
        )
        self._model = self._encoder._embedder.model
        self._layers = list(self._model.layers)
        self.products = [Product(layer, field) for layer in range(len(self._layers)) for field in _PRODUCTS]
        self._calibration_texts, self._measured_texts = texts[::2], texts[1::2]
        self._progress = progress

    def encode(self, texts: Sequence[str]) -> Floats:
        """(n, d) in float32."""
        return self._encode_with([], texts)

    def _encode_with(self, products: Collection[Product], texts: Sequence[str]) -> Floats:
        """(n, d), these products quantized."""
        self._exchange({product: self._quantized[product] for product in products})
        try:
            return _encode_by(self._encoder)(texts)
        finally:
            self._model.layers = list(self._layers)

    def _exchange(self, linears: dict[Product, Linear]) -> None:
        for product, linear in linears.items():
            changes: dict[str, Any] = {product.field: linear}
            self._model.layers[product.layer] = replace(self._model.layers[product.layer], **changes)

    @cached_property
    def _quantized(self) -> dict[Product, Linear]:
        return {product: self._model.backend.make_linear(weights) for product, weights in self._weights.items()}

    @cached_property
    def _weights(self) -> dict[Product, LinearWeights]:
        return {product: self._quantize(product) for product in self.products}

    def _quantize(self, product: Product) -> LinearWeights:
        """Quantized and smoothed."""
        names = product.names
        tensors = self.checkpoint.read([f"{name}.{kind}" for name in names for kind in ("weight", "bias")])
        return quantize(stack([linear_weights(tensors, name) for name in names]), self._largest_inputs[product])

    @cached_property
    def _largest_inputs(self) -> dict[Product, Tensor]:
        """(in,) the largest magnitude of each input over the calibration texts."""
        recorders = {
            product: _Recorder(getattr(self._layers[product.layer], product.field)) for product in self.products
        }
        self._exchange(dict(recorders))
        try:
            self._encoder.encode(self._calibration_texts)
        finally:
            self._model.layers = list(self._layers)
        return {product: recorder.largest for product, recorder in recorders.items()}

    @cached_property
    def _exact(self) -> Floats:
        return self.encode(self._measured_texts)

    def cosines(self, products: Collection[Product], num_texts: int | None = None) -> Floats:
        """(n,) of the measured texts, or the first of them, these products quantized, to float32."""
        vectors = self._encode_with(products, self._measured_texts[:num_texts])
        return cosines(vectors, self._exact[:num_texts])

    def choose_kept(self, min_cosine: float) -> dict[Product, float]:
        """Products to leave as they are, with the harm each does alone; empty if all may be quantized."""
        if self.cosines(self.products).min() >= min_cosine:
            return {}
        harm = self._harm()
        kept: dict[Product, float] = {}
        for product in sorted(self.products, key=harm.__getitem__, reverse=True):
            kept[product] = harm[product]
            rest = [other for other in self.products if other not in kept]
            if not rest or self.cosines(rest).min() >= min_cosine:
                break
        return kept

    def _harm(self) -> dict[Product, float]:
        """What the mean cosine loses by each product alone."""
        self._progress.note(f"some vectors lose too much: measuring {len(self.products)} products one by one")
        return {product: float(1 - self.cosines([product], SENSITIVITY_TEXTS).mean()) for product in self.products}

    def write(self, folder: Path, kept: Collection[Product]) -> int:
        """All of the model into an empty folder; returns the bytes of the weights."""
        place = self._transformer.relative_to(self._source)
        self._copy_files(folder)
        weights = folder / place / WEIGHTS_FILE
        try:
            save_file(self._tensors(kept), weights, metadata={"format": "pt"})
        except SafetensorError as err:
            raise OSError(str(err)) from err
        weights.chmod(0o644)
        if self._encoder.calibration is not None:  # the model's own, or what ships for its weights
            about = {"model": self._source.name}
            (folder / CALIBRATION_FILE).write_bytes(self._encoder.calibration.to_bytes(about))
        config = read_json_object(self._transformer / "config.json")
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "kept": [str(product) for product in kept]}
        (folder / place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return weights.stat().st_size

    def _copy_files(self, folder: Path) -> None:
        """All but the weights. Content alone: links into a cache become files, and what is read-only may be changed."""
        for name, subfolders, files in os.walk(self._source, followlinks=True):
            here = Path(name)
            subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in _NOT_COPIED]
            there = folder / here.relative_to(self._source)
            there.mkdir(exist_ok=True)
            for file in files:
                if file not in _NOT_COPIED and not self._is_weights(here / file):
                    shutil.copyfile(here / file, there / file)

    def _is_weights(self, path: Path) -> bool:
        return path.parent == self._transformer and path.name.endswith(_OTHER_WEIGHTS)

    def _tensors(self, kept: Collection[Product]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for product in self.products:
            if product not in kept:
                tensors |= _split(product.names, self._weights[product])
        rest = [name for name in tensor_shapes(self._model.config) if name not in tensors]
        for name, tensor in self.checkpoint.read(rest).items():
            # Large ones: embedding tables, and the products that are kept.
            is_large = tensor.dim() == 2 and name != RELATIVE_BIAS
            tensors[name] = (tensor.bfloat16() if is_large else tensor.float()).contiguous()
        return tensors


def _split(names: Sequence[str], weights: LinearWeights) -> dict[str, Tensor]:
    """One product's weights as those of its linear layers, which have the same shape."""
    tensors: dict[str, Tensor] = {}
    parts = len(names)
    for name, weight, bias, scale in zip(
        names,
        weights.weight.chunk(parts),
        weights.bias.float().chunk(parts),
        _present(weights.scale).chunk(parts),
        strict=True,
    ):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = weight.clone(), bias.clone()
        tensors[f"{name}.{SCALE}"] = scale.clone()
        tensors[f"{name}.{INPUT_FACTOR}"] = _present(weights.input_factor).clone()
    return tensors


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("these weights are not quantized and smoothed")
    return tensor


class _Recorder:
    """Fulfils `Linear`: another one, and the largest magnitude that each input had."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self.largest = torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(self._seen(x))

    def gelu(self, x: Tensor) -> Tensor:
        return self._linear.gelu(self._seen(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._linear.add(self._seen(x), residual)

    def _seen(self, x: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, x.float().abs().amax(0))
        return x


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well, and goes otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as err:
        raise ModelOptionError(f"{target} cannot be written: {err.strerror}") from err
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's is for its owner alone
        with suppress(FileNotFoundError):
            target.rmdir()  # it is empty
        folder.rename(target)
    except OSError as err:
        raise ModelOptionError(f"{target} cannot be written: {err}") from err
    finally:
        shutil.rmtree(folder, ignore_errors=True)
