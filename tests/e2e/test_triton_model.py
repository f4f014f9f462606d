"""The Triton model on a real tritonserver, with the fake executor behind it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tokenizers
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from trtforge import wire
from trtforge.client.streaming import Client, SamplingOptions
from trtforge.client.triton_server import TritonServer

pytestmark = pytest.mark.e2e

TIMEOUT_S = 60
DTYPES = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
SPECS = {spec.name: spec for spec in wire.REQUEST_TENSORS}
MAX_MODEL_LEN = 128 * 1024

StartServer = Callable[[Path], TritonServer]
FindEngines = Callable[..., list[psutil.Process]]


@pytest.fixture(scope="module")
def repository(make_fake_repository: Callable[..., Path]) -> Path:
    """The cache holds one sequence of the maximum length, which takes minutes to generate."""
    return make_fake_repository(num_blocks=MAX_MODEL_LEN // 16, max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def server(repository: Path, triton_server: StartServer) -> TritonServer:
    return triton_server(repository)


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


@dataclass(frozen=True)
class Response:
    request_id: str
    outputs: dict[str, list[Any]]
    is_final: bool


def infer_request(
    request_id: str = "", parameters: dict[str, int] | None = None, **tensors: Any
) -> service_pb2.ModelInferRequest:
    """A message with any tensors, right or wrong."""
    request = service_pb2.ModelInferRequest(model_name="llm", id=request_id)
    for name, value in (parameters or {}).items():
        request.parameters[name].int64_param = value
    for name, value in tensors.items():
        array = value
        if not isinstance(value, np.ndarray):
            items = value if isinstance(value, list) else [value]
            items = [item.encode() if isinstance(item, str) else item for item in items]
            array = np.array(items, dtype=DTYPES[SPECS[name].data_type])
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        is_text = array.dtype == np.object_
        request.raw_input_contents.append(
            serialize_byte_tensor(array).item() if is_text and array.size else array.tobytes()
        )
    return request


class Refused(Exception):  # noqa: N818
    """An error response."""


def stream_infer(server: TritonServer, *requests: service_pb2.ModelInferRequest) -> Iterator[Response]:
    """The responses on one gRPC stream; raises Refused for an error."""
    with grpc.insecure_channel(server.grpc_url, options=[("grpc.max_send_message_length", -1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for message in stub.ModelStreamInfer(iter(requests), timeout=TIMEOUT_S):
            if message.error_message:
                raise Refused(message.error_message)
            result = triton.InferResult(message.infer_response)
            contents = result.get_response()
            outputs = {output.name: result.as_numpy(output.name).tolist() for output in contents.outputs}
            is_final = contents.parameters["triton_final_response"].bool_param
            yield Response(contents.id, outputs, is_final)


def ask(server: TritonServer, **tensors: Any) -> list[Response]:
    return list(stream_infer(server, infer_request(**tensors)))


def text_of(responses: list[Response]) -> str:
    return b"".join(response.outputs["text_output"][0] for response in responses).decode()


def ids_of(responses: list[Response]) -> list[int]:
    return [token_id for response in responses for token_id in response.outputs["output_ids"]]


def generate(server: TritonServer, body: dict[str, Any], path: str = "generate") -> tuple[int, str]:
    """Status and body of the HTTP endpoint."""
    url = f"{server.http_url}/v2/models/llm/{path}"
    try:
        with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=TIMEOUT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_stream_sends_deltas_and_a_whole_answer_is_one_response(
    server: TritonServer, tiny_tokenizer: Path
) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    request = {"text_input": "Hello 早上好", "max_tokens": 20}
    pieces = ask(server, **request, stream=True)
    # Usually 20, but what arrives while a response is being sent leaves together.
    assert 1 < len(pieces) <= 20
    assert all(set(piece.outputs) == {"text_output", "output_ids"} for piece in pieces)
    assert len(ids_of(pieces)) == 20
    assert text_of(pieces) == tokenizer.decode(ids_of(pieces))
    assert [piece.is_final for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    (whole,) = ask(server, **request)
    assert whole.is_final
    assert text_of([whole]) == "Hello 早上好" + text_of(pieces)
    assert ids_of([whole]) == ids_of(pieces)
    (alone,) = ask(server, **request, exclude_input_in_output=True)
    assert text_of([alone]) == text_of(pieces)


def test_what_is_sent_only_when_asked_for(server: TritonServer) -> None:
    asked = {f"return_{name}": True for name in ("finish_reason", "num_input_tokens", "num_output_tokens")}
    pieces = ask(server, input_ids=[5, 6, 7], max_tokens=3, stream=True, **asked)
    assert [piece.outputs["finish_reason"] for piece in pieces[:-1]] == [[b""]] * (len(pieces) - 1)
    assert pieces[-1].outputs["finish_reason"] == [b"length"]
    assert all(piece.outputs["num_input_tokens"] == [3] for piece in pieces)
    for i, piece in enumerate(pieces, start=1):
        assert piece.outputs["num_output_tokens"] == [len(ids_of(pieces[:i]))]
    (whole,) = ask(server, input_ids=[5, 6, 7], max_tokens=3, **asked)
    assert text_of([whole]) == text_of(pieces)
    assert whole.outputs["num_output_tokens"] == [3]


def test_http(server: TritonServer) -> None:
    status, body = generate(server, {"text_input": "Hi", "max_tokens": 5, "stop_words": "", "stream": False})
    assert status == 200
    assert json.loads(body)["text_output"] == text_of(ask(server, text_input="Hi", max_tokens=5))
    # The vLLM backend's way of writing the same.
    assert generate(server, {"text_input": "Hi", "parameters": {"max_tokens": 5}}) == (status, body)
    request = {"text_input": "Hi", "max_tokens": 5, "stream": True, "return_finish_reason": True}
    status, events = generate(server, request, "generate_stream")
    assert status == 200
    assert "length" in events.strip().splitlines()[-1]


def test_messages_go_through_the_chat_template(server: TritonServer) -> None:
    options = {"return_num_input_tokens": True, "exclude_input_in_output": True}
    (chat,) = ask(server, messages='[{"role": "user", "content": "Hello"}]', **options)
    written_out = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    (plain,) = ask(server, text_input=written_out, **options)
    # A plain prompt gets the special token of the post-processor, a chat does not.
    assert chat.outputs["num_input_tokens"] == [plain.outputs["num_input_tokens"][0] - 1]
    with pytest.raises(Refused, match=r"INVALID_ARG: .* tools are not supported"):
        ask(server, messages='[{"role": "tool", "content": "42"}]')


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of text_input, input_ids, messages"),
    ({"text_input": ""}, "text_input is empty"),
    ({"text_input": b"\xff\xfe"}, "not UTF-8"),
    ({"text_input": "a", "messages": "[]"}, "text_input and messages"),
    ({"text_input": "word " * MAX_MODEL_LEN}, "tokens: at most"),
    ({"text_input": "x" * 5_000_000}, "5000000 characters"),
    ({"input_ids": [10**6]}, "made of ids from 0"),
    ({"input_ids": [1] * (MAX_MODEL_LEN + 1)}, "tokens: at most"),
    ({"input_ids": []}, "input_ids is empty"),
    ({"messages": "no json"}, "messages is not valid JSON"),
    ({"text_input": "a", "max_tokens": -1}, "max_tokens is -1"),
    ({"text_input": "a", "temperature": np.nan}, "temperature is nan"),
    ({"text_input": "a", "temperature": np.inf}, "temperature is inf"),
    ({"text_input": "a", "top_p": -1.0}, "top_p is -1.0"),
    ({"text_input": "a", "top_k": -5}, "top_k is -5"),
    ({"text_input": "a", "end_id": 10**6}, "end_id is 1000000"),
    ({"text_input": "a", "stop_words": [b"\xff"]}, "stop_words is not UTF-8"),
    ({"text_input": "a", "seed": 1, "random_seed": 2}, "random_seed is 2"),
    ({"text_input": "a", "sampling_parameters": '{"best_of": 2}'}, "best_of is given"),
    ({"text_input": "a", "sampling_parameters": '{"logits": 2}'}, "unknown key 'logits'"),
    ({"text_input": "a", "beam_width": 4, "temperature": 0.5}, "temperature is given with beam_width 4"),
    ({"text_input": "a", "guided_decoding_guide": "a+"}, "without guided_decoding_guide_type"),
    ({"text_input": "a", "timeout_ms": 0}, "timeout_ms is 0"),
    ({"text_input": "a", "sampling_parameters": "[" * 100_000}, "nested too deeply"),
    ({"text_input": "a", "stream": True, "exclude_input_in_output": False}, "exclude_input_in_output"),
    ({"text_input": "a", "parameters": {"best_of": 4}}, "'best_of' is unknown"),
    (
        {"input_ids": [1], "seed": 5, "sampling_parameters": '{"seed": "six"}'},
        "sampling_parameters.seed is 'six'",
    ),
]
# Triton itself refuses what contradicts config.pbtxt, without a status.
REFUSED_BY_TRITON: list[tuple[dict[str, Any], str]] = [
    ({"text_input": np.array([["a"]], np.object_)}, "shape"),
    ({"text_input": "a", "max_tokens": np.array([1], np.int64)}, "data-type"),
    ({"text_input": "a", "best_of": np.array([1], np.int32)}, "best_of"),
]


def test_bad_requests_are_refused_beside_an_unharmed_stream(server: TritonServer, client: Client) -> None:
    sampling = SamplingOptions(max_tokens=2000)
    expected = client.generate("Hello", sampling=sampling).token_ids
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(lambda: [c.token_ids for c in client.stream("Hello", sampling=sampling)])
        for tensors, message in BAD_REQUESTS:
            with pytest.raises(Refused) as refused:
                ask(server, **tensors)
            code, text = wire.split_error_text(str(refused.value))
            assert code == "INVALID_ARG"
            assert message in text
        for tensors, message in REFUSED_BY_TRITON:
            with pytest.raises(Refused, match=message):
                ask(server, **tensors)
        assert sum(good.result(), ()) == expected


def test_http_refusals(server: TritonServer) -> None:
    status, body = generate(server, {"text_input": "Hi", "max_tokens": 0})
    assert (status, "max_tokens is 0" in body) == (400, True)
    # Keys that are no inputs do not get lost.
    status, body = generate(server, {"text_input": "Hi", "temprature": 1})
    assert (status, "'temprature' is unknown" in body) == (400, True)


def test_requests_on_one_stream_may_share_an_id(server: TritonServer) -> None:
    (expected,) = ask(server, text_input="Hello", max_tokens=30)
    request = infer_request("the same", text_input="Hello", max_tokens=30)
    assert list(stream_infer(server, *[request] * 3)) == [replace(expected, request_id="the same")] * 3


def test_cancelling_frees_what_a_request_holds(client: Client) -> None:
    # Two of these do not fit into the cache together, and no test waits for the end of the first.
    big = [3] * (MAX_MODEL_LEN * 5 // 8)
    endless = SamplingOptions(max_tokens=MAX_MODEL_LEN)
    running = client.stream(input_ids=big, sampling=endless, timeout_s=10 * TIMEOUT_S)
    next(running)
    waiting = client.stream(input_ids=big, sampling=endless, timeout_s=10 * TIMEOUT_S)
    time.sleep(0.2)  # it is in the queue, or the next request overtakes it and proves nothing
    waiting.close()
    # First come, first served: this one is stuck behind `waiting` unless that has left the queue.
    small = client.generate("Hello", sampling=SamplingOptions(max_tokens=3), timeout_s=TIMEOUT_S)
    assert len(small.token_ids) == 3
    assert next(running).finish_reason is None
    running.close()
    after = client.generate(input_ids=big, sampling=SamplingOptions(max_tokens=3), timeout_s=TIMEOUT_S)
    assert len(after.token_ids) == 3


def test_64_streams_at_once_equal_each_alone(client: Client) -> None:
    params = [SamplingOptions(max_tokens=40, temperature=i % 2 * 0.9, seed=i) for i in range(64)]

    def stream(i: int) -> tuple[str, list[int]]:
        chunks = list(client.stream(f"prompt {i}", sampling=params[i]))
        return "".join(chunk.text for chunk in chunks), [t for chunk in chunks for t in chunk.token_ids]

    alone = [stream(i) for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(stream, range(64))) == alone


def test_a_killed_engine_fails_its_requests_and_comes_back(
    server: TritonServer, repository: Path, find_engines: FindEngines
) -> None:
    expected = ask(server, text_input="Hello")
    refusals: list[str] = []
    endless = infer_request(text_input="Hello", max_tokens=MAX_MODEL_LEN, stream=True)
    running = stream_infer(server, endless)
    next(running)
    (engine,) = find_engines(repository)
    engine.kill()
    with pytest.raises(Refused, match=r"INTERNAL: the engine process died \(signal SIGKILL\)"):
        list(running)
    deadline = time.monotonic() + TIMEOUT_S
    answer: list[Response] = []
    while not answer and time.monotonic() < deadline:
        try:
            answer = ask(server, text_input="Hello")
        except Refused as refused:
            refusals.append(str(refused))
            time.sleep(0.05)
    assert answer == expected
    assert all(refusal.startswith("UNAVAILABLE: the engine died") for refusal in refusals)
