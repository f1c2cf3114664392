"""Embeddings as files: npy, safetensors, json, jsonl. Knows bytes on disk, no Redis."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Literal, get_args

import orjson

from embedq.producer import wire
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import EmbedqError

FileFormat = Literal["npy", "json", "jsonl", "safetensors"]
FILE_FORMATS: tuple[str, ...] = get_args(FileFormat)
#: Formats that a terminal cannot show.
BINARY_FORMATS = ("npy", "safetensors")


def encode(result: Embeddings, file_format: str) -> bytes:
    """npy: the (n, d) array alone. safetensors: tensor and metadata. json: all. jsonl: one vector a line.

    Of token output, jsonl has a line of vectors for each text; npy would lose which token is whose: EmbedqError.
    """
    if file_format == "safetensors":
        return wire.encode_result(result)
    if file_format == "json":
        return orjson.dumps(result.to_plain(), option=orjson.OPT_INDENT_2) + b"\n"
    if file_format == "jsonl":
        return b"".join(orjson.dumps(row) + b"\n" for row in result.vectors_by_text())
    if result.output == "tokens":
        raise EmbedqError("npy cannot say which token is of which text; use safetensors, json or jsonl")
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, result.vectors, allow_pickle=False)
    return buffer.getvalue()


def write_whole(path: Path, data: bytes) -> None:
    """The whole file or none: a full disk or Ctrl-C leaves what was there before. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files for one user alone; the result is as public as any new file.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
