"""The sampling values of a request, from tensors and from the JSON of `sampling_parameters`.

Tensors have the names of the TensorRT-LLM ensemble, JSON keys those of vLLM. The same value twice is fine,
two different ones are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy.typing as npt

from trtforge.errors import RequestError
from trtforge.runtime.beam_search import MAX_BEAM_WIDTH
from trtforge.runtime.request import SamplingParams
from trtforge.runtime.text.word_tokens import Encoder, word_biases
from trtforge.runtime.triton import guide_values
from trtforge.runtime.triton import request_values as values

MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_PENALTY = 2.0
MAX_LENGTH_PENALTY = 10.0
MAX_BIAS = 100.0
MAX_BIASES = 1024
MAX_STRINGS = 64
MAX_STOP_STRINGS = 32
MAX_STRING_CHARS = 1000
MAX_STOP_TOKEN_IDS = 64
MAX_ANSWERS = 64
MAX_LOGPROBS = 20

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What bounds the values of a request to one model."""

    vocab_size: int
    max_model_len: int


Parse = Callable[[str, Any, ModelLimits], Any]  # (where it was given, raw value, limits)

# The tensors that set a field of SamplingParams; JSON keys are the fields' own names, but for guides.
TENSOR_FIELDS = {
    "max_tokens": "max_tokens",
    "min_tokens": "min_tokens",
    "min_length": "min_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words": "bad_words",
    "seed": "seed",
    "random_seed": "seed",
    "stop_words": "stop",
    "end_id": "stop_token_ids",
    "num_return_sequences": "n",
    "beam_width": "beam_width",
    "length_penalty": "length_penalty",
}


def parse_sampling(tensors: Tensors, limits: ModelLimits, tokenizer: Encoder) -> SamplingParams:
    """Read all sampling values; `tokenizer` makes token ids of the words that are given a bias.

    Raises RequestError, naming the value and what is allowed.
    """
    found: dict[str, tuple[str, Any]] = {}  # field: (where it came from, value)
    for field, source, value in _given_values(tensors, limits):
        other_source, other = found.setdefault(field, (source, value))
        if other != value:
            raise RequestError(
                f"{other_source} is {values.shorten(other)} but {source} is {values.shorten(value)}: "
                "give only one of them, or the same value"
            )
    sampling = SamplingParams(**{field: value for field, (_, value) in found.items()})
    if sampling.min_tokens > sampling.max_tokens:
        raise values.refusal(
            found["min_tokens"][0], str(sampling.min_tokens), f"at most max_tokens, {sampling.max_tokens}"
        )
    words = _biased_words(tensors)
    if words:
        biases = dict(sampling.logit_bias)
        for token_id, bias in word_biases(tokenizer, words).items():
            biases[token_id] = biases.get(token_id, 0.0) + bias
        sampling = replace(sampling, logit_bias=tuple(sorted(biases.items())))
    return sampling


def _given_values(tensors: Tensors, limits: ModelLimits) -> Iterable[tuple[str, str, Any]]:
    """(field, where it was given, value), for every sampling value of the request."""
    for name, field in TENSOR_FIELDS.items():
        if name in tensors:
            items = tensors[name].tolist()
            yield field, name, _FIELDS[field](name, items if field in _LISTS else items[0], limits)
    guide = guide_values.from_tensors(tensors)
    if guide is not None:
        yield "guided", "guided_decoding_guide", guide
    if "sampling_parameters" not in tensors:
        return
    name = "sampling_parameters"
    parameters = values.json_value(name, values.text(name, tensors[name][0]))
    if not isinstance(parameters, dict):
        raise values.refusal(name, values.shorten(parameters), "a JSON object")
    for key, value in parameters.items():
        source = f"{name}.{key}" if key in _FIELDS or key in guide_values.JSON_KEYS else name
        if key in guide_values.JSON_KEYS:
            yield "guided", source, guide_values.from_json(source, value)
        elif key in _FIELDS:
            yield key, source, _FIELDS[key](source, value, limits)
        elif key == "best_of":
            raise RequestError(
                "sampling_parameters.best_of is given: answers are not chosen among, ask for n of them"
            )
        else:
            raise RequestError(
                f"sampling_parameters has the unknown key {values.shorten(key)}: allowed are "
                + ", ".join((*_FIELDS, *guide_values.JSON_KEYS))
            )


