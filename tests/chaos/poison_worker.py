"""`python -m tests.chaos.poison_worker worker ...` is `embedq worker ...` with an encoder that some texts harm, each in
the way that it names, and that takes the same time for the same texts on any machine.

Knows how the drill's texts are marked and their pace; what they do is in `poison`.
"""

from __future__ import annotations

from collections.abc import Sequence

from embedq.model import TokenizedText
from tests.chaos.poison import run_worker

#: What a poison text begins with; its kind follows, and a blank.
MARK = "poison-"
#: The kinds.
HARMS = ("raise", "nan", "oom", "abort", "hang")
#: Seconds of one micro-batch, and of each of its tokens: full ones are worth having.
BATCH_S, TOKEN_S = 0.01, 0.0002


def _kind(text: str) -> str:
    return text.removeprefix(MARK).split()[0] if text.startswith(MARK) else ""


def _seconds(batch: Sequence[TokenizedText]) -> float:
    return BATCH_S + TOKEN_S * sum(text.num_tokens for text in batch)


if __name__ == "__main__":
    run_worker(_kind, _seconds)
