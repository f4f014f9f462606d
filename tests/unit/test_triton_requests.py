from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge import wire
from trtforge.errors import RequestError
from trtforge.runtime.request import GenerationRequest, SamplingParams
from trtforge.runtime.triton_requests import ModelLimits, ResponseOptions, parse_request

LIMITS = ModelLimits(vocab_size=1000, max_model_len=2048)
DTYPES = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
TENSOR_DTYPES = {spec.name: DTYPES[spec.data_type] for spec in wire.REQUEST_TENSORS}
HUGE = 10**400


def encode_chat(messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    return tuple(len(message["role"]) for message in messages)


def tensors(**values: Any) -> dict[str, npt.NDArray[Any]]:
    """Input tensors as Triton gives them; text_input is "Hi" unless another prompt is given."""
    if not {"text_input", "input_ids", "messages"} & set(values):
        values["text_input"] = "Hi"
    arrays = {}
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        arrays[name] = np.array(items, dtype=TENSOR_DTYPES[name])
    return arrays


def parse(**values: Any) -> tuple[GenerationRequest, ResponseOptions]:
    return parse_request("7", tensors(**values), LIMITS, encode_chat)


def sampling(**values: Any) -> SamplingParams:
    return parse(**values)[0].sampling


def from_json(**parameters: Any) -> SamplingParams:
    return sampling(sampling_parameters=json.dumps(parameters))


def test_defaults() -> None:
    request, options = parse(text_input="Hi")
    assert request == GenerationRequest("7", "Hi", SamplingParams(max_tokens=16, temperature=0.0))
    assert options == ResponseOptions(
        stream=False, prefix="Hi", finish_reason=False, num_input_tokens=False, num_output_tokens=False
    )


def test_all_tensors() -> None:
    request, options = parse(
        text_input="a\x00b 早",
        max_tokens=2048,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        seed=2**64 - 1,
        stop_words=["\n\n", "早"],
        end_id=999,
        stream=True,
        return_finish_reason=True,
        return_num_output_tokens=True,
    )
    assert request.prompt == "a\x00b 早"
    assert request.sampling == SamplingParams(
        max_tokens=2048,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        seed=2**64 - 1,
        stop=("\n\n", "早"),
        stop_token_ids=(999,),
    )
    assert options == ResponseOptions(
        stream=True, prefix="", finish_reason=True, num_input_tokens=False, num_output_tokens=True
    )


def test_json_says_the_same_as_tensors() -> None:
    as_tensors = sampling(max_tokens=5, temperature=0.7, top_k=-1, top_p=0.9, min_p=0.1, random_seed=3)
    parameters = {"max_tokens": 5, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.1, "seed": 3}
    assert from_json(**parameters) == as_tensors
    # genai-perf sends numbers as strings.
    assert from_json(**{key: str(value) for key, value in parameters.items()}) == as_tensors
    assert from_json(stop="END", stop_token_ids=[3, 4], ignore_eos=True) == SamplingParams(
        stop=("END",), stop_token_ids=(3, 4), ignore_eos=True
    )


def test_the_same_value_twice() -> None:
    both = sampling(
        temperature=0.7,
        top_k=-1,
        seed=5,
        random_seed=5,
        stop_words=["x"],
        sampling_parameters='{"temperature": "0.7", "top_k": 0, "seed": "5", "stop": "x"}',
    )
    assert both == SamplingParams(temperature=float(np.float32(0.7)), seed=5, stop=("x",))


@pytest.mark.parametrize("empty", ["", ["", ""], []])
def test_empty_stop_strings_stand_for_none(empty: object) -> None:
    # Clients of the TensorRT-LLM convention send them always.
    assert sampling(stop_words=empty).stop == ()


def test_prompts() -> None:
    assert parse(input_ids=[3, 0, 999])[0].prompt == (3, 0, 999)
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    assert parse(messages=json.dumps(chat))[0].prompt == (6, 4)


@pytest.mark.parametrize(
    ("values", "prefix"),
    [
        ({"text_input": "Hi"}, "Hi"),
        ({"text_input": "Hi", "exclude_input_in_output": True}, ""),
        ({"text_input": "Hi", "exclude_input_in_output": False}, "Hi"),
        ({"text_input": "Hi", "stream": True}, ""),
        ({"input_ids": [1]}, ""),
        ({"messages": '[{"role": "user", "content": "Hi"}]', "exclude_input_in_output": False}, ""),
    ],
)
def test_prompt_in_front_of_the_answer(values: dict[str, Any], prefix: str) -> None:
    assert parse(**values)[1].prefix == prefix


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
        ("beam_width", np.array([2], np.int32)),
    ],
)
def test_wrong_types_shapes_and_names(name: str, array: npt.NDArray[Any]) -> None:
    with pytest.raises(RequestError, match=name):
        parse_request("7", {**tensors(), name: array}, LIMITS, encode_chat)


def test_http_keys_that_are_no_tensors() -> None:
    assert parse_request("7", tensors(), LIMITS, encode_chat, ["id"])
    with pytest.raises(RequestError, match="'temprature' is unknown: allowed are text_input"):
        parse_request("7", tensors(), LIMITS, encode_chat, ["id", "temprature"])


def test_no_prompt() -> None:
    with pytest.raises(RequestError, match="exactly one of text_input, input_ids, messages"):
        parse_request("7", {}, LIMITS, encode_chat)


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
    ({"stop_token_ids": list(range(257))}, ("stop_token_ids is 257 token ids", "at most 256")),
    ({"ignore_eos": 1}, ("ignore_eos is 1", "true or false")),
    ({"beam_width": 2}, ("unknown key 'beam_width'", "max_tokens, temperature")),
]


@pytest.mark.parametrize(("parameters", "mentioned"), BAD_JSON)
def test_bad_sampling_parameters(parameters: dict[str, Any], mentioned: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as error:
        from_json(**parameters)
    assert [part for part in ("sampling_parameters", *mentioned) if part not in str(error.value)] == []
    assert len(str(error.value)) < 300


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
    ["max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos"]
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
