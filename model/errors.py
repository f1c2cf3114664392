"""What can go wrong between a model's name and a vector.

    ModelError
    ├── ModelSourceError          the model could not be had
    │   ├── ModelNotFoundError    no folder, hub model or packaged model has that name
    │   ├── ModelDownloadError    the network, the registry or the disk refused            (retryable)
    │   │   └── hub.HubUnreachableError   no answer of a hub, or a transfer that broke off
    │   └── ModelIntegrityError   a file's SHA-256 is not the published one
    ├── ModelFormatError          a file of the model folder is missing or cannot be read
    │   └── WeightsError          tensors missing, unexpected or of another shape
    ├── ModelOptionError          the model cannot do what this call asks for
    │   └── TextTooLongError      over max_seq_length, and truncation was declined
    ├── NonFiniteError            a text's vector came out with NaN or Inf
    ├── DeviceError               the device or dtype is not available here, or one text is too much for it
    ├── OutOfMemoryError (MemoryError)    fewer tokens at a time may fit                   (retryable)
    └── DeviceLostError           the device broke: nothing on it works in this process    (retryable)

This tree stands apart from `embedq.producer.errors`: neither package may import the other. The worker
translates a `ModelError` into a job failure by its `code`.
"""

from __future__ import annotations


class ModelError(Exception):
    """Base of every error of `embedq.model`; the message says what to do, on one line."""

    #: Stable name for machines: job failures and metrics carry it.
    code = "model_error"
    #: Whether the same call may succeed later without a change.
    retryable = False


class ModelSourceError(ModelError):
    code = "model_source"


class ModelNotFoundError(ModelSourceError):
    code = "model_not_found"


class ModelDownloadError(ModelSourceError):
    code = "model_download"
    retryable = True


class ModelIntegrityError(ModelSourceError):
    code = "model_integrity"


class ModelFormatError(ModelError):
    code = "model_format"


class WeightsError(ModelFormatError):
    code = "model_weights"


class ModelOptionError(ModelError):
    code = "unsupported_option"


class TextTooLongError(ModelOptionError):
    """`text_index` is the place of the guilty text in the call's list."""

    code = "text_too_long"

    def __init__(self, message: str, text_index: int) -> None:
        super().__init__(message)
        self.text_index = text_index


class NonFiniteError(ModelError):
    """`text_index` is the place of the guilty text in the call's list, `reason` the message without it."""

    code = "non_finite"

    def __init__(self, reason: str, text_index: int) -> None:
        super().__init__(f"text {text_index}: {reason}")
        self.reason = reason
        self.text_index = text_index


class DeviceError(ModelError):
    code = "device_unavailable"


class OutOfMemoryError(ModelError, MemoryError):
    """A MemoryError too, as the host's own is: who has less to encode at a time need not tell them apart."""

    code = "out_of_memory"
    retryable = True


class DeviceLostError(ModelError):
    """Every further call would fail as well, whatever the text: only a new process gets the device back."""

    code = "device_lost"
    retryable = True
