"""The published files of all-mpnet-base-v2. Knows no network: only names, sizes and SHA-256."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from embedq.model.manifest import FileRecord

ALL_MPNET_BASE_V2: Final = "sentence-transformers/all-mpnet-base-v2"
WEIGHTS_FILE: Final = "model.safetensors"

#: Path inside the model folder -> SHA-256 and size, as published in May 2024.
ALL_MPNET_BASE_V2_FILES: Final[Mapping[str, FileRecord]] = MappingProxyType(
    {
        "1_Pooling/config.json": FileRecord("a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56", 190),
        "README.md": FileRecord("a3e99d3235e3c1b4225f4b98892be383f2ed87a50b3a5420ae156e77716182de", 10_621),
        "config.json": FileRecord("d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0", 571),
        "config_sentence_transformers.json": FileRecord(
            "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3", 116
        ),
        "model.safetensors": FileRecord(
            "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658", 437_971_872
        ),
        "modules.json": FileRecord("84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf", 349),
        "sentence_bert_config.json": FileRecord("cabfacded9272091a06ff595a46ef027a76ddf4ac9e77d0fcf11c605748f1667", 53),
        "special_tokens_map.json": FileRecord("9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba", 239),
        "tokenizer.json": FileRecord("b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842", 466_021),
        "tokenizer_config.json": FileRecord("67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268", 363),
        "vocab.txt": FileRecord("dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada", 231_536),
    }
)
