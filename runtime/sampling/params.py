"""Which values sampling parameters can have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, get_args

from trtforge.errors import RequestError
from trtforge.runtime.request import GuidedKind, SamplingParams
from trtforge.runtime.sampling.grammar import check_guide

MAX_N = 128
MAX_BEAM_WIDTH = 64
MAX_LOGPROBS = 64  # beam search asks for beam_width and its stop tokens
MAX_PENALTY = 100.0  # of repetition; presence and frequency are those of the OpenAI API
MAX_LOGIT_BIAS = 1e6
MAX_BIASED_TOKENS = 4096
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 64
MAX_STOPS = 64
_MAX_VALUE_CHARS = 80

_Check = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and which ones are


def _between(low: float, high: float) -> _Check:
    return lambda value: low <= value <= high, f"between {low} and {high}"


def _at_least(low: int) -> _Check:
    return lambda value: value >= low, f"at least {low}"


_SHARE: _Check = (lambda value: 0 < value <= 1, "above 0 and at most 1")
_NUM_LOGPROBS: _Check = (
    lambda value: value is None or 0 <= value <= MAX_LOGPROBS,
    f"None or between 0 and {MAX_LOGPROBS}",
)

_RANGES: dict[str, _Check] = {
    "max_tokens": _at_least(1),
    "min_tokens": _at_least(0),
    "temperature": (lambda value: value >= 0 and math.isfinite(value), "finite and at least 0"),
    "top_k": (lambda value: value >= 0, "at least 0, where 0 keeps all tokens"),
    "top_p": _SHARE,
    "min_p": _between(0, 1),
    "typical_p": _SHARE,
    "repetition_penalty": (lambda value: 0.01 <= value <= MAX_PENALTY, f"between 0.01 and {MAX_PENALTY:g}"),
    "presence_penalty": _between(-2, 2),
    "frequency_penalty": _between(-2, 2),
    "no_repeat_ngram_size": (lambda value: value >= 0, "at least 0, where 0 allows all"),
    "stop": (
        lambda value: len(value) <= MAX_STOPS and all(value),
        f"at most {MAX_STOPS} strings, none of them empty",
    ),
    "bad_words": (
        lambda value: len(value) <= MAX_BAD_WORDS and all(value),
        f"at most {MAX_BAD_WORDS} strings, none of them empty",
    ),
    "n": _between(1, MAX_N),
    "beam_width": _between(1, MAX_BEAM_WIDTH),
    "length_penalty": (math.isfinite, "finite"),
    "logprobs": _NUM_LOGPROBS,
    "prompt_logprobs": _NUM_LOGPROBS,
}


def check_sampling_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError, naming the field, its value and what is allowed, for what cannot be sampled."""
    for name, (is_allowed, allowed) in _RANGES.items():
        value = getattr(params, name)
        _require(is_allowed(value), name, value, allowed)
    _require(
        params.min_tokens <= params.max_tokens,
        "min_tokens",
        params.min_tokens,
        f"at most max_tokens, {params.max_tokens}",
    )
    _require(
        params.temperature == 0 if params.seed is None else 0 <= params.seed < 2**64,
        "seed",
        params.seed,
        "set if temperature is above 0, and an unsigned 64-bit number",
    )
    _check_token_lists(params, vocab_size)
    _check_beams(params)
    if params.guided is not None:
        kinds = get_args(GuidedKind)
        _require(params.guided.kind in kinds, "guided kind", params.guided.kind, f"one of {', '.join(kinds)}")
        check_guide(params.guided)


def _check_token_lists(params: SamplingParams, vocab_size: int) -> None:
    known = f"token ids from 0 to {vocab_size - 1}"
    stop_token_ids = params.stop_token_ids
    _require(
        len(stop_token_ids) <= MAX_STOPS and _are_known(stop_token_ids, vocab_size),
        "stop_token_ids",
        stop_token_ids,
        f"at most {MAX_STOPS} {known}",
    )
    biased = {token_id for token_id, _ in params.logit_bias}
    _require(
        len(params.logit_bias) <= MAX_BIASED_TOKENS
        and len(biased) == len(params.logit_bias)
        and _are_known(biased, vocab_size),
        "logit_bias",
        params.logit_bias,
        f"for at most {MAX_BIASED_TOKENS} different {known}",
    )
    for token_id, bias in params.logit_bias:
        _require(
            abs(bias) <= MAX_LOGIT_BIAS or bias == -math.inf,
            f"logit_bias of token {token_id}",
            bias,
            f"between -{MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g}, or -inf",
        )
    words = params.bad_words_token_ids
    _require(len(words) <= MAX_BAD_WORDS, "bad_words_token_ids", words, f"at most {MAX_BAD_WORDS} words")
    for word in words:
        _require(
            1 <= len(word) <= MAX_BAD_WORD_TOKENS and _are_known(word, vocab_size),
            "a word of bad_words_token_ids",
            word,
            f"1 to {MAX_BAD_WORD_TOKENS} {known}",
        )


def _check_beams(params: SamplingParams) -> None:
    if params.beam_width == 1:
        return
    _require(params.n <= params.beam_width, "n", params.n, f"at most beam_width, {params.beam_width}")
    _require(params.temperature == 0, "temperature", params.temperature, "0 with beam_width above 1")
    _require(params.guided is None, "guided", params.guided, "left out with beam_width above 1")


def _are_known(token_ids: Iterable[int], vocab_size: int) -> bool:
    return all(0 <= token_id < vocab_size for token_id in token_ids)


def _require(valid: bool, name: str, value: object, allowed: str) -> None:
    if not valid:
        text = str(value)
        shown = text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "..."
        raise RequestError(f"{name} is {shown}; it has to be {allowed}")
