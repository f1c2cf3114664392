"""NaN, Inf and ids that are none: an error that says where, never a vector that is none.

float16 ends at 65504; its overflow is emulated on the CPU, which rounds as a GPU does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, random_sequences, write_json, write_modules
from torch.utils._python_dispatch import TorchDispatchMode

from embedq.model import ModelOptionError, NonFiniteError, SentenceEncoder, TokenizedText
from embedq.model.embedder import Embedder
from embedq.producer import EmbedOptions, JobFailedError
from embedq.producer.wire import EmbedRequest
from embedq.worker.engine import Engine
from embedq.worker.planning import ReadyTexts

Tensors = dict[str, torch.Tensor]
#: Where the text's one odd token is looked up.
ODD_ID = 40


def tokens(*sequences: Any) -> list[TokenizedText]:
    return [TokenizedText(np.asarray(ids), False) for ids in sequences]


def load(folder: Path, dtype: str = "float32", change: Callable[[Tensors], None] | None = None) -> SentenceEncoder:
    if change is not None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return SentenceEncoder.load(folder, device="cpu", dtype=dtype)


def only_for_odd_token(tensors: Tensors) -> None:
    tensors["embeddings.word_embeddings.weight"][ODD_ID] = 2e38  # its variance overflows float32


def test_one_bad_text_is_named_by_its_place_and_layer(own_folder: Path) -> None:
    encoder = load(own_folder, change=only_for_odd_token)
    good = [np.where(ids == ODD_ID, 7, ids) for ids in random_sequences([9, 30, 4])]
    batch = tokens(good[0], good[1], [0, ODD_ID, 2], good[2])
    with pytest.raises(NonFiniteError, match=r"^text 2: .*NaN or Inf already in the embeddings$") as caught:
        encoder.encode_tokens(batch)
    assert (caught.value.text_index, caught.value.code, caught.value.retryable) == (2, "non_finite", False)
    assert np.isfinite(encoder.encode_tokens([batch[0], batch[1], batch[3]])).all()


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layer_that_overflows_is_named(own_folder: Path, layer: int) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"encoder.layer.{layer}.output.LayerNorm.weight"][:] = 3e38
        tensors[f"encoder.layer.{layer}.output.LayerNorm.bias"][:] = 3e38

    with pytest.raises(NonFiniteError, match=f"first in layer {layer + 1} of 2$"):
        load(own_folder, change=change).encode("the fox")


def test_what_overflows_behind_the_layers_is_said_to(own_folder: Path) -> None:
    write_modules(own_folder, "Pooling", "Dense")
    config = {"in_features": 24, "out_features": 4, "bias": False}
    write_json(
        own_folder / "2_Dense" / "config.json",
        {**config, "activation_function": "torch.nn.modules.linear.Identity"},
    )
    save_file({"linear.weight": torch.full((4, 24), 3e38)}, own_folder / "2_Dense" / "model.safetensors")
    with pytest.raises(NonFiniteError, match="behind the last layer, in Pooling or Dense"):
        load(own_folder).encode("the fox")


@pytest.mark.parametrize("options", [{}, {"output": "tokens"}, {"chunk": True}])
def test_a_bad_text_is_named_by_its_place_in_the_call(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Not in the slice, nor among the windows, in which it was encoded."""
    monkeypatch.setattr("embedq.model.slices.SLICE_TEXTS", 2)
    encoder = load(own_folder, change=only_for_odd_token)
    with pytest.raises(NonFiniteError, match=r"^text 4: .*already in the embeddings$") as caught:
        encoder.encode(["the fox", "dog " * 200, "dog", "dog " * 150, "ai", "fox"], **options)
    assert caught.value.text_index == 4
    assert not torch.is_inference_mode_enabled()


def test_torch_is_as_it_was_between_micro_batches(tiny_folder: Path) -> None:
    """A generator that is left half-way, as an error does, would keep its context open."""
    encoder = load(tiny_folder)._embedder
    encoder.max_batch_tokens = 1
    batches = encoder._run(tokens(*[[0, 5, 2]] * 9), lambda rows: torch.zeros(len(rows), 1), lambda _: None)
    next(batches)
    assert not torch.is_inference_mode_enabled()


