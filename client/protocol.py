"""One request as a protobuf message, the same for the sync and the asyncio client."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tritonclient.grpc import service_pb2

from trtforge import wire
from trtforge.errors import RequestError

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A proxy for web pages is of no use between here and the server.
    ("grpc.enable_http_proxy", 0),
]

_TENSORS = {tensor.name: tensor for tensor in wire.REQUEST_TENSORS}
# Triton's data type: its name in requests, and the field of InferTensorContents that carries it.
_DATA_TYPES = {
    "STRING": ("BYTES", "bytes_contents"),
    "INT32": ("INT32", "int_contents"),
    "UINT64": ("UINT64", "uint64_contents"),
    "FP32": ("FP32", "fp32_contents"),
    "BOOL": ("BOOL", "bool_contents"),
}


@dataclass(frozen=True, slots=True)
class Guide:
    """What the answer has to look like: "json" (any), "json_schema", "regex", "ebnf_grammar" or "choice".

    `text` is the schema, expression or grammar, or a JSON list of strings to choose from.
    """

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen and when to stop; None leaves a value to the server's default.

    What each one means and may be is in docs/requests.md, under the tensor of the same name. `n` is
    num_return_sequences there; the last five travel in `sampling_parameters`.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words: tuple[str, ...] | None = None
    seed: int | None = None
    stop_words: tuple[str, ...] | None = None
    end_id: int | None = None
    n: int | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    guide: Guide | None = None
    ignore_eos: bool | None = None
    stop_token_ids: tuple[int, ...] | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How a request is treated; None leaves a value to the server's default."""

    priority: int | None = None  # lower goes first
    timeout_ms: int | None = None  # the server ends the request then, with RequestTimeoutError
    cache_salt: str | None = None  # only requests with the same one share cached prefixes


SERVER_DEFAULTS = SamplingOptions()
DEFAULT_OPTIONS = RequestOptions()

_IN_SAMPLING_PARAMETERS = ("ignore_eos", "stop_token_ids", "logit_bias", "logprobs", "prompt_logprobs")
_RETURNED = ("finish_reason", "num_input_tokens", "num_output_tokens", "num_cached_tokens")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue: exactly one of the three is given, else RequestError.

    `messages` is a conversation of {"role", "content"}, to which the server applies the chat template.
    """

    text: str | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    input_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        given = [self.text is not None, self.messages is not None, self.input_ids is not None]
        if sum(given) != 1:
            raise RequestError(f"exactly one of prompt, messages and input_ids is needed, not {sum(given)}")


def infer_request(
    model: str,
    prompt: Prompt,
    sampling: SamplingOptions,
    options: RequestOptions,
    *,
    stream: bool,
    request_id: str | None,
) -> service_pb2.ModelInferRequest:
    """The message for one request; raises RequestError for a value that its tensor cannot hold.

    Without a `request_id` the request gets a random one.
    """
    given = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    guide = given.pop("guide")
    parameters = {name: given.pop(name) for name in _IN_SAMPLING_PARAMETERS}
    values: dict[str, Any] = {
        "text_input": prompt.text,
        "messages": None if prompt.messages is None else json.dumps(list(prompt.messages)),
        "input_ids": prompt.input_ids,
        "num_return_sequences": given.pop("n"),
        **given,
        **{field.name: getattr(options, field.name) for field in fields(options)},
        "guided_decoding_guide_type": guide and guide.kind,
        "guided_decoding_guide": guide and guide.text,
        "sampling_parameters": _json_object(parameters),
        "stream": stream,
        "exclude_input_in_output": True,
        "return_cumulative_logprob": None if sampling.logprobs is None else True,
        **{f"return_{name}": True for name in _RETURNED},
    }
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id or uuid.uuid4().hex)
    for name, value in values.items():
        if value is not None:
            _add_tensor(request, _TENSORS[name], value)
    return request


def _json_object(values: Mapping[str, Any]) -> str | None:
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return json.dumps(given) if given else None
    except TypeError as error:
        raise RequestError(f"sampling_parameters cannot be sent as JSON: {error}") from error


def _add_tensor(request: service_pb2.ModelInferRequest, spec: wire.TritonTensor, value: Any) -> None:
    data_type, field = _DATA_TYPES[spec.data_type]
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    elements: list[Any] = list(value) if is_list else [value]
    tensor = request.inputs.add(name=spec.name, datatype=data_type, shape=[len(elements)])
    try:
        if data_type == "BYTES":
            elements = [element.encode() for element in elements]
        getattr(tensor.contents, field).extend(elements)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{spec.name} cannot be sent as {spec.data_type}: {error}") from error
