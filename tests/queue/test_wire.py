"""The wire: what goes in comes out, and foreign bytes are a WireError whatever they are."""

from __future__ import annotations

import base64
import pickle
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rq.job import Job
from rq.serializers import resolve_serializer

from embedq.producer import (
    Embeddings,
    EmbedOptions,
    EmbedSerializer,
    JobFailedError,
    Timings,
    WireError,
    outcomes,
    wire,
)
from embedq.producer.options import check_texts


def make_result(vectors: Any = None) -> Embeddings:
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3) if vectors is None else vectors
    return Embeddings(
        vectors=vectors,
        num_tokens=tuple(range(3, 3 + len(vectors))),
        truncated=(False,) * len(vectors),
        model="noop:3",
        revision="noop",
        worker="w1",
        timings=Timings(queued_s=0.5, batch_texts=2),
    )


@given(st.lists(st.text(max_size=200), min_size=1, max_size=20), st.sampled_from(["float32", "binary"]))
def test_a_request_survives_the_wire(texts: list[str], precision: Any) -> None:
    options = EmbedOptions(dimensions=7, precision=precision, chunk=True, chunk_overlap=5)
    request = wire.decode_request(wire.encode_request(texts, options))
    assert request.texts == texts
    assert request.options == options


def test_small_and_large_requests_are_what_rq_itself_reads() -> None:
    class NoRedis:
        pass

    for texts in (["short"], ["long " * 200]):
        data = wire.encode_request(texts, EmbedOptions())
        job = Job("id", connection=NoRedis(), serializer=EmbedSerializer)  # type: ignore[arg-type]
        job.restore({b"data": data, b"status": b"queued"})
        assert job.func_name == wire.FUNCTION
        assert job.kwargs["texts"] == texts


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
def test_a_result_survives_the_wire_in_every_precision(dtype: str) -> None:
    result = make_result(np.arange(6).reshape(2, 3).astype(dtype))
    back = wire.decode_result(wire.encode_result(result))
    np.testing.assert_array_equal(back.vectors, result.vectors)
    assert back.vectors.dtype == result.vectors.dtype
    assert (back.num_tokens, back.truncated, back.model) == (result.num_tokens, result.truncated, result.model)
    assert back.timings == result.timings


def test_a_result_is_plain_safetensors() -> None:
    from safetensors.numpy import load

    assert load(wire.encode_result(make_result()))["embeddings"].shape == (2, 3)


def test_token_output_survives_under_a_name_of_its_own() -> None:
    from safetensors.numpy import load

    vectors = np.arange(14, dtype=np.float16).reshape(7, 2)
    result = replace(make_result(vectors[:2]), vectors=vectors, output="tokens")
    blob = wire.encode_result(result)
    assert list(load(blob)) == ["token_embeddings"]
    back = wire.decode_result(blob)
    assert [part.tolist() for part in back.tokens] == [vectors[:3].tolist(), vectors[3:].tolist()]
    assert back.to_plain()["vectors"] == [vectors[:3].tolist(), vectors[3:].tolist()]
    both = Embeddings.concatenate([back, back])
    assert (len(both), len(both.tokens), both.output) == (4, 4, "tokens")
    with pytest.raises(WireError, match="at odds with itself"):
        wire.decode_result(wire.encode_result(replace(result, vectors=vectors[:6])))
    with pytest.raises(ValueError, match="one vector a text"):
        _ = make_result().tokens


def test_a_result_says_which_ranges_it_was_made_with() -> None:
    result = replace(make_result(np.zeros((2, 3), np.int8)), calibration="0123456789ab")
    assert wire.decode_result(wire.encode_result(result)).calibration == "0123456789ab"
    assert result.to_plain()["calibration"] == "0123456789ab"
    other = replace(result, calibration="ba9876543210")
    assert Embeddings.concatenate([result, result, other]).calibration == "0123456789ab,ba9876543210"


def test_a_result_of_an_older_worker_is_one_vector_a_text() -> None:
    from safetensors.numpy import load, save

    blob = wire.encode_result(make_result())
    metadata = orjson.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    old = {name: value for name, value in metadata.items() if name not in ("output", "calibration")}
    back = wire.decode_result(save(load(blob), old))
    assert (back.output, back.calibration) == ("sentence", "")
    with pytest.raises(WireError, match="cannot be read"):
        wire.decode_result(save(load(blob), metadata | {"output": "words"}))


