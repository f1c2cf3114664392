"""A cache of single texts' embeddings in Redis, by the hash of text, options and model.

Knows what is looked up and stored, as steps for `calls`; does no round trip. An entry is a result of one text on the
wire. Vectors of different models must never mix, so that the model is named in the options or there is no cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import islice

from embedq.producer import wire
from embedq.producer.calls import Operation
from embedq.producer.checks import is_int, shown
from embedq.producer.embeddings import Embeddings, Timings
from embedq.producer.errors import InvalidOptionError, WireError
from embedq.producer.options import EmbedOptions
from embedq.producer.outcomes import fitting
from embedq.producer.places import Place
from embedq.producer.requests import HASH_BYTES
from embedq.producer.settings import MAX_TTL_S

#: Entries read or written in one round trip.
CHUNK_ENTRIES = 256


class VectorCache:
    """Raises InvalidOptionError unless the options name the model and the time to live is whole seconds."""

    def __init__(self, place: Place, options: EmbedOptions, ttl_s: int) -> None:
        if options.model is None:
            raise InvalidOptionError(
                "cache_ttl needs model, the name of the model that is to embed: vectors of two models never mix"
            )
        if not is_int(ttl_s, 1, MAX_TTL_S):
            raise InvalidOptionError(f"cache_ttl must be whole seconds from 1 to {MAX_TTL_S}, not {shown(ttl_s)}")
        self._place, self._options = place, options
        self._ttl_s = ttl_s

    def look_up(self, texts: Sequence[str]) -> Operation[list[Embeddings | None]]:
        """Each text's embedding, None where the cache has none that can be read and is of the model."""
        found: list[Embeddings | None] = []
        for start in range(0, len(texts), CHUNK_ENTRIES):
            some = texts[start : start + CHUNK_ENTRIES]
            values = yield from self._place.kept([self._name(text) for text in some])
            found.extend(map(self._read, values))
        return found

    def store(self, entries: Iterable[tuple[str, Embeddings]]) -> Operation[None]:
        """Texts with the embedding of that one text each."""
        waiting = iter(entries)
        while some := list(islice(waiting, CHUNK_ENTRIES)):
            yield from self._place.keep({self._name(text): _lasting(found) for text, found in some}, self._ttl_s)

    def _name(self, text: str) -> str:
        return blake2b(wire.plain_request([text], self._options), digest_size=HASH_BYTES).hexdigest()

    def _read(self, value: bytes | None) -> Embeddings | None:
        if value is None:
            return None
        try:
            found = fitting(wire.decode_result(value), 1, self._options.output)
        except WireError:
            return None
        return found if isinstance(found, Embeddings) and self._options.is_by_model(found.model) else None


def _lasting(embedding: Embeddings) -> bytes:
    return wire.encode_result(replace(embedding, worker="", timings=Timings()))
