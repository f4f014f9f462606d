"""What a Triton request asks for: input tensors, checked one by one, to a generation request.

Every value can be given as a tensor; those of the sampling also in the JSON of `sampling_parameters`. The
same value twice is fine, two different ones are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trtforge import wire
from trtforge.errors import RequestError
from trtforge.runtime import request_values as values
from trtforge.runtime.request import GenerationRequest, SamplingParams

MAX_TEMPERATURE = 100.0
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_CHARS = 1000
MAX_STOP_TOKEN_IDS = 256
ROLES = ("system", "user", "assistant", "tool")

Tensors = Mapping[str, npt.NDArray[Any]]
EncodeChat = Callable[[Sequence[Mapping[str, str]]], tuple[int, ...]]

_SPECS = {spec.name: spec for spec in wire.REQUEST_TENSORS}
_DTYPES = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
_PROMPTS = ("text_input", "input_ids", "messages")
# The tensors and the key of sampling_parameters that set a field of SamplingParams.
_SAMPLING_TENSORS = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "random_seed": "seed",
    "stop_words": "stop",
    "end_id": "stop_token_ids",
}
_SAMPLING_KEYS = (*dict.fromkeys(_SAMPLING_TENSORS.values()), "ignore_eos")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What bounds the values of a request to one model."""

    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How the answer is sent."""

    stream: bool  # in pieces as they arrive, else exactly once
    prefix: str  # what a whole answer's text starts with
    finish_reason: bool
    num_input_tokens: bool
    num_output_tokens: bool


def parse_request(
    request_id: str,
    tensors: Tensors,
    limits: ModelLimits,
    encode_chat: EncodeChat,
    parameters: Iterable[str] = (),
) -> tuple[GenerationRequest, ResponseOptions]:
    """Read the input tensors of `wire.REQUEST_TENSORS`; strings are bytes in arrays of objects.

    `encode_chat` applies the model's chat template. `parameters` are the names of the Triton request's
    parameters, among which its HTTP endpoint puts every key that is not a tensor's. Raises RequestError,
    naming the tensor, its value and what is allowed, for anything that is unknown, malformed, out of
    range or contradictory.
    """
    for name in parameters:
        if name != "id":  # the HTTP endpoint's own
            raise _unknown(name)
    for name, array in tensors.items():
        _check_tensor(name, array)
    sampling = _sampling(tensors, limits)
    stream = _flag(tensors, "stream", default=False)
    prompt = _prompt(tensors, limits, encode_chat)
    # A stream never repeats its prompt.
    exclude_input = _flag(tensors, "exclude_input_in_output", default=stream)
    if stream and not exclude_input:
        raise values.refusal("exclude_input_in_output", "false with stream true", "true or left out then")
    options = ResponseOptions(
        stream=stream,
        prefix=prompt if isinstance(prompt, str) and not exclude_input else "",
        finish_reason=_flag(tensors, "return_finish_reason", default=False),
        num_input_tokens=_flag(tensors, "return_num_input_tokens", default=False),
        num_output_tokens=_flag(tensors, "return_num_output_tokens", default=False),
    )
    return GenerationRequest(request_id, prompt, sampling), options


def _check_tensor(name: str, array: npt.NDArray[Any]) -> None:
    spec = _SPECS.get(name)
    if spec is None:
        raise _unknown(name)
    if array.dtype != _DTYPES[spec.data_type]:
        raise values.refusal(name, str(array.dtype), f"of type {spec.data_type}")
    if array.ndim != 1 or (spec.dims == (1,) and array.shape != (1,)):
        wanted = "[1], one value" if spec.dims == (1,) else "[-1], one dimension"
        raise values.refusal(name, f"shape {list(array.shape)}", f"of shape {wanted}")


def _unknown(name: str) -> RequestError:
    return RequestError(f"input {values.shorten(name)} is unknown: allowed are {', '.join(_SPECS)}")


def _flag(tensors: Tensors, name: str, *, default: bool) -> bool:
    return bool(tensors[name][0]) if name in tensors else default


# --------------------------------------------------------------------------- prompts


def _prompt(tensors: Tensors, limits: ModelLimits, encode_chat: EncodeChat) -> str | tuple[int, ...]:
    given = [name for name in _PROMPTS if name in tensors]
    if len(given) != 1:
        raise RequestError(
            f"exactly one of {', '.join(_PROMPTS)} has to be given, not {' and '.join(given) or 'none'}"
        )
    if "messages" in tensors:
        return encode_chat(_messages(values.text("messages", tensors["messages"][0])))
    if "text_input" in tensors:
        text = values.text("text_input", tensors["text_input"][0])
        if not text:
            raise RequestError("text_input is empty: it has to have at least one character")
        return text
    token_ids = tensors["input_ids"].tolist()
    if not token_ids:
        raise RequestError("input_ids is empty: it has to have at least one token id")
    return _token_ids("input_ids", token_ids, limits)


def _messages(text: str) -> list[dict[str, str]]:
    messages = values.json_value("messages", text)
    if not isinstance(messages, list) or not messages:
        shown = "[]" if messages == [] else f"a JSON {type(messages).__name__}"
        raise values.refusal("messages", shown, 'a JSON list of at least one {"role", "content"}')
    for number, message in enumerate(messages):
        source = f"messages[{number}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            shown = (
                f"an object with {values.shorten(sorted(message))}" if isinstance(message, dict) else "none"
            )
            raise values.refusal(source, shown, 'an object with "role" and "content" and nothing else')
        if message["role"] not in ROLES:
            raise values.refusal(
                f"{source}.role", values.shorten(message["role"]), f"one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise values.refusal(f"{source}.content", type(message["content"]).__name__, "a string")
    return messages


# --------------------------------------------------------------------------- sampling


def _sampling(tensors: Tensors, limits: ModelLimits) -> SamplingParams:
    found: dict[str, tuple[str, Any]] = {}  # field: (where it came from, value)
    for field, source, value in _given_values(tensors):
        parsed = _parse(field, source, value, limits)
        other_source, other = found.setdefault(field, (source, parsed))
        if other != parsed:
            raise RequestError(
                f"{other_source} is {values.shorten(other)} but {source} is {values.shorten(parsed)}: "
                "give only one of them, or the same value"
            )
    return SamplingParams(**{field: value for field, (_, value) in found.items()})


def _given_values(tensors: Tensors) -> Iterable[tuple[str, str, Any]]:
    """(field, where it was given, raw value), for every sampling value of the request."""
    for name, field in _SAMPLING_TENSORS.items():
        if name in tensors:
            items = tensors[name].tolist()
            yield field, name, items if _SPECS[name].dims == (-1,) else items[0]
    if "sampling_parameters" not in tensors:
        return
    name = "sampling_parameters"
    parameters = values.json_value(name, values.text(name, tensors[name][0]))
    if not isinstance(parameters, dict):
        raise values.refusal(name, values.shorten(parameters), "a JSON object")
    for key, value in parameters.items():
        if key not in _SAMPLING_KEYS:
            raise RequestError(
                f"sampling_parameters has the unknown key {values.shorten(key)}: allowed are "
                + ", ".join(_SAMPLING_KEYS)
            )
        yield key, f"sampling_parameters.{key}", value


def _parse(field: str, source: str, value: Any, limits: ModelLimits) -> Any:
    match field:
        case "max_tokens":
            return values.integer(source, value, 1, limits.max_model_len)
        case "temperature":
            return values.decimal(
                source, value, high=MAX_TEMPERATURE, allowed=f"from 0 (greedy) to {MAX_TEMPERATURE:g}"
            )
        case "top_k":
            return max(0, values.integer(source, value, -1, 2**31 - 1, "; -1 and 0 switch it off"))
        case "top_p":
            allowed = "above 0 and at most 1"
            return values.decimal(source, value, high=1.0, allowed=allowed, zero_allowed=False)
        case "min_p":
            return values.decimal(source, value, high=1.0, allowed="from 0 to 1")
        case "seed":
            return values.integer(source, value, 0, 2**64 - 1)
        case "stop":
            return _stop_strings(source, value)
        case "stop_token_ids":
            return _stop_token_ids(source, value, limits)
        case _:
            return values.boolean(source, value)


def _stop_strings(source: str, value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    # Clients of the TensorRT-LLM convention send one empty string to say that there are none.
    strings = tuple(text for item in items if (text := values.text(source, item)))
    if len(strings) > MAX_STOP_STRINGS:
        raise values.refusal(source, f"{len(strings)} strings", f"at most {MAX_STOP_STRINGS} strings")
    longest = max(map(len, strings), default=0)
    if longest > MAX_STOP_STRING_CHARS:
        raise values.refusal(
            source, f"a string of {longest} characters", f"at most {MAX_STOP_STRING_CHARS} characters"
        )
    return strings


def _stop_token_ids(source: str, value: object, limits: ModelLimits) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_STOP_TOKEN_IDS:
        raise values.refusal(source, f"{len(items)} token ids", f"at most {MAX_STOP_TOKEN_IDS} token ids")
    high = limits.vocab_size - 1
    return _token_ids(source, [values.integer(source, item, 0, high) for item in items], limits)


def _token_ids(source: str, token_ids: list[int], limits: ModelLimits) -> tuple[int, ...]:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < limits.vocab_size:
            raise values.refusal(
                source, f"token id {token_id}", f"made of ids from 0 to {limits.vocab_size - 1}"
            )
    return tuple(token_ids)