def test_an_error_that_a_text_alone_does_not_have_is_said_to(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(own_folder)
    whole = Embedder.encode_packed

    def flaky(encoder: Embedder, sequences: list[Any]) -> torch.Tensor:
        vectors = whole(encoder, sequences)
        return vectors * math.nan if len(sequences) > 1 else vectors

    monkeypatch.setattr(Embedder, "encode_packed", flaky)
    with pytest.raises(NonFiniteError, match=r"text 0: .*not when the text is encoded alone"):
        encoder.encode(["the fox", "the dog"])


def test_the_lowest_place_is_named_where_several_are_bad(own_folder: Path) -> None:
    encoder = load(own_folder, change=only_for_odd_token)
    with pytest.raises(NonFiniteError, match=r"^text 1:"):
        encoder.encode_tokens(tokens([0, 7, 2], [0, ODD_ID, 2], [0, 7, ODD_ID, 2]))


def test_in_a_worker_the_guilty_job_fails_alone(own_folder: Path) -> None:
    engine = Engine(load(own_folder, change=only_for_odd_token))
    assert VOCABULARY[ODD_ID] == "##i"
    works = [engine.tokenize(EmbedRequest(texts, EmbedOptions())) for texts in (["fox"], ["dog", "ai"], ["the fox"])]
    ready = ReadyTexts(engine.max_batch_tokens)
    ready.add([work.ready() for work in works])
    batch = ready.take()
    engine.encode(batch)
    assert [work.failure is None for work in works] == [True, False, True]
    assert np.isfinite(engine.finish(works[0]).vectors).all()
    with pytest.raises(JobFailedError, match=r"^text 1: .* already in the embeddings") as caught:
        engine.finish(works[1])
    assert (caught.value.code, caught.value.text_index, caught.value.retryable) == ("non_finite", 1, False)


# --- float16


@pytest.mark.parametrize(("size", "overflows"), [(60000.0, False), (65000.0, False), (80000.0, True)])
def test_float16_overflows_where_the_other_types_do_not(own_folder: Path, size: float, overflows: bool) -> None:
    """A product's result in float16 (65504) is the border; the LayerNorm behind it computes in float32."""

    def change(tensors: Tensors) -> None:
        # The product is its bias and fits float16; only its sum with the residual may not.
        tensors["encoder.layer.0.output.dense.weight"][:] = 0
        tensors["encoder.layer.0.output.dense.bias"][3] = size / 2
        tensors["encoder.layer.0.attention.LayerNorm.bias"][3] = size / 2

    exact = load(own_folder, change=change).encode("the fox", normalize=False)
    np.testing.assert_allclose(load(own_folder, "bfloat16").encode("the fox", normalize=False), exact, atol=0.2)
    half = load(own_folder, "float16")
    if overflows:
        with pytest.raises(NonFiniteError, match="first in layer 1 of 2; float16 ends at 65504: use bfloat16"):
            half.encode("the fox")
    else:
        np.testing.assert_allclose(half.encode("the fox", normalize=False), exact, atol=0.02)


def large_scores(tensors: Tensors) -> None:
    """Each query times its key is 8 * 111 ** 2 = 98,568: beyond float16, and within it once divided by sqrt(8)."""
    for part in "qk":
        tensors[f"encoder.layer.0.attention.attn.{part}.weight"][:] = 0
        tensors[f"encoder.layer.0.attention.attn.{part}.bias"][:] = 111


def test_scores_are_scaled_before_float16_could_overflow(own_folder: Path) -> None:
    exact = load(own_folder, change=large_scores).encode("the quick brown fox")
    half = load(own_folder, "float16").encode("the quick brown fox")
    # Less than elsewhere: beside scores of 35,000, whose neighbours are 32 apart, the position bias is lost.
    assert (exact * half).sum() > 0.99
    query = torch.full((1, 5, 8), 111.0, dtype=torch.float16)
    assert torch.bmm(query, query.transpose(1, 2)).isinf().all(), "scaled afterwards it would be too late"


class Scores(TorchDispatchMode):
    """All that goes into a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__.startswith(("softmax", "_softmax")):
            self.seen.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_row_of_a_softmax_has_a_key_to_look_at(tiny_folder: Path, dtype: str) -> None:
    """A row of -inf alone would be NaN; padded queries too must have none."""
    encoder = load(tiny_folder, dtype)
    with Scores() as scores:
        vectors = encoder.encode_tokens(tokens(*random_sequences([5, 4, 3, 2, 1, 1, 64, 57, 40, 36])))
    assert np.isfinite(vectors).all()
    assert any(seen.isneginf().any() for seen in scores.seen), "some group was padded"
    assert all((seen > -math.inf).any(dim=-1).all() for seen in scores.seen)


# --- ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, -1, 2], "token ids must be 0 to 73, not -1 to 2"),
        ([0, 74, 2], "token ids must be 0 to 73, not 0 to 74"),
        (np.array([0, 2**32 + 3], dtype=np.int64), "token ids must be 0 to 73, not 0 to 4294967299"),
        (np.array([0, 2**63], dtype=np.uint64), "token ids must be 0 to 73"),
        ([0.0, 5.0, 2.0], "must be vectors of whole numbers, not float64"),
        ([True, False], "must be vectors of whole numbers, not bool"),
        ([[0, 5], [5, 2]], "must be vectors of whole numbers, not int64 of 2 axes"),
        (["<s>", "fox"], "must be vectors of whole numbers, not <U3"),
        ([], "has 0 tokens: this model takes 1 to 64"),
        ([5] * 65, "has 65 tokens: this model takes 1 to 64"),
    ],
)
def test_ids_that_are_none_are_refused_with_the_range(tiny_folder: Path, ids: Any, message: str) -> None:
    with pytest.raises(ModelOptionError, match=message):
        load(tiny_folder).encode_tokens(tokens(ids))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint32, np.uint64])
def test_ids_of_any_whole_type_give_the_same(tiny_folder: Path, dtype: Any) -> None:
    encoder = load(tiny_folder)
    ids = random_sequences([7])[0]
    np.testing.assert_array_equal(encoder.encode_tokens(tokens(ids.astype(dtype))), encoder.encode_tokens(tokens(ids)))
