"""One request and its responses as protobuf messages, the same for the sync and the asyncio client."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from trtforge import wire
from trtforge.errors import CapacityError, RequestError, ServerError, TrtforgeError

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A proxy for web pages is of no use between here and the server.
    ("grpc.enable_http_proxy", 0),
]

_LENGTH = struct.Struct("<I")
_INT32_BYTES = 4
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
class SamplingOptions:
    """How tokens are chosen and when to stop; None leaves a value to the server's default.

    The fields are the request tensors of the same names, but for `ignore_eos` (go on after the end of
    sequence, up to max_tokens), which travels in `sampling_parameters`.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop_words: tuple[str, ...] | None = None
    end_id: int | None = None
    ignore_eos: bool | None = None


SERVER_DEFAULTS = SamplingOptions()


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


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new since the previous chunk; the last one, and only it, has a finish_reason."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    num_input_tokens: int
    num_output_tokens: int  # so far, this chunk included


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int


def infer_request(
    model: str, prompt: Prompt, sampling: SamplingOptions, *, stream: bool, request_id: str | None
) -> service_pb2.ModelInferRequest:
    """The message for one request; raises RequestError for a value that its tensor cannot hold.

    Without a `request_id` the request gets a random one.
    """
    options = asdict(sampling)
    ignore_eos = options.pop("ignore_eos")
    values: dict[str, Any] = {
        "text_input": prompt.text,
        "messages": None if prompt.messages is None else json.dumps(list(prompt.messages)),
        "input_ids": prompt.input_ids,
        **options,
        "sampling_parameters": None if ignore_eos is None else json.dumps({"ignore_eos": ignore_eos}),
        "stream": stream,
        "exclude_input_in_output": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id or uuid.uuid4().hex)
    for name, value in values.items():
        if value is not None:
            _add_tensor(request, _TENSORS[name], value)
    return request


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


def parse_response(response: service_pb2.ModelStreamInferResponse) -> Chunk | None:
    """The chunk of one response; None for one without contents, which only says that it is the last.

    Raises the error that the response carries, and ServerError if the response is not one of a model
    built by this project.
    """
    if response.error_message:
        raise _model_error(response.error_message.strip())
    contents = response.infer_response
    if not contents.outputs:
        return None
    outputs = (output.name for output in contents.outputs)
    tensors = dict(zip(outputs, contents.raw_output_contents, strict=True))
    reasons = _strings(tensors, "finish_reason")
    return Chunk(
        text="".join(_strings(tensors, "text_output")),
        token_ids=_numbers(tensors, "output_ids"),
        # Empty until the last chunk.
        finish_reason=(reasons[0] or None) if reasons else None,
        num_input_tokens=sum(_numbers(tensors, "num_input_tokens")),
        num_output_tokens=sum(_numbers(tensors, "num_output_tokens")),
    )


def _model_error(text: str) -> TrtforgeError:
    code, message = wire.split_error_text(text)
    if code == "INVALID_ARG":
        return RequestError(message)
    if code == "UNAVAILABLE":
        return CapacityError(message)
    if code is None:
        return ServerError(f"the server refused the request: {message}")
    return ServerError(f"the model failed the request: {message}")


def _strings(tensors: Mapping[str, bytes], name: str) -> list[str]:
    # Each string has its length in bytes before it.
    raw, strings, offset = _contents(tensors, name), [], 0
    try:
        while offset < len(raw):
            start = offset + _LENGTH.size
            offset = start + _LENGTH.unpack_from(raw, offset)[0]
            strings.append(raw[start:offset].decode())
    except UnicodeDecodeError as error:
        raise ServerError(f"the model sent a {name} that is not UTF-8: {error.reason}") from error
    return strings


def _numbers(tensors: Mapping[str, bytes], name: str) -> tuple[int, ...]:
    raw = _contents(tensors, name)
    return struct.unpack(f"<{len(raw) // _INT32_BYTES}i", raw)


def _contents(tensors: Mapping[str, bytes], name: str) -> bytes:
    if name not in tensors:
        raise ServerError(f"the model's response has no tensor {name}: was it built with build-engine?")
    return tensors[name]


def join(chunks: Sequence[Chunk]) -> Completion:
    """The whole answer out of all its chunks, the last of which has the finish_reason."""
    last = chunks[-1]
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=last.finish_reason or "",
        num_input_tokens=last.num_input_tokens,
        num_output_tokens=last.num_output_tokens,
    )


def unfinished() -> ServerError:
    """The error for a stream that the server ended although no finish_reason had come."""
    return ServerError("the answer is incomplete: the server ended the stream without a finish_reason")


def rpc_error(error: grpc.RpcError, url: str) -> ServerError:
    """The project's error for a call that failed as such; what the model refuses comes in a response."""
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerError(f"no connection to a server at {url}: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServerError(f"the server at {url} did not finish the request within its timeout")
    return ServerError(f"the server at {url} failed the request with {code.name}: {details}")
