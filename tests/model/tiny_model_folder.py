"""A whole sentence-transformers folder with a random MPNet of a few kilobytes, written without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from embedq.model.config import MPNetConfig
from embedq.model.mpnet import tensor_shapes

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
CONFIG = MPNetConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=66,
    relative_attention_num_buckets=32,
    layer_norm_eps=1e-5,
)


def write_tiny_model(folder: Path) -> None:
    config = {name: getattr(CONFIG, name) for name in CONFIG.__slots__}
    _write_json(folder / "config.json", {"model_type": "mpnet", "hidden_act": "gelu", **config})
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    _write_json(
        folder / "config_sentence_transformers.json", {"prompts": {"query": "find: "}, "default_prompt_name": None}
    )
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    )
    random = np.random.default_rng(3)
    tensors = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in tensor_shapes(CONFIG).items()}
    save_file(tensors, folder / "model.safetensors")
    _tokenizer().save(str(folder / "tokenizer.json"))


def _tokenizer() -> Tokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), ".", "?", "the", "dog"]
    tokenizer = Tokenizer(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
