"""What an error of the encoder is as its job's failure.

A library may quote a text in its error. The failure is the job's own and may tell of it; the log must not: above DEBUG
it has the error's type alone.
"""

from __future__ import annotations

import logging

from embedq.model import ModelError, NonFiniteError, TextTooLongError
from embedq.producer.errors import JobFailedError

#: Codes of failures after which a text alone is tried once more.
OUT_OF_MEMORY, NON_FINITE = "out_of_memory", "non_finite"
#: Characters that a failure takes of the message of an error that is not ours.
MAX_MESSAGE = 200

#: What ends a process on purpose, whatever it is in the middle of. All else that is raised over a job is the job's
#: failure, also what is no Exception, as a panic of the tokenizer's Rust.
ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit)

logger = logging.getLogger("embedq.worker")


def job_failure(err: BaseException) -> JobFailedError:
    """Of what was raised before a job's texts were encoded, or after."""
    if isinstance(err, ModelError):
        index = err.text_index if isinstance(err, (TextTooLongError, NonFiniteError)) else None
        return JobFailedError(str(err), code=err.code, retryable=err.retryable, text_index=index)
    if isinstance(err, MemoryError):
        return JobFailedError("the worker has not enough memory for this job", code=OUT_OF_MEMORY, retryable=True)
    name = type(err).__name__
    logger.error("the encoder failed on a job: %s", name, extra={"event": "encoder_failed", "error": name})
    logger.debug("the encoder failed on a job", exc_info=err)
    return JobFailedError(said(err), code="internal", retryable=True)


def text_failure(err: BaseException, index: int) -> JobFailedError:
    """Of what was raised while text `index` of a job was encoded alone.

    Retryable, but for NaN and Inf: the text may pass another day, or on another machine.
    """
    if isinstance(err, NonFiniteError):
        return JobFailedError(f"text {index}: {err.reason}", code=NON_FINITE, text_index=index)
    if isinstance(err, MemoryError):
        message = f"text {index}: the worker has not enough memory even for this text alone"
        return JobFailedError(message, code=OUT_OF_MEMORY, retryable=True, text_index=index)
    message = f"text {index} could not be encoded: {said(err)}"
    return JobFailedError(message, code="encode_failed", retryable=True, text_index=index)


def said(err: BaseException) -> str:
    """Its type and the beginning of its message, on one line."""
    message = " ".join(str(err).split())
    shown = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
    return f"{type(err).__name__}: {shown}"
