"""Many gRPC streams on a real tritonserver serving SmolLM2-135M in float32."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from trtforge.client.streaming import Client, SamplingOptions

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
def url(demo_repository: Path, triton_server) -> str:
    return triton_server(demo_repository).grpc_url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture(scope="module")
def alone(client: Client) -> list[str]:
    return [client.generate(question(i), sampling=options(i)).text for i in range(STREAMS)]


def stream_text(client: Client, i: int) -> str:
    return "".join(chunk.text for chunk in client.stream(question(i), sampling=options(i)))


def test_64_streams_equal_the_same_requests_alone(client: Client, alone: list[str]) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        together = list(pool.map(lambda i: stream_text(client, i), range(STREAMS)))
    assert together == alone


def test_half_of_64_cancelled_leaves_the_rest_unharmed(url: str, client: Client, alone: list[str]) -> None:
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
