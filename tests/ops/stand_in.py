"""A worker of the drill: `python -m tests.ops.stand_in worker ...` is `embedq worker ...` with an encoder that takes
the time of a small GPU, and that some texts harm.

A text that begins with `ops-KIND ` does what the suite's poisoned encoder does for that kind. One that is not finite is
in float32, so that the fallback is seen. Knows the encoder's surface; knows no Redis.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import redis
from rq.job import Job

from embedq.model import Encoder, NoopEncoder, TokenizedText
from embedq.worker import worker as worker_module
from embedq.worker.cli import main
from embedq.worker.settings import WorkerSettings
from tests.chaos.poison import PoisonedEncoder

#: What a harmful text begins with; its kind follows, and a blank.
MARK = "ops-"
#: Seconds of one micro-batch, and of each of its tokens.
BATCH_S, TOKEN_S = 0.01, 1 / 6000
LINGER_S = 3.0


class StandIn(PoisonedEncoder):
    def in_float32(self) -> NoopEncoder:
        return NoopEncoder(self.embedding_dim)


def linger(job: Job, connection: redis.Redis, result: object) -> None:
    """A callback that takes a while, for which a worker that leaves waits."""
    time.sleep(LINGER_S)


def harmful(kind: str, words: str = "text") -> str:
    return f"{MARK}{kind} {words}"


def load_encoder(settings: WorkerSettings) -> Encoder:
    return StandIn(NoopEncoder.parse(settings.model).embedding_dim, _kind, _seconds)


def _kind(text: str) -> str:
    return text.removeprefix(MARK).split()[0] if text.startswith(MARK) else ""


def _seconds(batch: Sequence[TokenizedText]) -> float:
    return BATCH_S + TOKEN_S * sum(text.num_tokens for text in batch)


def run() -> None:
    """A supervisor's processes run this module too."""
    worker_module.load_encoder = load_encoder  # type: ignore[attr-defined]
    if "--processes" in sys.argv:
        # Of an earlier release that is run with this module there is none.
        from embedq.worker.supervision import supervise

        assert supervise.EMBEDQ[1] == "-m"  # what it starts its processes with
        supervise.EMBEDQ = (sys.executable, "-m", __spec__.name)
    main()


if __name__ == "__main__":
    run()
