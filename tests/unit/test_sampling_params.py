from __future__ import annotations

import re
from dataclasses import replace

import pytest

from trtforge.errors import RequestError
from trtforge.runtime.request import GuidedDecoding, SamplingParams
from trtforge.runtime.sampling.params import check_sampling_params

VOCAB_SIZE = 100
NAN = float("nan")
INF = float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", NAN),
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("typical_p", 0.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", INF),
        ("presence_penalty", 2.1),
        ("frequency_penalty", NAN),
        ("no_repeat_ngram_size", -1),
        ("stop", ("",)),
        ("bad_words", ("a",) * 2000),
        ("stop_token_ids", (100,)),
        ("logit_bias", ((100, 1.0),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("n", 0),
        ("n", 129),
        ("beam_width", 0),
        ("length_penalty", NAN),
        ("logprobs", 65),
        ("prompt_logprobs", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", None),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    params = replace(SamplingParams(temperature=1.0, seed=0), **{name: value})
    with pytest.raises(RequestError, match=f"^{name} is {re.escape(str(value)[:80])}.*; it has to be "):
        check_sampling_params(params, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(logit_bias=((1, NAN),)), "logit_bias of token 1 is nan"),
        (SamplingParams(logit_bias=((1, INF),)), "logit_bias of token 1 is inf"),
        (SamplingParams(bad_words_token_ids=((),)), r"bad_words_token_ids is \(\)"),
        (SamplingParams(bad_words_token_ids=((1, -1),)), r"bad_words_token_ids is \(1, -1\)"),
        (SamplingParams(n=3, beam_width=2), "n is 3; it has to be at most beam_width, 2"),
        (SamplingParams(beam_width=2, temperature=1.0, seed=1), "temperature is 1.0; it has to be 0"),
        (SamplingParams(beam_width=2, guided=GuidedDecoding("json")), "guided is"),
        (SamplingParams(guided=GuidedDecoding("xml")), "guided kind is xml; it has to be one of json, "),  # type: ignore[arg-type]
        (SamplingParams(guided=GuidedDecoding("regex", "a" * 2**16 + "a")), "the guide has 65537 characters"),
        (SamplingParams(guided=GuidedDecoding("ebnf")), "the guide is empty"),
        (SamplingParams(guided=GuidedDecoding("choice", '"a"')), "a JSON list of strings"),
        (SamplingParams(guided=GuidedDecoding("choice", "[]")), "a JSON list of strings"),
        (SamplingParams(guided=GuidedDecoding("choice", "[" * 60000)), "a JSON list of strings"),
        (SamplingParams(guided=GuidedDecoding("json_schema", "{")), "not valid JSON"),
    ],
)
def test_other_bad_values_are_refused(params: SamplingParams, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_sampling_params(params, VOCAB_SIZE)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.8, min_p=0.01, typical_p=0.9, seed=2**64 - 1),
        SamplingParams(min_tokens=16, stop_token_ids=(0, 99), logit_bias=((99, -INF), (0, 100.0))),
        SamplingParams(bad_words_token_ids=((1, 99), (5,)), no_repeat_ngram_size=10**9),
        SamplingParams(n=128, logprobs=20, prompt_logprobs=0, presence_penalty=-2, frequency_penalty=2),
        SamplingParams(n=2, beam_width=2, length_penalty=-1.0),
        SamplingParams(guided=GuidedDecoding("choice", '["a", ""]')),
    ],
)
def test_values_in_range_are_taken(params: SamplingParams) -> None:
    check_sampling_params(params, VOCAB_SIZE)
