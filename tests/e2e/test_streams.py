"""Many gRPC streams on a real tritonserver serving SmolLM2-135M in float32."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trtforge.client.streaming import Client, SamplingOptions
from trtforge.client.triton_server import TritonServer

TOPICS = ("rivers", "the moon", "bread", "old maps", "bees", "rain", "chess", "glass")
STREAMS = 64

pytestmark = pytest.mark.e2e


def question(i: int) -> str:
    return f"Question {i}: tell me something about {TOPICS[i % len(TOPICS)]}."


def options(i: int) -> SamplingOptions:
    # Every second stream samples: its seed alone decides, not its batch mates.
    if i % 2:
        return SamplingOptions(max_tokens=24, temperature=0.8, top_p=0.95, seed=i)
    return SamplingOptions(max_tokens=24)


@pytest.fixture(scope="module")
def server(demo_repository: Path, triton_server: Callable[[Path], TritonServer]) -> TritonServer:
    return triton_server(demo_repository)


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def alone(client: Client) -> list[str]:
    return [client.generate(question(i), sampling=options(i)).text for i in range(STREAMS)]


def gauge(server: TritonServer, name: str) -> float:
    text = urllib.request.urlopen(server.metrics_url).read().decode()
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name + "{")))


def free_blocks_when_idle(server: TritonServer) -> float:
    deadline = time.monotonic() + 30
    while gauge(server, "trtforge_num_requests_running") + gauge(server, "trtforge_num_requests_waiting"):
        assert time.monotonic() < deadline, "requests are left although all clients have gone"
        time.sleep(0.1)
    return gauge(server, "trtforge_kv_cache_free_blocks")


def stream_text(client: Client, i: int) -> str:
    return "".join(chunk.text for chunk in client.stream(question(i), sampling=options(i)))


def test_64_streams_equal_the_same_requests_alone(client: Client, alone: list[str]) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        together = list(pool.map(lambda i: stream_text(client, i), range(STREAMS)))
    assert together == alone


def test_half_of_64_cancelled_leaves_the_rest_unharmed(
    server: TritonServer, client: Client, alone: list[str]
) -> None:
    num_free_blocks = free_blocks_when_idle(server)
    moments = random.Random(7)
    cancel_after = {i: moments.randrange(0, 20) for i in range(0, STREAMS, 2)}
    started = threading.Barrier(STREAMS)

    def run(i: int) -> str | None:
        started.wait()
        if i not in cancel_after:
            return stream_text(client, i)
        chunks = client.stream(question(i), sampling=options(i))
        time.sleep(cancel_after[i] / 10)
        for _ in range(cancel_after[i] % 5):
            next(chunks, None)
        chunks.close()
        return None

    with ThreadPoolExecutor(STREAMS) as pool:
        texts = list(pool.map(run, range(STREAMS)))
    assert [t for i, t in enumerate(texts) if i not in cancel_after] == [
        t for i, t in enumerate(alone) if i not in cancel_after
    ]
    assert free_blocks_when_idle(server) == num_free_blocks
