"""The responses to one request as answers, the same for the sync and the asyncio client."""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from trtforge import wire
from trtforge.errors import CapacityError, RequestError, RequestTimeoutError, ServerError, TrtforgeError

_LENGTH = struct.Struct("<I")
_INT32_BYTES = 4
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's natural log-probability, and its place among all tokens (1 is the likeliest)."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities at one position: of the token there and of the likeliest ones beside it."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]  # by rank, the token itself included


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one answer has got since its previous chunk; its last one, and only that, has a finish_reason."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    num_input_tokens: int
    num_output_tokens: int  # of this answer so far, this chunk included
    index: int = 0  # which of the n answers
    num_cached_tokens: int | None = None  # of the prompt; None: not known yet
    cumulative_logprob: float | None = None  # of this answer so far
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one for each token
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # with the first chunk only


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. With n > 1 or beam search it is the first or best one, and `others` are the rest."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    others: tuple[Completion, ...] = ()


class Arrivals:
    """Chunks of one request that have arrived and were not given out, and whether there will be more."""

    def __init__(self, num_answers: int) -> None:
        self._num_open = num_answers
        self._chunks: deque[Chunk] = deque()

    @property
    def finished(self) -> bool:
        """Whether the finish_reason of every answer has come."""
        return self._num_open == 0

    def add(self, response: service_pb2.ModelStreamInferResponse) -> None:
        """Take a response. Raises what `parse_response` raises."""
        for chunk in parse_response(response):
            self._chunks.append(chunk)
            self._num_open -= chunk.finish_reason is not None

    def pop(self) -> Chunk | None:
        """The next chunk; None if a response has to be waited for."""
        return self._chunks.popleft() if self._chunks else None


def parse_response(response: service_pb2.ModelStreamInferResponse) -> list[Chunk]:
    """The chunks of one response, one for each answer in it; none if it only says that it is the last.

    Raises the error that the response carries, and ServerError if the response is not one of a model
    built by this project.
    """
    if response.error_message:
        raise _model_error(response.error_message.strip())
    contents = response.infer_response
    if not contents.outputs:
        return []
    outputs = (output.name for output in contents.outputs)
    tensors = dict(zip(outputs, contents.raw_output_contents, strict=True))
    texts, reasons = _strings(tensors, "text_output"), _strings(tensors, "finish_reason")
    token_ids, counts = _numbers(tensors, "output_ids"), _numbers(tensors, "num_output_tokens")
    num_input_tokens = sum(_numbers(tensors, "num_input_tokens"))
    num_answers = len(texts)
    indices = _numbers(tensors, "sequence_index") if "sequence_index" in tensors else range(num_answers)
    if not len(reasons) == len(counts) == len(indices) == num_answers:
        raise ServerError(f"the model's response has {num_answers} texts but not as much of the rest")
    cached = _numbers(tensors, "num_cached_tokens") if "num_cached_tokens" in tensors else ()
    cumulative = _floats(tensors, "cumulative_logprob") if "cumulative_logprob" in tensors else ()
    logprobs = _strings(tensors, "logprobs") if "logprobs" in tensors else ()
    prompt_logprobs = _strings(tensors, "prompt_logprobs") if "prompt_logprobs" in tensors else ()
    chunks, end = [], 0
    for i in range(num_answers):
        # In a whole response the answers' tokens follow each other; in a stream the counts are sums.
        start, end = end, end + counts[i] if num_answers > 1 else len(token_ids)
        chunks.append(
            Chunk(
                text=texts[i],
                token_ids=token_ids[start:end],
                finish_reason=reasons[i] or None,  # empty until the last chunk
                num_input_tokens=num_input_tokens,
                num_output_tokens=counts[i],
                index=indices[i],
                num_cached_tokens=cached[0] if cached else None,
                cumulative_logprob=cumulative[i] if cumulative else None,
                logprobs=tuple(filter(None, _logprobs(logprobs[i]))) if logprobs else None,
                prompt_logprobs=tuple(_logprobs(prompt_logprobs[0])) if prompt_logprobs and i == 0 else None,
            )
        )
    return chunks


def _logprobs(text: str) -> list[TokenLogprobs | None]:
    return [None if entry is None else _position(entry) for entry in json.loads(text)]


def _position(entry: Mapping[str, Mapping[str, Any]]) -> TokenLogprobs:
    tokens = [
        TokenLogprob(int(token_id), token["decoded_token"], token["logprob"], token["rank"])
        for token_id, token in entry.items()
    ]
    return TokenLogprobs(tokens[0], tuple(sorted(tokens, key=lambda token: token.rank)))


def _model_error(text: str) -> TrtforgeError:
    code, message = wire.split_error_text(text)
    if code == "INVALID_ARG":
        return RequestError(message)
    if code == "UNAVAILABLE":
        return CapacityError(message)
    if code == "TIMEOUT":
        return RequestTimeoutError(message)
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


def _floats(tensors: Mapping[str, bytes], name: str) -> tuple[float, ...]:
    raw = _contents(tensors, name)
    return struct.unpack(f"<{len(raw) // _FP32_BYTES}f", raw)


def _contents(tensors: Mapping[str, bytes], name: str) -> bytes:
    if name not in tensors:
        raise ServerError(f"the model's response has no tensor {name}: was it built with build-engine?")
    return tensors[name]


def join(chunks: Sequence[Chunk]) -> Completion:
    """The whole answers out of all their chunks, the last of which have finish_reasons."""
    answers: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        answers.setdefault(chunk.index, []).append(chunk)
    first, *others = (_join_answer(answers[index]) for index in sorted(answers))
    return replace(first, others=tuple(others))


def _join_answer(chunks: Sequence[Chunk]) -> Completion:
    last = chunks[-1]
    logprobs = None
    if last.logprobs is not None:
        logprobs = tuple(entry for chunk in chunks for entry in chunk.logprobs or ())
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=last.finish_reason or "",
        num_input_tokens=last.num_input_tokens,
        num_output_tokens=last.num_output_tokens,
        num_cached_tokens=last.num_cached_tokens,
        cumulative_logprob=last.cumulative_logprob,
        logprobs=logprobs,
        prompt_logprobs=chunks[0].prompt_logprobs,
    )


def unfinished() -> ServerError:
    """The error for a stream that the server ended although no finish_reason had come."""
    return ServerError("the answer is incomplete: the server ended the stream without a finish_reason")


def rpc_error(error: grpc.RpcError, url: str) -> TrtforgeError:
    """The project's error for a call that failed as such; what the model refuses comes in a response."""
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerError(f"no connection to a server at {url}: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestTimeoutError(f"the server at {url} did not finish the request within its timeout")
    return ServerError(f"the server at {url} failed the request with {code.name}: {details}")
