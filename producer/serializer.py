"""The serializer that RQ is told to use for our jobs: `-S embedq.producer.serializer.EmbedSerializer`.

Plain values travel as JSON, embeddings as safetensors, told apart by their first bytes; pickle is never read.
"""

from __future__ import annotations

from typing import Any

import orjson

from embedq.producer import wire
from embedq.producer.embeddings import Embeddings
from embedq.producer.errors import WireError


class EmbedSerializer:
    """RQ's serializer protocol, for `Job.fetch(id, connection=..., serializer=EmbedSerializer)`."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        """Raises TypeError for a value that is neither JSON nor Embeddings."""
        return wire.encode_result(value) if isinstance(value, Embeddings) else orjson.dumps(value)

    @staticmethod
    def loads(blob: bytes) -> Any:
        """Raises WireError for bytes that are neither JSON nor a result of ours."""
        if wire.is_result(blob):
            return wire.decode_result(blob)
        try:
            return orjson.loads(blob)
        except orjson.JSONDecodeError as err:
            raise WireError(f"neither JSON nor a result of embedq: {err}") from err
