"""Every limit of what a job may hold: what is just within goes, one more does not."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import orjson
import pytest

from embedq.producer import (
    ConfigurationError,
    Embeddings,
    EmbedOptions,
    EmbedqError,
    EmbedQueue,
    InvalidJobIdError,
    InvalidOptionError,
    InvalidTextError,
    JobFailedError,
    WireError,
    outcomes,
    wire,
)
from embedq.producer.client import MAX_QUEUE_CHARS, check_queue_name
from embedq.producer.options import (
    MAX_CHUNK_OVERLAP,
    MAX_DIMENSIONS,
    MAX_JOB_CHARS,
    MAX_OPTION_CHARS,
    MAX_TEXT_CHARS,
    MAX_TEXTS_PER_JOB,
    check_job_id,
    check_texts,
)
from embedq.producer.settings import (
    MAX_DEPENDENCIES,
    MAX_DESCRIPTION_CHARS,
    MAX_GROUP_CHARS,
    MAX_RETRIES,
    MAX_TTL_S,
    JobSettings,
)


def request(**kwargs: Any) -> bytes:
    return orjson.dumps([wire.FUNCTION, None, [], {"texts": ["a"], **kwargs}])


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        (["a"] * MAX_TEXTS_PER_JOB, ["a"] * (MAX_TEXTS_PER_JOB + 1)),
        (["a" * MAX_TEXT_CHARS], ["a" * (MAX_TEXT_CHARS + 1)]),
        (["a" * 1_000_000] * (MAX_JOB_CHARS // 1_000_000), ["a" * 1_000_000] * (MAX_JOB_CHARS // 1_000_000) + ["a"]),
        (["\U0001f600" * MAX_TEXT_CHARS], ["\U0001f600" * (MAX_TEXT_CHARS + 1)]),
    ],
    ids=["texts", "characters of a text", "characters of a job", "characters beyond ASCII"],
)
def test_texts_on_both_sides_of_the_wire(within: list[str], beyond: list[str]) -> None:
    assert check_texts(within) == within
    assert wire.decode_request(wire.encode_request(within, EmbedOptions())).texts == within
    with pytest.raises(InvalidTextError):
        check_texts(beyond)
    with pytest.raises(WireError):
        wire.decode_request(request(texts=beyond))


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        ({"prompt": "p" * MAX_OPTION_CHARS}, {"prompt": "p" * (MAX_OPTION_CHARS + 1)}),
        ({"prompt_name": "p" * MAX_OPTION_CHARS}, {"prompt_name": "p" * (MAX_OPTION_CHARS + 1)}),
        ({"model": "m" * MAX_OPTION_CHARS}, {"model": "m" * (MAX_OPTION_CHARS + 1)}),
        ({"dimensions": MAX_DIMENSIONS}, {"dimensions": MAX_DIMENSIONS + 1}),
        ({"dimensions": 1}, {"dimensions": 0}),
        (
            {"chunk": True, "chunk_overlap": MAX_CHUNK_OVERLAP},
            {"chunk": True, "chunk_overlap": MAX_CHUNK_OVERLAP + 1},
        ),
        ({"version": wire.VERSION}, {"version": wire.VERSION + 1}),
        ({}, {"an_option_of_tomorrow": None}),
        ({}, {"result_ttl": 5}),
        ({}, {"": 1}),
    ],
)
def test_options_on_both_sides_of_the_wire(within: dict[str, Any], beyond: dict[str, Any]) -> None:
    assert wire.decode_request(request(**within)).texts == ["a"]
    with pytest.raises(WireError):
        wire.decode_request(request(**beyond))
    if "version" not in beyond:
        EmbedOptions(**within)
        with pytest.raises((InvalidOptionError, TypeError)):
            EmbedOptions(**beyond)


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        ({"retries": MAX_RETRIES}, {"retries": MAX_RETRIES + 1}),
        ({"result_ttl": MAX_TTL_S}, {"result_ttl": MAX_TTL_S + 1}),
        ({"failure_ttl": -1}, {"failure_ttl": -2}),
        ({"ttl": 1}, {"ttl": 0}),
        ({"description": "d" * MAX_DESCRIPTION_CHARS}, {"description": "d" * (MAX_DESCRIPTION_CHARS + 1)}),
        ({"group": "g" * MAX_GROUP_CHARS}, {"group": "g" * (MAX_GROUP_CHARS + 1)}),
        ({"retry_intervals": [1] * MAX_RETRIES}, {"retry_intervals": [1] * (MAX_RETRIES + 1)}),
        (
            {"depends_on": [str(n) for n in range(MAX_DEPENDENCIES)]},
            {"depends_on": [str(n) for n in range(MAX_DEPENDENCIES + 1)]},
        ),
    ],
)
def test_settings_of_a_job(within: dict[str, Any], beyond: dict[str, Any]) -> None:
    JobSettings(**within)
    with pytest.raises(InvalidOptionError):
        JobSettings(**beyond)


def test_names() -> None:
    check_job_id("j" * 256)
    for bad in ("j" * 257, "", "a:b", "a\n", "\u00e4", "a b", b"bytes"):
        with pytest.raises(InvalidJobIdError):
            check_job_id(bad)
    check_queue_name("q" * MAX_QUEUE_CHARS)
    for bad in ("q" * (MAX_QUEUE_CHARS + 1), "", "\ud800", 7):
        with pytest.raises(ConfigurationError):
            check_queue_name(bad)


def test_what_a_request_inflates_to_and_how_many_values_it_holds() -> None:
    tail = b'{"texts":["a"]}]'
    head = b'["%s",null,[],' % wire.FUNCTION.encode()
    blanks = wire.MAX_REQUEST_BYTES - len(head + tail)
    too_many = f"has {wire.MAX_REQUEST_BYTES:,} characters; at most"
    with pytest.raises(WireError, match=too_many):  # within what is inflated, but not within what is parsed
        wire.decode_request(zlib.compress(head + b" " * blanks + tail))
    with pytest.raises(WireError, match="inflates to more than"):
        wire.decode_request(zlib.compress(head + b" " * (blanks + 1) + tail))
    with pytest.raises(WireError, match=f"has {wire.MAX_REQUEST_BYTES + 1:,} bytes; at most"):
        wire.decode_request(head + b" " * (blanks + 1) + tail)
    filler = ["a" * wire.COUNT_FROM_BYTES]
    # Four values of the call, and the names and values of the keywords.
    with pytest.raises(WireError, match="2,048 values"):
        wire.decode_request(request(texts=filler, dimensions=[[]] * 1022))
    with pytest.raises(WireError, match="texts in one job"):
        wire.decode_request(request(texts=filler + ["a"] * 1024))


def test_a_large_text_full_of_commas_and_brackets_is_one_value() -> None:
    text = '[{,"\\' * 160_000 + "\U0001f600"
    assert wire.decode_request(wire.encode_request([text, text], EmbedOptions())).texts == [text, text]


def test_a_reason_that_inflates_is_refused() -> None:
    within = base64.b64encode(zlib.compress(b"x" * wire.MAX_REASON_BYTES))
    assert isinstance(wire.decode_exc_string(within), JobFailedError)
    with pytest.raises(WireError, match="inflates to more than"):
        wire.decode_exc_string(base64.b64encode(zlib.compress(b"x" * (wire.MAX_REASON_BYTES + 1))))
    with pytest.raises(WireError, match="at most"):
        wire.decode_exc_string(base64.b64encode(b"x" * (wire.MAX_REASON_BYTES + 1)))


def test_a_result_of_too_many_bytes_is_refused_before_it_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.zeros((1, 4), np.float32)
    blob = wire.encode_result(Embeddings(vectors=vectors, num_tokens=(3,), truncated=(False,), model="m"))
    for name, limit in (("MAX_RESULT_BYTES", len(blob)), ("MAX_HEADER_BYTES", int.from_bytes(blob[:8], "little"))):
        monkeypatch.setattr(wire, name, limit)
        assert len(wire.decode_result(blob)) == 1
        monkeypatch.setattr(wire, name, limit - 1)
        with pytest.raises(WireError, match="too large"):
            wire.decode_result(blob)
        entry = {b"type": b"1", b"return_value": base64.b64encode(blob)}
        assert isinstance(outcomes.entry_outcome("id", entry), WireError)
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_tokens", "[-3]"),
        ("num_tokens", '["3"]'),
        ("num_tokens", "[3.5]"),
        ("num_tokens", '{"3":1}'),
        ("truncated", "[1]"),
        ("truncated", "[null]"),
        ("timings", '["a",0,0,0,0,0]'),
        ("timings", "[0,0,0,0,0]"),
        ("output", "words"),
    ],
)
def test_a_results_fields_are_what_they_are_said_to_be(name: str, value: str) -> None:
    from safetensors.numpy import save

    good = {"num_tokens": "[3]", "truncated": "[false]", "timings": "[0,0,0,0,0,0]", "model": "m"}
    good |= {"revision": "", "worker": "", "version": "1"}
    tensors = {"embeddings": np.zeros((1, 4), np.float32)}
    assert len(wire.decode_result(save(tensors, good))) == 1
    with pytest.raises(WireError):
        wire.decode_result(save(tensors, good | {name: value}))
    with pytest.raises(WireError, match="of no type of ours"):
        wire.decode_result(save({"embeddings": np.zeros((1, 4), np.float64)}, good))


def test_a_client_is_told_of_a_hostile_result_and_goes_on(queue: EmbedQueue) -> None:
    job = queue.enqueue("a")
    queue._redis.hset(f"rq:job:{job.id}", "status", "finished")
    for value in (b"", b"x", base64.b64encode(b"\xff" * 8 + b"{}"), b"A" * 100_001):
        queue._redis.xadd(f"rq:results:{job.id}", {"type": 1, "return_value": value})
        with pytest.raises(EmbedqError):
            job.result(timeout=0)
