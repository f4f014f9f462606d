"""Requests that are refused, with the name, the value and what is allowed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_requests.tensors import LIMITS, TOKENIZER, from_json, parse, sampling, tensors

from trtforge.errors import RequestError
from trtforge.runtime.triton.requests import parse_request

HUGE = 10**400
# Tensors that are refused, and what the error has to mention: the name, the value, what is allowed.
BAD_TENSORS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"text_input": ""}, ("text_input is empty",)),
    ({"text_input": b"ab\xff"}, ("text_input", "UTF-8", "byte 2")),
    ({"text_input": "a", "input_ids": [1]}, ("exactly one of", "text_input and input_ids")),
    ({"text_input": ["a", "b"]}, ("text_input", "[2]", "[1]")),
    ({"input_ids": []}, ("input_ids is empty",)),
    ({"input_ids": [1, -1]}, ("input_ids", "-1", "0 to 999")),
    ({"input_ids": [1000, 1]}, ("input_ids", "1000", "0 to 999")),
    ({"max_tokens": 0}, ("max_tokens is 0", "1 to 2048")),
    ({"max_tokens": -(2**31)}, ("max_tokens is -2147483648", "1 to 2048")),
    ({"max_tokens": 2049}, ("max_tokens is 2049", "1 to 2048")),
    ({"max_tokens": [1, 2]}, ("max_tokens", "[2]", "[1]")),
    ({"max_tokens": []}, ("max_tokens", "[0]", "[1]")),
    ({"temperature": np.nan}, ("temperature is nan", "0 (greedy) to 100")),
    ({"temperature": np.inf}, ("temperature is inf", "0 (greedy) to 100")),
    ({"temperature": -0.5}, ("temperature is -0.5", "0 (greedy) to 100")),
    ({"temperature": 3e38}, ("temperature is", "0 (greedy) to 100")),
    ({"top_k": -2}, ("top_k is -2", "-1 to")),
    ({"top_p": 0.0}, ("top_p is 0.0", "above 0 and at most 1")),
    ({"top_p": 1.5}, ("top_p is 1.5", "above 0 and at most 1")),
    ({"top_p": np.nan}, ("top_p is nan", "above 0 and at most 1")),
    ({"min_p": -0.25}, ("min_p is -0.25", "0 to 1")),
    ({"end_id": 1000}, ("end_id is 1000", "0 to 999")),
    ({"end_id": -1}, ("end_id is -1", "0 to 999")),
    ({"seed": 1, "random_seed": 2}, ("seed is 1", "random_seed is 2")),
    ({"stop_words": ["ok", b"\xff"]}, ("stop_words", "UTF-8")),
    ({"stop_words": ["x"] * 33}, ("stop_words", "33", "at most 32")),
    ({"stop_words": "x" * 1001}, ("stop_words", "1001", "at most 1000")),
    ({"min_tokens": -1}, ("min_tokens is -1", "0 to 2048")),
    ({"min_tokens": 5, "max_tokens": 4}, ("min_tokens is 5", "at most max_tokens, 4")),
    ({"min_length": 17}, ("min_length is 17", "at most max_tokens, 16")),
    ({"min_tokens": 3, "min_length": 4}, ("min_tokens is 3", "min_length is 4")),
    ({"typical_p": 0.0}, ("typical_p is 0.0", "above 0 and at most 1")),
    ({"repetition_penalty": 0.0}, ("repetition_penalty is 0.0", "0.01 to 100")),
    ({"repetition_penalty": np.inf}, ("repetition_penalty is inf", "0.01 to 100")),
    ({"presence_penalty": 2.5}, ("presence_penalty is 2.5", "-2 to 2")),
    ({"frequency_penalty": np.nan}, ("frequency_penalty is nan", "-2 to 2")),
    ({"no_repeat_ngram_size": -1}, ("no_repeat_ngram_size is -1", "0 to 2048")),
    ({"bad_words": ["x"] * 65}, ("bad_words", "65", "at most 64")),
    ({"embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]}, ("weights is 1 numbers", "2")),
    ({"embedding_bias_weights": [1.0]}, ("embedding_bias_weights is 1 numbers", "0")),
    (
        {"embedding_bias_words": "a", "embedding_bias_weights": [np.inf]},
        ("embedding_bias_weights is inf", "-100 to 100"),
    ),
    ({"num_return_sequences": 0}, ("num_return_sequences is 0", "1 to 64")),
    ({"num_return_sequences": 65}, ("num_return_sequences is 65", "1 to 64")),
    ({"beam_width": 17}, ("beam_width is 17", "1 to 16")),
    ({"length_penalty": -11.0}, ("length_penalty is -11.0", "-10 to 10")),
    ({"guided_decoding_guide": "x"}, ("guided_decoding_guide_type", "json_schema, regex")),
    ({"guided_decoding_guide_type": "xml"}, ("guided_decoding_guide_type is 'xml'", "regex")),
    ({"guided_decoding_guide_type": "regex"}, ("guided_decoding_guide is empty", "regex")),
    (
        {"guided_decoding_guide_type": "json", "guided_decoding_guide": "{}"},
        ("guided_decoding_guide is '{}'", "json_schema"),
    ),
    (
        {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "[3]"},
        ("guided_decoding_guide is '[3]'", "JSON schema"),
    ),
    (
        {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"},
        ("guided_decoding_guide is not valid JSON",),
    ),
    (
        {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "x" * 65_537},
        ("guided_decoding_guide is 65537 bytes", "at most 65536"),
    ),
    (
        {"guided_decoding_guide_type": "choice", "guided_decoding_guide": "[]"},
        ("0 choices", "1 to 1024"),
    ),
    (
        {"guided_decoding_guide_type": "choice", "guided_decoding_guide": '["a", 1]'},
        ("a list with 1", "strings"),
    ),
    ({"timeout_ms": -1}, ("timeout_ms is -1", "1 to")),
    ({"cache_salt": "x" * 257}, ("cache_salt is 257 characters", "at most 256")),
    ({"stream": True, "exclude_input_in_output": False}, ("exclude_input_in_output", "stream")),
    ({"temperature": 0.5, "sampling_parameters": '{"temperature": 0.6}'}, ("temperature is 0.5", "0.6")),
    ({"end_id": 3, "sampling_parameters": '{"stop_token_ids": [4]}'}, ("end_id is (3,)", "(4,)")),
]


@pytest.mark.parametrize(("values", "mentioned"), BAD_TENSORS)
def test_bad_tensors(values: dict[str, Any], mentioned: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as error:
        parse(**values)
    assert [part for part in mentioned if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("max_tokens", np.array([5], np.int64)),
        ("max_tokens", np.array([5.0], np.float32)),
        ("text_input", np.array(["a"])),
        ("stream", np.array([1], np.int32)),
        ("input_ids", np.array([[1, 2]], np.int32)),
        ("seed", np.array(5, np.uint64)),
        ("best_of", np.array([2], np.int32)),
    ],
)
def test_wrong_types_shapes_and_names(name: str, array: npt.NDArray[Any]) -> None:
    with pytest.raises(RequestError, match=name):
        parse_request("7", {**tensors(), name: array}, LIMITS, TOKENIZER)


def test_http_keys_that_are_no_tensors() -> None:
    assert parse_request("7", tensors(), LIMITS, TOKENIZER, ["id"])
    with pytest.raises(RequestError, match="'temprature' is unknown: allowed are text_input"):
        parse_request("7", tensors(), LIMITS, TOKENIZER, ["id", "temprature"])


def test_no_prompt() -> None:
    with pytest.raises(RequestError, match="exactly one of text_input, input_ids, messages"):
        parse_request("7", {}, LIMITS, TOKENIZER)


BAD_JSON: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"max_tokens": HUGE}, ("max_tokens", "1 to 2048")),
    ({"max_tokens": "1e3"}, ("max_tokens is '1e3'", "1 to 2048")),
    ({"max_tokens": 5.0}, ("max_tokens is 5.0", "whole number")),
    ({"max_tokens": True}, ("max_tokens is True", "whole number")),
    ({"max_tokens": "1" * 5000}, ("max_tokens", "1 to 2048")),
    ({"temperature": HUGE}, ("temperature", "100")),
    ({"temperature": float("nan")}, ("temperature is nan", "100")),
    ({"temperature": "Infinity"}, ("temperature is 'Infinity'", "100")),
    ({"temperature": "1_0"}, ("temperature is '1_0'", "100")),
    ({"temperature": None}, ("temperature is None", "100")),
    ({"top_p": 1e-60}, ("top_p is 1e-60", "above 0")),
    ({"min_p": 1 + 1e-9}, ("min_p", "0 to 1")),
    ({"seed": -1}, ("seed is -1", "0 to 18446744073709551615")),
    ({"seed": 2**64}, ("seed is 18446744073709551616", "0 to 18446744073709551615")),
    ({"stop": ["a", 3]}, ("stop is 3", "text")),
    ({"stop": {"a": 1}}, ("stop", "text")),
    ({"stop_token_ids": [1, 1000]}, ("stop_token_ids is 1000", "0 to 999")),
    ({"stop_token_ids": list(range(65))}, ("stop_token_ids is 65 token ids", "at most 64")),
    ({"ignore_eos": 1}, ("ignore_eos is 1", "true or false")),
    ({"stop_words": "x"}, ("unknown key 'stop_words'", "max_tokens, min_tokens", "structured_outputs")),
    ({"best_of": 2}, ("best_of is given", "n")),
    ({"logit_bias": [1]}, ("logit_bias", "JSON object")),
    ({"logit_bias": {"1000": 1}}, ("logit_bias is '1000'", "0 to 999")),
    ({"logit_bias": {"x": 1}}, ("logit_bias is 'x'", "0 to 999")),
    ({"logit_bias": {"1": 101}}, ("logit_bias[1] is 101", "-100 to 100")),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, ("1025 biases", "at most 1024")),
    ({"logprobs": 21}, ("logprobs is 21", "0 to 20")),
    ({"prompt_logprobs": -1}, ("prompt_logprobs is -1", "0 to 20")),
    ({"guided_decoding": {}}, ("guided_decoding", "exactly one of json, json_object")),
    ({"guided_decoding": {"regex": "a", "json": {}}}, ("guided_decoding", "exactly one of")),
    ({"guided_decoding": "json"}, ("guided_decoding", "exactly one of")),
    ({"guided_decoding": {"json_object": False}}, ("guided_decoding.json_object is false", "true")),
    ({"structured_outputs": {"regex": 3}}, ("structured_outputs.regex is 3", "text")),
    ({"structured_outputs": {"json": 3}}, ("structured_outputs.json is '3'", "JSON schema")),
]


@pytest.mark.parametrize(("parameters", "mentioned"), BAD_JSON)
def test_bad_sampling_parameters(parameters: dict[str, Any], mentioned: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as error:
        from_json(**parameters)
    assert [part for part in ("sampling_parameters", *mentioned) if part not in str(error.value)] == []
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"seed": 1, "seed": 2}',
        "[" * 100_000,
        '{"seed": ' + "1" * 5000 + "}",
        '{"stop": "\\ud800"}',
        b"\xff{}",
    ],
)
def test_sampling_parameters_that_are_no_json_object(text: str | bytes) -> None:
    with pytest.raises(RequestError, match="sampling_parameters") as error:
        sampling(sampling_parameters=text)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("messages", "mentioned"),
    [
        ([], "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (["x"], r"messages\[0\]"),
        ([{"role": "user"}], r"messages\[0\].*role.*content"),
        ([{"role": "user", "content": "x", "name": "y"}], r"messages\[0\].*name"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role is 'robot'.*system, user"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user", "content": None}], r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content is list.*string"),
        ([{"role": "user", "content": "\udc00"}], "messages"),
    ],
)
def test_bad_messages(messages: object, mentioned: str) -> None:
    with pytest.raises(RequestError, match=mentioned):
        parse(messages=json.dumps(messages))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

json_keys = st.sampled_from(
    [
        *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop"),
        *("stop_token_ids", "ignore_eos", "n", "repetition_penalty", "logit_bias", "bad_words", "logprobs"),
        *("guided_decoding", "presence_penalty", "beam_width"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(parameters=st.dictionaries(json_keys, anything, max_size=2))
def test_any_json_is_understood_or_refused(parameters: dict[str, Any]) -> None:
    try:
        params = from_json(**parameters)
    except RequestError:
        return
    assert 1 <= params.max_tokens <= LIMITS.max_model_len
    assert 0 <= params.temperature <= 100
    assert params.top_k >= 0
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p <= 1
    assert params.seed is None or 0 <= params.seed < 2**64
    assert all(params.stop)
    assert all(0 <= token_id < LIMITS.vocab_size for token_id in params.stop_token_ids)
    assert type(params.ignore_eos) is bool
    assert 0 <= params.min_tokens <= params.max_tokens
    assert 1 <= params.n <= 64
    assert 0.01 <= params.repetition_penalty + 1e-6 <= 100.1
    assert all(0 <= i < LIMITS.vocab_size and -100 <= bias <= 100 for i, bias in params.logit_bias)
    assert all(params.bad_words)
