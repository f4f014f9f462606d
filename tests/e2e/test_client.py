"""The sync and asyncio clients against a real tritonserver whose model does what its prompt says."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from trtforge.client.aio import AsyncClient
from trtforge.client.protocol import Guide
from trtforge.client.streaming import Chunk, Client, RequestOptions, SamplingOptions
from trtforge.client.triton_server import Ports, TritonServer
from trtforge.errors import CapacityError, RequestError, RequestTimeoutError, ServerError, TrtforgeError

pytestmark = pytest.mark.e2e

# A request that only a cancellation ends soon.
ENDLESS = json.dumps({"count": 100_000, "delay_ms": 5})
REQUESTS = 32

Consume = Callable[..., list[Chunk]]


def script(**values: object) -> str:
    return json.dumps(values)


@pytest.fixture(scope="module")
def client(scripted_server: TritonServer) -> Iterator[Client]:
    with Client(scripted_server.grpc_url) as client:
        yield client


def stream_sync(url: str, *args: Any, model: str = "llm", received: list[Chunk], **kwargs: Any) -> None:
    with Client(url, model) as client:
        for chunk in client.stream(*args, **kwargs):
            received.append(chunk)


def stream_async(url: str, *args: Any, model: str = "llm", received: list[Chunk], **kwargs: Any) -> None:
    async def run() -> None:
        async with AsyncClient(url, model) as client:
            async for chunk in client.stream(*args, **kwargs):
                received.append(chunk)

    asyncio.run(run())


both_clients = pytest.mark.parametrize("consume", [stream_sync, stream_async])


def wait_until_cancelled(client: Client, request_id: str) -> None:
    """Until the model has seen it; the model looks before each of its responses."""
    deadline = time.monotonic() + 30
    while request_id not in json.loads(client.generate(script(report=True)).text):
        assert time.monotonic() < deadline, "the server did not see the cancellation"
        time.sleep(0.02)


# --------------------------------------------------------------------------- answers


@both_clients
def test_stream_gives_every_chunk_and_one_finish_reason(scripted_server: TritonServer, consume: Any) -> None:
    chunks: list[Chunk] = []
    consume(scripted_server.grpc_url, "née à Zürich 🦜", received=chunks)
    assert [chunk.text for chunk in chunks] == ["née ", "à ", "Zürich ", "🦜 "]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert [chunk.num_output_tokens for chunk in chunks] == [1, 2, 3, 4]
    assert [chunk.token_ids for chunk in chunks] == [(1,), (2,), (3,), (4,)]
    assert {chunk.num_input_tokens for chunk in chunks} == {3}


def test_generate_gives_the_whole_answer(scripted_server: TritonServer, client: Client) -> None:
    async def run() -> object:
        async with AsyncClient(scripted_server.grpc_url) as client:
            return await client.generate("a b c d", sampling=SamplingOptions(max_tokens=3))

    completion = client.generate("a b c d", sampling=SamplingOptions(max_tokens=3))
    assert (completion.text, completion.finish_reason) == ("a b c ", "length")
    assert asyncio.run(run()) == completion


def test_chunks_come_before_the_answer_is_complete(client: Client) -> None:
    with client.stream(ENDLESS) as stream:
        assert [next(stream).text, next(stream).text] == ["w0 ", "w1 "]


def test_every_option_arrives_in_its_tensor(client: Client) -> None:
    sampling = SamplingOptions(
        max_tokens=17,
        min_tokens=3,
        temperature=0.75,
        top_k=40,
        top_p=0.95,
        min_p=0.0625,
        typical_p=0.5,
        repetition_penalty=1.25,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        no_repeat_ngram_size=3,
        bad_words=("böse", "x"),
        seed=2**64 - 1,
        stop_words=("\n\n", "Ende — 終"),
        end_id=2,
        n=1,
        beam_width=1,
        length_penalty=0.5,
        guide=Guide("regex", "[ab]+"),
        ignore_eos=True,
        stop_token_ids=(5, 6),
        logit_bias={7: -1.5},
        logprobs=2,
        prompt_logprobs=1,
    )
    options = RequestOptions(priority=-3, timeout_ms=60_000, cache_salt="ä")
    seen = json.loads(client.generate(script(echo=True), sampling=sampling, options=options).text)
    del seen["text_input"]
    assert json.loads(seen.pop("sampling_parameters")) == {
        "ignore_eos": True,
        "stop_token_ids": [5, 6],
        "logit_bias": {"7": -1.5},
        "logprobs": 2,
        "prompt_logprobs": 1,
    }
    assert seen == {
        "max_tokens": 17,
        "min_tokens": 3,
        "temperature": 0.75,
        "top_k": 40,
        "top_p": float(np.float32(0.95)),
        "min_p": 0.0625,
        "typical_p": 0.5,
        "repetition_penalty": 1.25,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "no_repeat_ngram_size": 3,
        "bad_words": ["böse", "x"],
        "seed": 2**64 - 1,
        "stop_words": ["\n\n", "Ende — 終"],
        "end_id": 2,
        "num_return_sequences": 1,
        "beam_width": 1,
        "length_penalty": 0.5,
        "guided_decoding_guide_type": "regex",
        "guided_decoding_guide": "[ab]+",
        "priority": -3,
        "timeout_ms": 60_000,
        "cache_salt": "ä",
        "stream": False,
        "exclude_input_in_output": True,
        "return_cumulative_logprob": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_num_cached_tokens": True,
    }


def test_messages_and_token_ids_arrive(client: Client) -> None:
    messages = [{"role": "system", "content": "Sei höflich."}, {"role": "user", "content": "hi"}]
    seen = json.loads(client.generate(messages=messages).text)
    assert json.loads(seen["messages"]) == messages
    assert "text_input" not in seen
    seen = json.loads(client.generate(input_ids=np.array([5, 6, 7])).text)
    assert seen["input_ids"] == [5, 6, 7]


@both_clients
def test_huge_answers(scripted_server: TritonServer, consume: Any) -> None:
    big = "ü" * 4_000_000  # 8 MB, twice what gRPC takes unless told
    chunks: list[Chunk] = []
    consume(scripted_server.grpc_url, script(words=[big, "end"]), received=chunks)
    assert [chunk.text == big for chunk in chunks] == [True, False]
    chunks.clear()
    consume(scripted_server.grpc_url, script(count=3000), received=chunks)
    assert "".join(chunk.text for chunk in chunks) == "".join(f"w{i} " for i in range(3000))


def test_threads_share_a_client(client: Client) -> None:
    def run(i: int) -> str:
        request = script(words=[f"{i}.{k} " for k in range(20)], delay_ms=1)
        return "".join(chunk.text for chunk in client.stream(request))

    with ThreadPoolExecutor(REQUESTS) as pool:
        texts = list(pool.map(run, range(REQUESTS)))
    assert texts == ["".join(f"{i}.{k} " for k in range(20)) for i in range(REQUESTS)]


def test_tasks_share_a_client(scripted_server: TritonServer) -> None:
    async def run() -> list[str]:
        async with AsyncClient(scripted_server.grpc_url) as client:

            async def one(i: int) -> str:
                request = script(words=[f"{i}.{k} " for k in range(20)], delay_ms=1)
                return "".join([chunk.text async for chunk in client.stream(request)])

            return await asyncio.gather(*(one(i) for i in range(REQUESTS)))

    assert asyncio.run(run()) == ["".join(f"{i}.{k} " for k in range(20)) for i in range(REQUESTS)]


# --------------------------------------------------------------------------- ends, good and bad


@both_clients
@pytest.mark.parametrize(("end", "timeout_s"), [("separate", 60), ("no_final", 0.5)])
def test_an_answer_with_its_finish_reason_is_complete(
    scripted_server: TritonServer, consume: Any, end: str, timeout_s: float
) -> None:
    chunks: list[Chunk] = []
    request = script(words=["a ", "b"], end=end)
    consume(scripted_server.grpc_url, request, timeout_s=timeout_s, received=chunks)
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("a ", None), ("b", "stop")]


@both_clients
def test_a_stream_that_ends_without_finish_reason_is_an_error(
    scripted_server: TritonServer, consume: Any
) -> None:
    chunks: list[Chunk] = []
    with pytest.raises(ServerError, match="incomplete"):
        consume(scripted_server.grpc_url, script(words=["a ", "b"], end="sudden"), received=chunks)
    assert [chunk.text for chunk in chunks] == ["a ", "b"]


@both_clients
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("INVALID_ARG", RequestError),
        ("UNAVAILABLE", CapacityError),
        ("TIMEOUT", RequestTimeoutError),
        ("INTERNAL", ServerError),
        ("NOT_FOUND", ServerError),
        ("CANCELLED", ServerError),  # must not look as if the task had been cancelled
    ],
)
def test_errors_of_the_model(
    scripted_server: TritonServer, consume: Any, code: str, error: type[TrtforgeError]
) -> None:
    chunks: list[Chunk] = []
    with pytest.raises(TrtforgeError, match="no way") as raised:
        consume(scripted_server.grpc_url, script(words=["a", "b"], error=[code, "no way"]), received=chunks)
    assert type(raised.value) is error
    assert [chunk.text for chunk in chunks] == ["a", "b"]


@both_clients
def test_unknown_model(scripted_server: TritonServer, consume: Any) -> None:
    with pytest.raises(ServerError, match="nobody"):
        consume(scripted_server.grpc_url, "hi", model="nobody", received=[])


@both_clients
def test_no_server_is_named_by_its_url(consume: Any) -> None:
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:1:"):
        consume("127.0.0.1:1", "hi", received=[])


@both_clients
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"prompt": "a", "input_ids": [1]}, "exactly one"),
        ({"prompt": "half a pair \ud800"}, "text_input"),
        ({"input_ids": [2**31]}, "input_ids"),
        ({"prompt": "a", "sampling": SamplingOptions(seed=-1)}, "seed"),
        ({"prompt": "a", "sampling": SamplingOptions(max_tokens=2**31)}, "max_tokens"),
        ({"prompt": "a", "sampling": SamplingOptions(logit_bias={1: b"x"})}, "sampling_parameters"),  # type: ignore[dict-item]
        ({"prompt": "a", "options": RequestOptions(priority=2**31)}, "priority"),
        ({"prompt": "a", "sampling": SamplingOptions(temperature="hot")}, "temperature"),  # type: ignore[arg-type]
    ],
)
def test_values_that_no_tensor_holds(
    scripted_server: TritonServer, consume: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        consume(scripted_server.grpc_url, received=[], **arguments)


# --------------------------------------------------------------------------- cancellation


def test_close_and_leaving_cancel(client: Client) -> None:
    stream = client.stream(ENDLESS, request_id="closed")
    next(stream)
    stream.close()
    assert next(stream, None) is None
    wait_until_cancelled(client, "closed")
    with client.stream(ENDLESS, request_id="left") as stream:
        next(stream)
    wait_until_cancelled(client, "left")


def test_dropping_the_iterator_cancels(client: Client) -> None:
    for chunk in client.stream(ENDLESS, request_id="dropped"):
        assert chunk.text == "w0 "
        break
    wait_until_cancelled(client, "dropped")


def test_another_thread_closes(client: Client) -> None:
    stream = client.stream(script(count=2, delay_ms=60_000), request_id="by thread")
    threading.Timer(0.2, stream.close).start()
    assert list(stream) == []


def test_closing_the_client_cancels_and_says_so(scripted_server: TritonServer, client: Client) -> None:
    other = Client(scripted_server.grpc_url)
    stream = other.stream(ENDLESS, request_id="client closed")
    next(stream)
    other.close()
    with pytest.raises(ServerError):
        list(stream)
    wait_until_cancelled(client, "client closed")


def test_async_cancellation(scripted_server: TritonServer, client: Client) -> None:
    async def consume(client: AsyncClient, request_id: str) -> None:
        async for _ in client.stream(ENDLESS, request_id=request_id):
            pass

    async def run() -> None:
        async with AsyncClient(scripted_server.grpc_url) as client:
            task = asyncio.create_task(consume(client, "task"))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(consume(client, "wait_for"), 0.1)
            generated = client.generate(script(count=1, delay_ms=500), request_id="generate")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(generated, 0.1)
            async with client.stream(ENDLESS, request_id="async left") as stream:
                assert (await anext(stream)).text == "w0 "
            async for _ in client.stream(ENDLESS, request_id="async dropped"):
                break
            unfinished = client.stream(ENDLESS, request_id="async client closed")
            await anext(unfinished)
        with pytest.raises(ServerError):
            await anext(unfinished)

    asyncio.run(run())
    for request_id in ("task", "wait_for", "generate", "async left", "async dropped", "async client closed"):
        wait_until_cancelled(client, request_id)


@both_clients
def test_timeout_cancels(scripted_server: TritonServer, client: Client, consume: Any) -> None:
    request_id = f"timeout {consume.__name__}"
    with pytest.raises(RequestTimeoutError, match="timeout"):
        consume(scripted_server.grpc_url, ENDLESS, timeout_s=0.3, request_id=request_id, received=[])
    wait_until_cancelled(client, request_id)


# --------------------------------------------------------------------------- a server that dies


@both_clients
def test_a_killed_server_ends_its_streams(
    make_scripted_repository: Callable[..., Path], consume: Any
) -> None:
    repository = make_scripted_repository()
    chunks: list[Chunk] = []
    with (
        TritonServer(repository, ports=Ports(http=0, grpc=0, metrics=0)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        consumer = pool.submit(consume, server.grpc_url, ENDLESS, timeout_s=60, received=chunks)
        while not chunks:
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            if process.name() == "tritonserver" and f"--model-repository={repository}" in process.cmdline():
                process.kill()
        with pytest.raises(ServerError, match=f"no connection to a server at {server.grpc_url}"):
            consumer.result()
