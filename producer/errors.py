"""Everything that can go wrong between a caller and its embeddings.

    EmbedqError
    ├── InvalidRequestError (ValueError)     refused before anything reached Redis
    │   ├── InvalidTextError                 not a string, empty list, too many, too long  (text_index)
    │   ├── InvalidOptionError               an unknown option or a value out of range
    │   └── InvalidJobIdError                not letters, digits, `_` and `-`
    ├── ConfigurationError (ValueError)      a URL or setting that cannot work
    ├── QueueConnectionError                 Redis cannot be reached                       (retryable)
    │   └── QueueAccessError                 Redis wants other credentials or permissions
    ├── PartialEnqueueError                  an error between two chunks of enqueue_many   (job_ids, retryable)
    ├── QueueServerError                     Redis refused a command: out of memory, ...   (retryable)
    ├── QueueFull                            the queue has as many jobs as it may hold     (retryable)
    ├── DuplicateJobError                    the job id is taken by another request
    ├── JobNotFoundError                     never existed, expired or was deleted
    ├── JobStateError                        the job's status does not allow the operation
    ├── JobCanceledError                     somebody canceled the job that is waited for
    ├── JobFailedError                       a worker gave up on the job                   (code, retryable, text_index)
    ├── ResultTimeoutError (TimeoutError)    no result yet; the job goes on                (retryable)
    ├── MixedResultsError                    parts of one result are of different models   (retryable)
    └── WireError                            bytes in Redis that are not a request or result of ours
        └── NewerVersionError                they are, of a version that came after this embedq  (version)

Every message is one line and says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence


class EmbedqError(Exception):
    """Base of every error of `embedq.producer` and `embedq.worker`."""

    #: Stable name for machines, also the job failure's code.
    code = "embedq_error"
    #: Whether the same call may succeed later without a change.
    retryable = False


class InvalidRequestError(EmbedqError, ValueError):
    code = "invalid_request"


class InvalidTextError(InvalidRequestError):
    """`text_index` is the place of the guilty text, None where the list itself is at fault."""

    code = "invalid_text"

    def __init__(self, message: str, text_index: int | None = None) -> None:
        super().__init__(message)
        self.text_index = text_index


class InvalidOptionError(InvalidRequestError):
    code = "invalid_option"


class InvalidJobIdError(InvalidRequestError):
    code = "invalid_job_id"


class ConfigurationError(EmbedqError, ValueError):
    code = "configuration"


class QueueConnectionError(EmbedqError):
    code = "redis_unreachable"
    retryable = True


class QueueAccessError(QueueConnectionError):
    code = "redis_access"
    retryable = False


class PartialEnqueueError(EmbedqError):
    """`job_ids` are those known to be enqueued, `text_indexes` the places of their texts; enqueue the rest again."""

    code = "partial_enqueue"

    def __init__(
        self, message: str, job_ids: Sequence[str], text_indexes: Sequence[int], *, retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.job_ids = list(job_ids)
        self.text_indexes = list(text_indexes)
        self.retryable = retryable

    @classmethod
    def of(
        cls, message: str, job_ids: Sequence[str], accepted: Collection[str], *, retryable: bool
    ) -> PartialEnqueueError:
        """Of these ids, one a text, those accepted."""
        places = [place for place, job_id in enumerate(job_ids) if job_id in accepted]
        ids = list(dict.fromkeys(job_ids[place] for place in places))
        return cls(message, ids, places, retryable=retryable)


class QueueServerError(EmbedqError):
    code = "redis_refused"
    retryable = True


class QueueFull(EmbedqError):  # noqa: N818  (a state of the queue, as queue.Full)
    """Nothing of the call, or of its last chunk, was enqueued."""

    code = "queue_full"
    retryable = True


class DuplicateJobError(EmbedqError):
    code = "duplicate_job"

    def __init__(self, message: str, job_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.job_ids = list(job_ids)


class JobNotFoundError(EmbedqError):
    code = "job_not_found"


class JobStateError(EmbedqError):
    code = "job_state"


class JobCanceledError(EmbedqError):
    code = "job_canceled"


class JobFailedError(EmbedqError):
    """A job's failure: `code` for machines, `message` for people, `text_index` of the guilty text if one is.

    `str()` ends in a bracket that `parse` reads back: it is the last line of what RQ stores as the job's
    traceback, so the code survives whichever worker ran the job, and every RQ tool shows it.
    """

    #: The code of a job whose worker died, whether RQ's clean-up or ours found it.
    ABANDONED = "abandoned"

    def __init__(
        self, message: str, *, code: str = "exception", retryable: bool = False, text_index: int | None = None
    ) -> None:
        self.message = " ".join(message.split())
        self.code = code
        self.retryable = retryable
        self.text_index = text_index
        super().__init__(str(self))

    def __str__(self) -> str:
        where = "" if self.text_index is None else f" text_index={self.text_index}"
        return f"{self.message} [code={self.code} retryable={'yes' if self.retryable else 'no'}{where}]"

    def __reduce__(self) -> tuple[type[JobFailedError], tuple[str], dict[str, object]]:
        state: dict[str, object] = {
            "code": self.code,
            "retryable": self.retryable,
            "text_index": self.text_index,
        }
        return type(self), (self.message,), state

    def of_text(self, index: int | None) -> JobFailedError:
        """The same failure in the caller's count of texts, where a job held only some of them; None: of no one text."""
        return JobFailedError(self.message, code=self.code, retryable=self.retryable, text_index=index)

    @classmethod
    def abandoned(cls, index: int | None = None) -> JobFailedError:
        """`index` of the text that the worker was at, all by itself, where that is known."""
        which = "the job" if index is None else f"text {index}"
        message = f"a worker died with {which} in hand and no retries were left"
        return cls(message, code=cls.ABANDONED, retryable=True, text_index=index)

    @classmethod
    def parse(cls, exc_string: str) -> JobFailedError:
        """The failure that RQ's `exc_string` (a traceback) tells of; code `exception` where it isn't ours."""
        lines = [line for line in exc_string.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "the worker left no reason"
        if match := _FAILURE_LINE.fullmatch(last):
            index = match["text_index"]
            return cls(
                match["message"],
                code=match["code"],
                retryable=match["retryable"] == "yes",
                text_index=None if index is None else int(index),
            )
        if "AbandonedJobError" in last:
            return cls.abandoned()
        return cls(last)


_FAILURE_LINE = re.compile(
    r"(?:[\w.]+Error: )?(?P<message>.*) "
    r"\[code=(?P<code>\w+) retryable=(?P<retryable>yes|no)(?: text_index=(?P<text_index>[0-9]{1,9}))?\]"
)


class ResultTimeoutError(EmbedqError, TimeoutError):
    code = "result_timeout"
    retryable = True


class MixedResultsError(EmbedqError):
    code = "mixed_results"
    retryable = True


class WireError(EmbedqError):
    code = "bad_payload"


class NewerVersionError(WireError):
    """`version` of the wire format is above what this embedq reads. A worker leaves such a job for a newer one."""

    code = "newer_version"

    def __init__(self, message: str, version: int) -> None:
        super().__init__(message)
        self.version = version
