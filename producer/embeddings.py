"""What a job gives back. Knows numpy arrays only, neither Redis nor bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from embedq.producer.errors import MixedResultsError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a job's time went, in seconds; and how full the largest micro-batch was that served it."""

    queued_s: float = 0.0
    tokenize_s: float = 0.0
    encode_s: float = 0.0
    total_s: float = 0.0
    batch_texts: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """The decoded result of one job, in the order of its texts."""

    #: (n, d) in the asked precision; float32 by default. Of token output (sum of num_tokens, d), text after text:
    #: see `tokens`
    vectors: NDArray[np.generic]
    #: (n,) tokens that the model saw, special tokens included; of a text that was chunked, its own, counted once
    num_tokens: tuple[int, ...]
    #: (n,) whether the text was longer than the model takes
    truncated: tuple[bool, ...]
    #: the model's name; a stand-in says so: `noop:768`
    model: str
    #: which weights
    revision: str = ""
    #: the worker that published the result
    worker: str = ""
    timings: Timings = field(default_factory=Timings)
    #: `sentence`: one vector a text; `tokens`: one a token
    output: str = "sentence"
    #: which ranges int8 and uint8 vectors are steps of: `embedq.model` turns them back into floats with
    #: `dequantize(vectors, shipped_ranges(calibration, d))`, or with the ranges of the worker's calibration file
    calibration: str = ""

    @property
    def tokens(self) -> list[NDArray[np.generic]]:
        """Of token output, a (num_tokens, d) view for each text. Raises ValueError for any other."""
        if self.output != "tokens":
            raise ValueError("this result has one vector a text: ask for output='tokens' to have one a token")
        import numpy as np

        return np.split(self.vectors, np.cumsum(self.num_tokens)[:-1])

    def __len__(self) -> int:
        return len(self.num_tokens)

    def is_like(self, other: Embeddings) -> bool:
        """Whether the vectors of both may stand in one array."""
        return self._source == other._source

    @property
    def _source(self) -> str:
        return f"{self.model} {self.revision} ({self.output}, {self.vectors.shape[1]} x {self.vectors.dtype})"

    def split(self) -> list[Embeddings]:
        """One result a text, all else as in this one."""
        rows = self.tokens if self.output == "tokens" else [self.vectors[i : i + 1] for i in range(len(self))]
        return [
            replace(self, vectors=row, num_tokens=(num_tokens,), truncated=(cut,))
            for row, num_tokens, cut in zip(rows, self.num_tokens, self.truncated, strict=True)
        ]

    @classmethod
    def concatenate(cls, parts: Sequence[Embeddings]) -> Embeddings:
        """Several jobs' results as one, in the given order; times are summed, `total_s` is the longest.

        Raises MixedResultsError where they are of different models, weights, widths or types.
        """
        if len(parts) == 1:
            return parts[0]
        if other := next((part for part in parts if not part.is_like(parts[0])), None):
            raise MixedResultsError(
                f"the texts were embedded by {parts[0]._source} and by {other._source}; vectors of different models"
                " do not go together: name the model, or let the fleet serve one"
            )
        import numpy as np

        times = [part.timings for part in parts]
        return cls(
            vectors=np.concatenate([part.vectors for part in parts]),
            num_tokens=tuple(n for part in parts for n in part.num_tokens),
            truncated=tuple(t for part in parts for t in part.truncated),
            model=parts[0].model,
            revision=parts[0].revision,
            worker=",".join(dict.fromkeys(part.worker for part in parts if part.worker)),
            output=parts[0].output,
            calibration=",".join(dict.fromkeys(part.calibration for part in parts)),
            timings=Timings(
                queued_s=max(t.queued_s for t in times),
                tokenize_s=sum(t.tokenize_s for t in times),
                encode_s=sum(t.encode_s for t in times),
                total_s=max(t.total_s for t in times),
                batch_texts=max(t.batch_texts for t in times),
                batch_tokens=max(t.batch_tokens for t in times),
            ),
        )

    def to_plain(self) -> dict[str, Any]:
        """As JSON takes it, vectors as lists of numbers: one a text, or of token output a list of them a text."""
        return {
            "vectors": self.vectors_by_text(),
            "num_tokens": list(self.num_tokens),
            "truncated": list(self.truncated),
            "model": self.model,
            "revision": self.revision,
            "worker": self.worker,
            "output": self.output,
            "calibration": self.calibration,
            "timings": {name: getattr(self.timings, name) for name in Timings.__dataclass_fields__},
        }

    def vectors_by_text(self) -> list[Any]:
        """Plain numbers, an entry for each text."""
        return [part.tolist() for part in (self.tokens if self.output == "tokens" else self.vectors)]
