"""What a Triton request asks for: input tensors, checked one by one, to a generation request.

The sampling values among them are read by `sampling_values`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trtforge import wire
from trtforge.errors import RequestError
from trtforge.runtime.request import GenerationRequest, SamplingParams
from trtforge.runtime.text.word_tokens import Encoder
from trtforge.runtime.triton import request_values as values
from trtforge.runtime.triton.sampling_values import ModelLimits, Tensors, parse_sampling

ROLES = ("system", "user", "assistant", "tool")
MAX_CACHE_SALT_CHARS = 256
MICROSECONDS = 1e-6

_SPECS = {spec.name: spec for spec in wire.REQUEST_TENSORS}
_DTYPES = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
_PROMPTS = ("text_input", "input_ids", "messages")
# Response tensors that are sent when a flag asks for them.
_FLAGS = {
    "return_finish_reason": ("finish_reason",),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": ("num_output_tokens",),
    "return_num_cached_tokens": ("num_cached_tokens",),
    "return_log_probs": ("cum_log_probs", "output_log_probs"),
    "return_cumulative_logprob": ("cumulative_logprob",),
}
_LOGPROBS = frozenset(("cum_log_probs", "output_log_probs", "cumulative_logprob", "logprobs"))


class RequestTokenizer(Encoder, Protocol):
    """The part of a model's tokenizer that reading a request needs."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation in the model's chat template; raises RequestError."""
        ...


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How the answers are sent."""

    stream: bool  # in pieces as they arrive, else all of them exactly once
    num_answers: int
    prefix: str  # what a whole answer's text starts with
    outputs: frozenset[str]  # the response tensors that were asked for, beside text_output and output_ids


def parse_request(
    request_id: str,
    tensors: Tensors,
    limits: ModelLimits,
    tokenizer: RequestTokenizer,
    parameters: Iterable[str] = (),
    timeout_us: int = 0,
) -> tuple[GenerationRequest, ResponseOptions]:
    """Read the input tensors of `wire.REQUEST_TENSORS`; strings are bytes in arrays of objects.

    `parameters` are the names of the Triton request's parameters, among which its HTTP endpoint puts every
    key that is not a tensor's. `timeout_us` is the Triton request's own timeout, 0 without one. Raises
    RequestError, naming the tensor, its value and what is allowed, for anything that is unknown, malformed,
    out of range or contradictory.
    """
    for name in parameters:
        if name != "id":  # the HTTP endpoint's own
            raise _unknown(name)
    for name, array in tensors.items():
        _check_tensor(name, array)
    sampling = parse_sampling(tensors, limits, tokenizer)
    sampling, outputs = _outputs(tensors, sampling)
    stream = _flag(tensors, "stream", default=False)
    prompt = _prompt(tensors, limits, tokenizer)
    # A stream never repeats its prompt.
    exclude_input = _flag(tensors, "exclude_input_in_output", default=stream)
    if stream and not exclude_input:
        raise values.refusal("exclude_input_in_output", "false with stream true", "true or left out then")
    prefix = prompt if isinstance(prompt, str) and not exclude_input else ""
    request = GenerationRequest(
        request_id,
        prompt,
        sampling,
        priority=int(tensors["priority"][0]) if "priority" in tensors else 0,
        timeout_s=_timeout_s(tensors, timeout_us),
        cache_salt=_cache_salt(tensors),
    )
    return request, ResponseOptions(stream, sampling.n, prefix, outputs)


def _outputs(tensors: Tensors, sampling: SamplingParams) -> tuple[SamplingParams, frozenset[str]]:
    """The response tensors to send, and the sampling that computes what they need and nothing else."""
    outputs = {
        name for flag, names in _FLAGS.items() if _flag(tensors, flag, default=False) for name in names
    }
    # Who says how many logprobs wants to have them.
    if _flag(tensors, "return_logprobs", default=sampling.logprobs is not None):
        outputs.add("logprobs")
    if sampling.prompt_logprobs is not None:
        outputs.add("prompt_logprobs")
    if sampling.n > 1:
        outputs.add("sequence_index")
    if not outputs & _LOGPROBS:
        sampling = replace(sampling, logprobs=None)
    elif sampling.logprobs is None:
        sampling = replace(sampling, logprobs=0)
    return sampling, frozenset(outputs)


def _timeout_s(tensors: Tensors, timeout_us: int) -> float | None:
    """The shorter one of our own timeout and Triton's."""
    timeouts_s = [timeout_us * MICROSECONDS] if timeout_us else []
    if "timeout_ms" in tensors:
        timeouts_s.append(values.integer("timeout_ms", tensors["timeout_ms"].item(), 1, 2**31 - 1) / 1000)
    return min(timeouts_s, default=None)


def _cache_salt(tensors: Tensors) -> str:
    if "cache_salt" not in tensors:
        return ""
    salt = values.text("cache_salt", tensors["cache_salt"][0])
    if len(salt) > MAX_CACHE_SALT_CHARS:
        raise values.refusal(
            "cache_salt", f"{len(salt)} characters", f"at most {MAX_CACHE_SALT_CHARS} characters"
        )
    return salt


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


def _prompt(tensors: Tensors, limits: ModelLimits, tokenizer: RequestTokenizer) -> str | tuple[int, ...]:
    given = [name for name in _PROMPTS if name in tensors]
    if len(given) != 1:
        raise RequestError(
            f"exactly one of {', '.join(_PROMPTS)} has to be given, not {' and '.join(given) or 'none'}"
        )
    if "messages" in tensors:
        return tokenizer.encode_chat(_messages(values.text("messages", tensors["messages"][0])))
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


def _token_ids(source: str, token_ids: list[int], limits: ModelLimits) -> tuple[int, ...]:
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < limits.vocab_size:
            raise values.refusal(
                source, f"token id {token_id}", f"made of ids from 0 to {limits.vocab_size - 1}"
            )
    return tuple(token_ids)
