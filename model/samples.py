"""Sample text that ships with the package: sentences, graded pairs of sentences, and corpora made of the sentences.

Knows no tokenizer: whoever wants a corpus says how texts are measured.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import NormalDist
from typing import Literal, get_args

CorpusName = Literal["short", "mixed", "long"]
CORPORA: tuple[CorpusName, ...] = get_args(CorpusName)

#: Tokens of a query, the two special ones included.
SHORT_TOKENS = 12
#: How many of the sentences nearest to that length the queries are drawn from.
SHORT_POOL = 160
#: Mean of the log-normal lengths, and the standard deviation of their logarithms: many short texts, a few long
#: ones, as in search corpora. The longest are cut to what MPNet models commonly take.
MIXED_TOKENS, MIXED_SPREAD, MIXED_LONGEST = 45, 0.8, 380
#: Long texts have this many tokens, give or take the share beside it.
LONG_TOKENS, LONG_SPREAD = 300, 0.1
#: Start and end of a text: a joined text has them once.
NUM_SPECIAL = 2
#: A sentence that ends a text may miss the wanted length by so many tokens, for the sake of variety.
SLACK_TOKENS = 1


@dataclass(frozen=True, slots=True)
class SentencePair:
    first: str
    second: str
    #: how alike the meanings are, in half steps from 0 (nothing in common) to 5 (the same)
    grade: float


@cache
def sentences() -> tuple[str, ...]:
    """400 English sentences on many topics, all different."""
    return tuple(line for line in _read("sentences.txt").splitlines() if line.strip())


@cache
def sentence_pairs() -> tuple[SentencePair, ...]:
    """Pairs with a grade that people would give, spread evenly over the grades."""
    lines = [line for line in _read("sentence_pairs.tsv").splitlines() if line and not line.startswith("#")]
    return tuple(SentencePair(first, second, float(grade)) for grade, first, second in map(_columns, lines))


def _columns(line: str) -> tuple[str, str, str]:
    grade, first, second = line.split("\t")
    return grade, first, second


def _all_sentences() -> list[str]:
    """Those of the pairs too, each once, in the order of the files."""
    return list(
        dict.fromkeys([*sentences(), *(text for pair in sentence_pairs() for text in (pair.first, pair.second))])
    )


def _read(name: str) -> str:
    return files(__package__ or "embedq.model").joinpath(name).read_text(encoding="utf-8")


def corpus(
    name: CorpusName, num_texts: int, num_tokens: Callable[[Sequence[str]], Sequence[int]], *, seed: int = 0
) -> list[str]:
    """`num_texts` texts in random order, the same ones for the same arguments.

    short: queries of about 12 tokens. mixed: log-normal lengths of mean 45. long: about 300 tokens.
    `num_tokens` gives each text's length, special tokens included. Texts are whole sentences, joined.
    """
    # Nothing secret: the same texts for the same seed.
    draw = random.Random(f"{name} {seed}")  # nosec B311
    material = _all_sentences()
    sized = zip(num_tokens(material), material, strict=True)
    if name == "short":
        nearest = sorted(sized, key=lambda one: (abs(one[0] - SHORT_TOKENS), one[1]))
        return [draw.choice(nearest[:SHORT_POOL])[1] for _ in range(num_texts)]
    by_size = sorted((size - NUM_SPECIAL, text) for size, text in sized)
    wanted = _mixed_lengths(num_texts) if name == "mixed" else _long_lengths(num_texts)
    draw.shuffle(wanted)
    return [_joined(by_size, length - NUM_SPECIAL, draw) for length in wanted]


def _mixed_lengths(number: int) -> list[float]:
    """Quantiles at equal distances, not draws: so the mean is as named for small numbers too."""
    log_mean = math.log(MIXED_TOKENS) - MIXED_SPREAD**2 / 2
    normal = NormalDist(log_mean, MIXED_SPREAD)
    return [min(MIXED_LONGEST, math.exp(normal.inv_cdf((place + 0.5) / number))) for place in range(number)]


def _long_lengths(number: int) -> list[float]:
    return [LONG_TOKENS * (1 + LONG_SPREAD * (2 * (place + 0.5) / number - 1)) for place in range(number)]


def _joined(by_size: Sequence[tuple[int, str]], wanted: float, draw: random.Random) -> str:
    """Sentences, in all as near to `wanted` tokens as they allow: any while there is room, then one that fills it."""
    longest = by_size[-1][0]
    picked: list[str] = []
    room = wanted
    while not picked or room >= by_size[0][0]:
        candidates = by_size if room > 2 * longest else _nearest(by_size, room)
        size, text = draw.choice(candidates)
        picked.append(text)
        room -= size
    return " ".join(picked)


def _nearest(by_size: Sequence[tuple[int, str]], room: float) -> Sequence[tuple[int, str]]:
    """Those within SLACK_TOKENS of the size nearest to `room`."""
    nearest = min((size for size, _ in by_size), key=lambda size: abs(size - room))
    first = bisect_left(by_size, nearest - SLACK_TOKENS, key=lambda one: one[0])
    last = bisect_right(by_size, nearest + SLACK_TOKENS, key=lambda one: one[0])
    return by_size[first:last]
