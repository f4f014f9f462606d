"""What the tensors and JSON keys of requests mean."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from triton_requests.tensors import LIMITS, TOKENIZER, from_json, parse, sampling, tensors

from trtforge.runtime.request import GenerationRequest, GuidedDecoding, SamplingParams
from trtforge.runtime.triton.requests import ResponseOptions, parse_request


def test_defaults() -> None:
    request, options = parse(text_input="Hi")
    assert request == GenerationRequest("7", "Hi", SamplingParams(max_tokens=16, temperature=0.0))
    assert options == ResponseOptions(stream=False, num_answers=1, prefix="Hi", outputs=frozenset())


def test_all_tensors() -> None:
    request, options = parse(
        text_input="a\x00b 早",
        max_tokens=2048,
        min_length=3,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        typical_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        no_repeat_ngram_size=4,
        bad_words=["bad", "two words"],
        embedding_bias_words=["four", "of all"],
        embedding_bias_weights=[1.5, -100.0],
        seed=2**64 - 1,
        stop_words=["\n\n", "早"],
        end_id=999,
        pad_id=-5,
        num_return_sequences=3,
        length_penalty=-0.5,
        guided_decoding_guide_type="regex",
        guided_decoding_guide="[ab]+",
        priority=-(2**31),
        timeout_ms=1500,
        cache_salt="tenant 7",
        stream=True,
        return_finish_reason=True,
        return_num_output_tokens=True,
        return_log_probs=True,
    )
    sampling = SamplingParams(
        max_tokens=2048,
        min_tokens=3,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        typical_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        no_repeat_ngram_size=4,
        # Every token of a word in both of its forms.
        logit_bias=((2, -100.0), (4, 1.5), (102, -100.0), (103, -100.0), (104, 1.5)),
        bad_words=("bad", "two words"),
        seed=2**64 - 1,
        stop=("\n\n", "早"),
        stop_token_ids=(999,),
        n=3,
        length_penalty=-0.5,
        logprobs=0,
        guided=GuidedDecoding("regex", "[ab]+"),
    )
    assert request == GenerationRequest(
        "7", "a\x00b 早", sampling, priority=-(2**31), timeout_s=1.5, cache_salt="tenant 7"
    )
    outputs = {"finish_reason", "num_output_tokens", "cum_log_probs", "output_log_probs", "sequence_index"}
    assert options == ResponseOptions(stream=True, num_answers=3, prefix="", outputs=frozenset(outputs))


def test_json_says_the_same_as_tensors() -> None:
    as_tensors = sampling(max_tokens=5, temperature=0.7, top_k=-1, top_p=0.9, min_p=0.1, random_seed=3)
    parameters = {"max_tokens": 5, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.1, "seed": 3}
    assert from_json(**parameters) == as_tensors
    # genai-perf sends numbers as strings.
    assert from_json(**{key: str(value) for key, value in parameters.items()}) == as_tensors
    assert from_json(stop="END", stop_token_ids=[3, 4], ignore_eos=True) == SamplingParams(
        stop=("END",), stop_token_ids=(3, 4), ignore_eos=True
    )


def test_vllm_s_keys() -> None:
    assert from_json(
        n="2",
        min_tokens="3",
        max_tokens="9",
        typical_p="0.5",
        repetition_penalty=1.25,
        presence_penalty="-0.5",
        frequency_penalty=0.5,
        no_repeat_ngram_size=2,
        logit_bias={"7": "-1.5", "3": 100},
        bad_words=["x", ""],
        beam_width=1,
        logprobs=5,
        prompt_logprobs="0",
        structured_outputs={"grammar": 'root ::= "a"'},
    ) == SamplingParams(
        n=2,
        min_tokens=3,
        max_tokens=9,
        typical_p=0.5,
        repetition_penalty=1.25,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        no_repeat_ngram_size=2,
        logit_bias=((3, 100.0), (7, -1.5)),
        bad_words=("x",),
        logprobs=5,
        prompt_logprobs=0,
        guided=GuidedDecoding("ebnf", 'root ::= "a"'),
    )


def test_biases_of_words_and_token_ids_add_up() -> None:
    biased = sampling(
        embedding_bias_words=["four", "five"],
        embedding_bias_weights=[1.0, 2.0],
        sampling_parameters='{"logit_bias": {"4": 0.5, "9": 1}}',
    )
    assert biased.logit_bias == ((4, 3.5), (9, 1.0), (104, 3.0))


@pytest.mark.parametrize(
    ("guide_type", "guide", "key", "value", "expected"),
    [
        ("json", "", "json_object", True, GuidedDecoding("json")),
        ("json_schema", '{"type": "object"}', "json", {"type": "object"}, None),
        ("json_schema", '{"type": "object"}', "json", '{"type": "object"}', None),
        ("regex", "a|b", "regex", "a|b", GuidedDecoding("regex", "a|b")),
        ("ebnf_grammar", "root ::= x", "grammar", "root ::= x", GuidedDecoding("ebnf", "root ::= x")),
        ("choice", '["é", "no"]', "choice", ["é", "no"], GuidedDecoding("choice", '["é", "no"]')),
    ],
)
@pytest.mark.parametrize("name", ["guided_decoding", "structured_outputs"])
def test_guides_of_both_conventions(
    guide_type: str, guide: str, key: str, value: object, expected: GuidedDecoding | None, name: str
) -> None:
    expected = expected or GuidedDecoding("json_schema", guide)
    as_tensors = {"guided_decoding_guide_type": guide_type, "guided_decoding_guide": guide}
    assert sampling(**as_tensors).guided == expected
    as_json = json.dumps({name: {key: value}})
    assert sampling(sampling_parameters=as_json).guided == expected
    assert sampling(**as_tensors, sampling_parameters=as_json).guided == expected


@pytest.mark.parametrize(
    ("values", "logprobs", "outputs"),
    [
        ({"return_logprobs": True}, 0, {"logprobs"}),
        ({"sampling_parameters": '{"logprobs": 4}'}, 4, {"logprobs"}),
        ({"sampling_parameters": '{"logprobs": 4}', "return_logprobs": False}, None, set()),
        (
            {"sampling_parameters": '{"logprobs": 4}', "return_cumulative_logprob": True},
            4,
            {"logprobs", "cumulative_logprob"},
        ),
        ({"return_log_probs": True}, 0, {"cum_log_probs", "output_log_probs"}),
        ({"sampling_parameters": '{"prompt_logprobs": 1}'}, None, {"prompt_logprobs"}),
        ({"return_num_cached_tokens": True}, None, {"num_cached_tokens"}),
    ],
)
def test_logprobs_are_computed_if_they_are_sent(
    values: dict[str, Any], logprobs: int | None, outputs: set[str]
) -> None:
    request, options = parse(**values)
    assert request.sampling.logprobs == logprobs
    assert options.outputs == outputs


def test_the_shorter_timeout_counts() -> None:
    def timeout_s(timeout_us: int, **values: Any) -> float | None:
        return parse_request("7", tensors(**values), LIMITS, TOKENIZER, (), timeout_us)[0].timeout_s

    assert timeout_s(0) is None
    assert timeout_s(2_500_000) == 2.5
    assert timeout_s(2_500_000, timeout_ms=500) == 0.5
    assert timeout_s(250_000, timeout_ms=500) == 0.25


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
def test_empty_strings_stand_for_none(empty: object) -> None:
    # Clients of the TensorRT-LLM convention send them always.
    assert sampling(stop_words=empty).stop == ()
    assert sampling(bad_words=empty, embedding_bias_words=empty) == SamplingParams()


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
