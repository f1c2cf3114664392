"""The encoder that a setting names: the stand-in without torch, or the real one with it."""

from __future__ import annotations

import os

from embedq.model import Encoder, NoopEncoder
from embedq.producer.errors import ConfigurationError
from embedq.worker.cores import default_threads
from embedq.worker.settings import WorkerSettings


def load_encoder(settings: WorkerSettings) -> Encoder:
    """Raises ModelError, and ConfigurationError where the model's libraries are not installed."""
    if settings.model.startswith("noop:"):
        if settings.calibration is not None:
            raise ConfigurationError(f"{settings.model} takes no calibration: its ranges are -1 to 1")
        return NoopEncoder.parse(settings.model)
    try:
        from embedq.model import SentenceEncoder
    except ModuleNotFoundError as err:
        raise ConfigurationError(
            f"{err.name} is not installed, which {settings.model} needs: pip install 'embedq[worker]'"
        ) from err
    _set_threads(settings.threads)
    return SentenceEncoder.load(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        attention=settings.attention,
        kernels=settings.kernels,
        revision=settings.revision,
        max_batch_tokens=settings.max_batch_tokens,
        warm_up=settings.warm_up,
        allow_tf32=settings.allow_tf32,
        calibration=settings.calibration,
    )


def _set_threads(threads: int | None) -> None:
    """Before the first tensor. All kernels of the model run on torch's team; the tokenizer has threads of its own."""
    import torch

    threads = threads or default_threads(torch.get_num_threads())
    torch.set_num_threads(threads)
    # The tokenizer's start with the first text.
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