def _biased_words(tensors: Tensors) -> list[tuple[str, float]]:
    name, weights_name = "embedding_bias_words", "embedding_bias_weights"
    raw_words = tensors[name].tolist() if name in tensors else []
    raw_weights = tensors[weights_name].tolist() if weights_name in tensors else []
    if not raw_weights and not any(raw_words):
        return []  # one empty word stands for none, as with stop_words
    if len(raw_words) != len(raw_weights):
        raise values.refusal(
            weights_name, f"{len(raw_weights)} numbers", f"one for each of {len(raw_words)} {name}"
        )
    words = _strings(MAX_STRINGS, name, raw_words, keep_empty=True)
    weights = [_bias(weights_name, weight) for weight in raw_weights]
    return [(word, weight) for word, weight in zip(words, weights, strict=True) if word]


# --------------------------------------------------------------------------- single fields


def _integer(low: int, high: int, source: str, value: Any, _: ModelLimits) -> int:
    return values.integer(source, value, low, high)


def _up_to_model_len(low: int, source: str, value: Any, limits: ModelLimits) -> int:
    return values.integer(source, value, low, limits.max_model_len)


def _number(
    low: float, high: float, above: bool, allowed: str, source: str, value: Any, _: ModelLimits
) -> float:
    return values.decimal(source, value, low=low, high=high, allowed=allowed, low_allowed=not above)


def _from_to(low: float, high: float) -> Parse:
    return partial(_number, low, high, False, f"from {low:g} to {high:g}")


def _above_to(low: float, high: float) -> Parse:
    return partial(_number, low, high, True, f"above {low:g} and at most {high:g}")


def _top_k(source: str, value: Any, _: ModelLimits) -> int:
    return max(0, values.integer(source, value, -1, 2**31 - 1, "; -1 and 0 switch it off"))


def _boolean(source: str, value: Any, _: ModelLimits) -> bool:
    return values.boolean(source, value)


def _bias(source: str, value: Any) -> float:
    return values.decimal(
        source, value, low=-MAX_BIAS, high=MAX_BIAS, allowed=f"from {-MAX_BIAS:g} to {MAX_BIAS:g}"
    )


def _logit_bias(source: str, value: Any, limits: ModelLimits) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise values.refusal(source, values.shorten(value), 'a JSON object of {"token id": bias}')
    if len(value) > MAX_BIASES:
        raise values.refusal(source, f"{len(value)} biases", f"at most {MAX_BIASES} biases")
    biases = {
        values.integer(source, token_id, 0, limits.vocab_size - 1): _bias(f"{source}[{token_id}]", bias)
        for token_id, bias in value.items()
    }
    return tuple(sorted(biases.items()))


def _strings(
    max_strings: int, source: str, value: object, _: ModelLimits | None = None, *, keep_empty: bool = False
) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    # Clients of the TensorRT-LLM convention send one empty string to say that there are none.
    strings = tuple(text for item in items if (text := values.text(source, item)) or keep_empty)
    if len(strings) > max_strings:
        raise values.refusal(source, f"{len(strings)} strings", f"at most {max_strings} strings")
    longest = max(map(len, strings), default=0)
    if longest > MAX_STRING_CHARS:
        raise values.refusal(
            source, f"a string of {longest} characters", f"at most {MAX_STRING_CHARS} characters"
        )
    return strings


def _stop_token_ids(source: str, value: object, limits: ModelLimits) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_STOP_TOKEN_IDS:
        raise values.refusal(source, f"{len(items)} token ids", f"at most {MAX_STOP_TOKEN_IDS} token ids")
    return tuple(values.integer(source, item, 0, limits.vocab_size - 1) for item in items)


_FIELDS: dict[str, Parse] = {
    "max_tokens": partial(_up_to_model_len, 1),
    "min_tokens": partial(_up_to_model_len, 0),
    "temperature": partial(_number, 0, MAX_TEMPERATURE, False, f"from 0 (greedy) to {MAX_TEMPERATURE:g}"),
    "top_k": _top_k,
    "top_p": _above_to(0, 1),
    "min_p": _from_to(0, 1),
    "typical_p": _above_to(0, 1),
    "repetition_penalty": _from_to(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "presence_penalty": _from_to(-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": _from_to(-MAX_PENALTY, MAX_PENALTY),
    "no_repeat_ngram_size": partial(_up_to_model_len, 0),
    "logit_bias": _logit_bias,
    "bad_words": partial(_strings, MAX_STRINGS),
    "seed": partial(_integer, 0, 2**64 - 1),
    "stop": partial(_strings, MAX_STOP_STRINGS),
    "stop_token_ids": _stop_token_ids,
    "ignore_eos": _boolean,
    "n": partial(_integer, 1, MAX_ANSWERS),
    "beam_width": partial(_integer, 1, MAX_BEAM_WIDTH),
    "length_penalty": _from_to(-MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY),
    "logprobs": partial(_integer, 0, MAX_LOGPROBS),
    "prompt_logprobs": partial(_integer, 0, MAX_LOGPROBS),
}
_LISTS = ("bad_words", "stop")
