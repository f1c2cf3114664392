"""Tiny random MPNets as sentence-transformers folders, made by transformers itself, and the reference for them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import RobertaProcessing
from transformers import MPNetConfig, MPNetModel

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "dog", "run", "##ning", "##s", ".", ",", "!", "-", "中", "é"]
VOCABULARY = [*SPECIAL_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]

DEFAULTS: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 66,
    "relative_attention_num_buckets": 32,
    "layer_norm_eps": 1e-5,
}


def write_folder(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A bare transformers folder: config.json, model.safetensors, tokenizer.json."""
    torch.manual_seed(seed)
    model = MPNetModel(MPNetConfig(**(DEFAULTS | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that every part has a say: with transformers' 0.02 attention would be almost uniform.
            parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(WordPiece({word: index for index, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    # As in published folders, and to be ignored.
    tokenizer.enable_truncation(max_length=5)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=5)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "MPNetTokenizer",
            "model_max_length": 64,
            "bos_token": "<s>",
            "cls_token": "<s>",
            "eos_token": "</s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "[UNK]",
            "mask_token": "<mask>",
        },
    )


def write_modules(folder: Path, *kinds: str, transformer: str = "") -> None:
    """modules.json in the old style: `write_modules(folder, "Pooling", "Normalize")` behind a Transformer."""
    paths = [transformer, *(f"{index}_{kind}" for index, kind in enumerate(kinds, start=1))]
    steps = enumerate(zip(paths, ("Transformer", *kinds), strict=True))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in steps
    ]
    write_json(folder / "modules.json", modules)


def write_pooling(folder: Path, **config: Any) -> None:
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": DEFAULTS["hidden_size"], **config})


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: Any) -> None:
    """A change to None removes the field."""
    content = json.loads(path.read_text()) | changes
    write_json(path, {name: value for name, value in content.items() if value is not None})


def reference(folder: Path) -> MPNetModel:
    """transformers' own model, eager attention; its one blind spot (the number of buckets) opened."""
    model = MPNetModel.from_pretrained(folder, attn_implementation="eager").eval()
    encoder = model.encoder
    encoder.compute_position_bias = partial(
        encoder.compute_position_bias, num_buckets=model.config.relative_attention_num_buckets
    )
    return model


def reference_states(model: MPNetModel, ids: NDArray[np.int32]) -> list[torch.Tensor]:
    """(L, hidden) of one sequence by itself, after the embeddings and after each layer."""
    with torch.inference_mode():
        output = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
    return [state[0] for state in output.hidden_states]


def random_sequences(lengths: list[int], vocab_size: int = len(VOCABULARY), seed: int = 0) -> list[NDArray[np.int32]]:
    """Ids without the padding token."""
    random = np.random.default_rng(seed)
    return [random.integers(len(SPECIAL_TOKENS), vocab_size, length).astype(np.int32) for length in lengths]
