"""What both clients of a queue have in common: where it is, its name, its defaults and its scripts.

Knows no round trips: those are `queue`'s and `async_queue`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic

from embedq.producer import calls, requests, scripts
from embedq.producer.checks import lone_surrogate, shown
from embedq.producer.connection import DEFAULT_URL, Client, check_client
from embedq.producer.errors import ConfigurationError
from embedq.producer.options import EmbedOptions
from embedq.producer.places import OneRedis, Place
from embedq.producer.requests import Request
from embedq.producer.settings import EnqueueKeywords, JobSettings, split_keywords

DEFAULT_QUEUE = "embed"
MAX_QUEUE_CHARS = 256


class QueueClient(Generic[Client]):
    """One queue of one Redis."""

    def __init__(
        self,
        url: str | None,
        queue: str,
        connection: Client | None,
        connect: Callable[[str], Client],
        defaults: EnqueueKeywords,
    ) -> None:
        """connect: to a URL, where no connection is given. Raises ConfigurationError, InvalidOptionError."""
        if url is not None and connection is not None:
            raise ConfigurationError("give a url or a connection, not both")
        self._begin(OneRedis(check_queue_name(queue)), defaults)
        self._owns_connection = connection is None
        self._client: Client = connect(url or DEFAULT_URL) if connection is None else check_client(connection)
        self._redis: Any = self._client
        self._scripts = {name: scripts.load(self._client, __package__, name) for name in calls.SCRIPTS}

    def _begin(self, place: Place, defaults: EnqueueKeywords) -> None:
        """What there is without a connection. Raises InvalidOptionError."""
        self.name = place.queue
        self._place = place
        self._defaults = defaults
        split_keywords(defaults)

    def _split(self, keywords: EnqueueKeywords) -> tuple[EmbedOptions, JobSettings]:
        return split_keywords({**self._defaults, **keywords})

    def _request(
        self, texts: str | Sequence[str], job_id: str | None, keywords: EnqueueKeywords
    ) -> tuple[Request, JobSettings]:
        options, settings = self._split(keywords)
        return requests.one(self.name, texts, job_id, options, settings), settings


def check_queue_name(name: object) -> str:
    """Raises ConfigurationError."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_QUEUE_CHARS or lone_surrogate(name) is not None:
        raise ConfigurationError(
            f"the queue's name must be a string that is not empty, of up to {MAX_QUEUE_CHARS}, not {shown(name)}"
        )
    return name
