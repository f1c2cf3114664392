"""Options and texts: what is refused before anything reaches Redis, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from embedq.producer import EmbedOptions, InvalidJobIdError, InvalidOptionError, InvalidTextError
from embedq.producer.options import (
    MAX_JOB_CHARS,
    MAX_TEXT_CHARS,
    MAX_TEXTS_PER_JOB,
    check_job_id,
    check_texts,
)
from embedq.producer.settings import JobSettings, split_keywords


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 3}, "unknown option 'dimension'; did you mean dimensions\\?"),
        ({"xyzzy": 1}, "unknown option 'xyzzy'; known are prompt, "),
        ({"dimensions": 0}, "dimensions must be a whole number from 1 to 1000000, not '0'"),
        ({"dimensions": True}, "dimensions must be a whole number"),
        ({"dimensions": 2.5}, "dimensions must be a whole number"),
        ({"dimensions": 10**30}, "dimensions must be a whole number"),
        ({"dimensions": 10**5000}, "dimensions must be a whole number from 1 to 1000000, not a huge int"),
        ({"prompt": "half \ud83d"}, "prompt is not Unicode"),
        ({"model": "\ud83d"}, "model is not Unicode"),
        ({"precision": "float64"}, "precision must be one of float32, float16, int8, uint8, binary, ubinary"),
        ({"truncation_side": "middle"}, "truncation_side must be one of right, left"),
        ({"truncate": 1}, "truncate must be true or false"),
        ({"normalize": "yes"}, "normalize must be true or false"),
        ({"prompt": 3}, "prompt must be a string"),
        ({"prompt": "a: ", "prompt_name": "query"}, "prompt and prompt_name exclude each other"),
        ({"prompt": "x" * 10_001}, "prompt has 10,001 characters"),
        ({"output": "words"}, "output must be one of sentence, tokens, not 'words'"),
        ({"chunk": 1}, "chunk must be true or false"),
        ({"chunk": True, "chunk_overlap": -1}, "chunk_overlap must be a whole number from 0 to 1000000"),
        ({"chunk": True, "chunk_overlap": True}, "chunk_overlap must be a whole number"),
        ({"chunk_overlap": 3}, "chunk_overlap needs chunk"),
        ({"output": "tokens", "chunk": True}, "output tokens and chunk exclude each other"),
        ({"output": "tokens", "precision": "int8"}, "precision must be one of float32, float16 for output tokens"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message) as caught:
        EmbedOptions.from_mapping(options)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "settings",
    [
        *({"retries": -1}, {"result_ttl": -2}, {"failure_ttl": 1.5}, {"ttl": 0}, {"result_ttl": True}),
        *({"result_ttl": 10**18}, {"ttl": 10**18}, {"retries": 10**30}, {"failure_ttl": 10**5000}),
        *({"at_front": "no"}, {"description": [1]}, {"description": "\ud83d"}, {"description": "x" * 1001}),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError, match=next(iter(settings))):
        JobSettings(**settings)


def test_keywords_are_sorted_into_options_and_settings() -> None:
    options, settings = split_keywords({"dimensions": 5, "result_ttl": 7, "at_front": True})
    assert options == EmbedOptions(dimensions=5)
    assert settings == JobSettings(result_ttl=7, at_front=True)


def test_only_what_differs_from_the_defaults_goes_over_the_wire() -> None:
    assert EmbedOptions().to_mapping() == {}
    assert EmbedOptions(output="tokens", chunk_overlap=None).to_mapping() == {"output": "tokens"}
    assert EmbedOptions(normalize=False, precision="binary").to_mapping() == {"normalize": False, "precision": "binary"}


@pytest.mark.parametrize(
    ("texts", "index", "message"),
    [
        ([], None, "the list of texts is empty"),
        (["a", 3], 1, "text 1 is int, not a string"),
        ([None], 0, "text 0 is NoneType, not a string"),
        (b"bytes", None, "texts must be a string or a list of strings, not bytes"),
        ({"a": 1}, None, "texts must be a string or a list of strings, not dict"),
        ({"a"}, None, "texts must be a string or a list of strings, not set"),
        (17, None, "texts must be a string or a list of strings, not int"),
        (["a"] * (MAX_TEXTS_PER_JOB + 1), None, "1,025 texts in one job; at most 1,024 go"),
        (["ok", "x" * (MAX_TEXT_CHARS + 1)], 1, "text 1 has 1,000,001 characters"),
        (["x" * MAX_TEXT_CHARS] * (MAX_JOB_CHARS // MAX_TEXT_CHARS + 1), None, "17,000,000 characters"),
        (["a", "half \ud83d"], 1, "text 1 has a lone surrogate at 5"),
    ],
)
def test_texts_that_cannot_be_a_job_are_refused_by_index(texts: Any, index: int | None, message: str) -> None:
    with pytest.raises(InvalidTextError, match=message) as caught:
        check_texts(texts)
    assert caught.value.text_index == index


def test_one_string_is_one_text_and_an_iterable_is_read_once() -> None:
    assert check_texts("") == [""]
    assert check_texts(iter(("a", " "))) == ["a", " "]


@pytest.mark.parametrize("job_id", ["", "a b", "a:b", "ü", "x" * 257, 5, None])
def test_a_job_id_that_rq_would_not_take_is_refused(job_id: object) -> None:
    with pytest.raises(InvalidJobIdError, match="letters, digits, underscores and dashes"):
        check_job_id(job_id)
