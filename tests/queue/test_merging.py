"""What the supervisor makes of its processes' metrics and lines."""

from __future__ import annotations

import io
from collections.abc import Callable

import orjson
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_metrics

from embedq.worker.supervision.merging import EOF, merge_metrics
from embedq.worker.supervision.relay import MAX_LINE_BYTES, LineRelay, labelled


def registry(value: float) -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("jobs", "Jobs.", ["queue"], registry=made).labels('a "b" {c}\n # d\x85').inc(value)
    Gauge("bare_seconds", "Without labels.", registry=made).set(value / 3)
    Histogram("took_seconds", "Took.", buckets=[1], registry=made).observe(value, {"trace": "1"})
    return made


@pytest.mark.parametrize(("write", "read"), [(generate_latest, read_metrics), (generate_openmetrics, read_openmetrics)])
def test_each_sample_of_each_process_is_there_with_its_value(
    write: Callable[[CollectorRegistry], bytes], read: Callable[[str], object]
) -> None:
    pages = {index: write(registry(index + 1)).decode() for index in (0, 1, 11)}
    own = "# HELP own Own.\n# TYPE own gauge\nown 3\n"
    ends = f"{EOF}\n" if write is generate_openmetrics else ""
    merged = list(read(merge_metrics(pages, own) + ends))  # type: ignore[call-overload]
    assert len({family.name for family in merged}) == len(merged)
    expected = {
        (sample.name, *sorted({**sample.labels, "process": str(index)}.items()), sample.value)
        for index, page in pages.items()
        for family in read(page)  # type: ignore[attr-defined]
        for sample in family.samples
    }
    found = {(s.name, *sorted(s.labels.items()), s.value) for family in merged for s in family.samples}
    assert found == expected | {("own", 3.0)}


def test_what_is_no_metric_is_left_out() -> None:
    page = "# a remark\n\n<html>\nx{} 1\n"
    assert merge_metrics({0: page}) == ""
    assert merge_metrics({0: f"# TYPE x gauge\n{page}{EOF}\n"}) == '# TYPE x gauge\nx{process="0"} 1\n'


# --- lines


def relayed(written: bytes, label: Callable[[bytes], bytes]) -> tuple[list[bytes], LineRelay]:
    passed_on: list[bytes] = []
    relay = LineRelay(io.BytesIO(written), label, passed_on.append)
    relay.drain()
    return passed_on, relay


def test_lines_for_people_get_the_number_before_them() -> None:
    passed_on, relay = relayed("first\n\nzweite Zeile: ä\n\n".encode(), labelled("text", 3))
    assert passed_on == [b"[3] first\n", b"[3] \n", "[3] zweite Zeile: ä\n".encode(), b"[3] \n"]
    assert relay.last_line() == "zweite Zeile: ä"


def test_lines_for_programs_get_a_field_and_stay_as_they_are() -> None:
    line = b'{"time":"now","message":"a \\"b\\" {c}"}'
    passed_on, _ = relayed(line + b"\nTraceback: \x1b[31m\xff\n{}\n", labelled("json", 12))
    assert passed_on[0] == b'{"process":12,' + line[1:] + b"\n"
    wrapped = orjson.loads(passed_on[1])
    assert (wrapped["process"], wrapped["logger"]) == (12, "output")
    assert wrapped["message"].startswith("Traceback: ")
    assert "\x1b" not in wrapped["message"]
    assert orjson.loads(passed_on[2])["message"] == "{}"


def test_a_line_without_end_comes_in_pieces_and_one_without_a_newline_at_all() -> None:
    passed_on, relay = relayed(b"x" * (MAX_LINE_BYTES + 1), labelled("text", 0))
    assert [len(line) for line in passed_on] == [MAX_LINE_BYTES + 5, 6]
    assert relay.last_line() == "x"


def test_a_reader_that_has_gone_does_not_stop_the_child() -> None:
    def refuse(_line: bytes) -> None:
        raise BrokenPipeError

    relay = LineRelay(io.BytesIO(b"a\nb\n"), labelled("text", 0), refuse)
    assert relay.last_line() == "b"
