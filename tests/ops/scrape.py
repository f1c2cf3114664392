"""What a process says of itself over HTTP, read as Prometheus reads it. Knows no metric by name."""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

#: Seconds for an answer.
TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    #: 0: nobody answered
    status: int
    body: str


def get(port: int, path: str, timeout_s: float = TIMEOUT_S) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return Answer(response.status, response.read().decode())
    except (OSError, http.client.HTTPException):
        return Answer(0, "")
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float


class Metrics:
    """One scrape, or several added up."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    @classmethod
    def parse(cls, text: str) -> Self:
        families = text_string_to_metric_families(text)
        return cls([Sample(each.name, each.labels, each.value) for family in families for each in family.samples])

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics([*self._samples, *other._samples])

    @property
    def names(self) -> set[str]:
        return {sample.name for sample in self._samples}

    def matching(self, name: str, **labels: str) -> Iterator[Sample]:
        for sample in self._samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample

    def value(self, name: str, **labels: str) -> float:
        """The sum over all samples that have these labels; 0 where there are none."""
        return sum(sample.value for sample in self.matching(name, **labels))