def request_bytes(call: Any) -> bytes:
    return zlib.compress(orjson.dumps(call))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the job has no data"),
        (b"\x80\x04nonsense", "not JSON"),
        (zlib.compress(pickle.dumps(("os.getpid", None, (), {}))), "not JSON"),
        (zlib.compress(b"[" * 50)[:-4], "cut short"),
        (request_bytes({"a": 1}), "not an RQ call of four parts"),
        (request_bytes(["os.getpid", None, [], {}]), "asks for 'os.getpid'"),
        (request_bytes([wire.FUNCTION, {"x": 1}, [], {}]), "runs embedq.worker.tasks.embed alone"),
        (request_bytes([wire.FUNCTION, None, ["a"], {}]), "not keywords"),
        (request_bytes([wire.FUNCTION, None, [], {}]), "the list of texts is empty"),
        (request_bytes([wire.FUNCTION, None, [], {"texts": "a", "evil": 1}]), "unknown option 'evil'"),
        (request_bytes([wire.FUNCTION, None, [], {"texts": "a", "version": "2"}]), "version .2.; this worker reads"),
        (request_bytes([wire.FUNCTION, None, [], {"texts": [1]}]), "text 0 is int"),
        (request_bytes([wire.FUNCTION, None, [], {"texts": ["a"], "dimensions": {}}]), "dimensions must be"),
        (zlib.compress(b" " * (wire.MAX_REQUEST_BYTES + 1)), "inflates to more than"),
    ],
)
def test_a_request_that_is_not_ours_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        wire.decode_request(data)


@given(st.binary(max_size=300))
def test_random_bytes_are_a_wire_error_to_every_decoder(noise: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_result):
        with pytest.raises(WireError):
            decode(noise)


@given(st.data())
def test_a_damaged_result_is_a_wire_error_or_a_result(data: st.DataObject) -> None:
    blob = bytearray(wire.encode_result(make_result()))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert len(wire.decode_result(bytes(blob))) == 2
    except WireError as err:
        assert "\n" not in str(err)  # noqa: PT017


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), st.lists, max_leaves=9))
def test_the_serializer_tells_plain_values_from_results(value: Any) -> None:
    blob = EmbedSerializer.dumps(value)
    assert not wire.is_result(blob)
    assert EmbedSerializer.loads(blob) == value


def test_the_serializer_fulfils_rqs_protocol_and_never_reads_pickle() -> None:
    serializer = resolve_serializer("embedq.producer.serializer.EmbedSerializer")
    assert serializer.loads(serializer.dumps(make_result())).model == "noop:3"
    with pytest.raises(WireError, match="neither JSON nor a result"):
        serializer.loads(pickle.dumps([1]))


@pytest.mark.parametrize("text_index", [None, 0, 12])
@pytest.mark.parametrize("retryable", [True, False])
def test_a_failure_survives_rqs_exception_string(text_index: int | None, retryable: bool) -> None:
    failure = JobFailedError("text 3 is\n too [long]", code="too_long", retryable=retryable, text_index=text_index)
    back = wire.decode_exc_string(wire.encode_exc_string(failure))
    assert back.message == "text 3 is too [long]"
    assert (back.code, back.retryable, back.text_index) == ("too_long", retryable, text_index)


def test_a_failure_that_a_stock_worker_wrote_keeps_its_code() -> None:
    try:
        raise JobFailedError("the text is too long", code="text_too_long", text_index=2)
    except JobFailedError as err:
        import traceback

        written = "".join(traceback.format_exception(err))
    back = JobFailedError.parse(written)
    assert (back.message, back.code, back.text_index) == ("the text is too long", "text_too_long", 2)


def test_other_exception_strings_become_failures_too() -> None:
    assert JobFailedError.parse("").code == "exception"
    assert JobFailedError.parse("Traceback\nValueError: no\n").message == "ValueError: no"
    moved = "Moved to FailedJobRegistry, due to AbandonedJobError, at 2026-01-01"
    assert JobFailedError.parse(moved).code == JobFailedError.ABANDONED
    with pytest.raises(WireError, match="not base64"):
        wire.decode_exc_string(b"***")
    assert wire.decode_exc_string(base64.b64encode(b"plain words")).message == "plain words"


def test_failures_can_cross_a_process_boundary() -> None:
    failure = pickle.loads(pickle.dumps(JobFailedError("m", code="c", retryable=True, text_index=4)))
    assert (failure.message, failure.code, failure.retryable, failure.text_index) == ("m", "c", True, 4)


def test_the_longest_text_still_fits_into_a_request() -> None:
    texts = check_texts(["\x01" * 1_000_000] * 16)
    assert wire.decode_request(wire.encode_request(texts, EmbedOptions())).texts == texts


def test_what_is_too_long_for_a_result_or_a_reason_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "MAX_FIELD_BYTES", 1000)
    for fields in ({b"type": b"1", b"return_value": b"A" * 1001}, {b"type": b"2", b"exc_string": b"A" * 2_097_156}):
        found = outcomes.entry_outcome("a", fields)
        assert isinstance(found, WireError)
        assert "too large" in str(found)
