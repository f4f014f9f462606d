"""What clients see when a real server's engine hangs or dies, and what it keeps of clients that leave."""

from __future__ import annotations

import http.client
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from asking import ONE_TOKEN, wait_for_answer, wait_until
from faults.servers import (
    ENDLESS,
    MAX_MODEL_LEN,
    TIMEOUT_S,
    TRTFORGE,
    Served,
)

from trtforge.client.streaming import Client
from trtforge.errors import ServerError

pytestmark = pytest.mark.e2e

HANG = 7


# --------------------------------------------------------------------------- the engine


def test_a_step_that_hangs_is_ended(served: Served) -> None:
    with served.client() as client, client.stream("Hello", sampling=ENDLESS) as other:
        next(other)
        with pytest.raises(ServerError, match="a step took longer than 2 s"):
            client.generate(input_ids=[HANG, 1], sampling=ONE_TOKEN, timeout_s=TIMEOUT_S)
        with pytest.raises(ServerError, match="a step took longer than 2 s"):
            list(other)
        errors = wait_for_answer(client)
    assert all("the engine died and is being restarted" in str(error) for error in errors)


def test_a_killed_engine_under_load(served: Served) -> None:
    """All requests, running and queued, fail with the reason; readiness follows."""
    failures: list[str] = []

    def ask(client: Client) -> None:
        with pytest.raises(ServerError) as failure:
            list(client.stream("Hello", sampling=ENDLESS))
        failures.append(str(failure.value))

    with served.client() as client, ThreadPoolExecutor(24) as pool:
        asking = [pool.submit(ask, client) for _ in range(24)]
        wait_until(lambda: served.metrics()["num_requests_waiting"] == 16)
        served.find("engine").kill()
        for future in asking:
            future.result()
        wait_until(lambda: served.metrics()["engine_ready"] == 0)
        assert health(served).returncode == 6 or served.metrics()["engine_ready"] == 1
        wait_for_answer(client)
    assert len(failures) == 24
    assert all("the engine process died (signal SIGKILL)" in failure for failure in failures)
    wait_until(lambda: served.metrics()["engine_ready"] == 1)
    healthy = health(served)
    assert (healthy.returncode, healthy.stdout) == (0, "Healthy: llm\n")


def health(served: Served, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*TRTFORGE, "health", "--url", served.url("gRPC"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


# --------------------------------------------------------------------------- clients that leave


def test_cancelled_requests_leave_the_engine(served: Served) -> None:
    """Queued, while they decode, and by closing the connection."""
    with served.client() as client:
        running = [client.stream("Hello", sampling=ENDLESS) for _ in range(8)]
        for stream in running:
            next(stream)
        queued = client.stream("Hello", sampling=ENDLESS)
        wait_until(lambda: served.metrics()["num_requests_waiting"] == 1)
        queued.close()
        wait_until(lambda: served.metrics()["num_requests_waiting"] == 0)
        for stream in running[:4]:
            stream.close()
        wait_until(lambda: served.metrics()["num_requests_running"] == 4)
    served.wait_until_idle()


def test_a_prefill_is_cancelled_between_its_chunks(served: Served) -> None:
    with served.client() as client:
        # In 1024 tokens a step: hundreds of steps without an output.
        prompt = [3] * (MAX_MODEL_LEN - 10)
        stream = client.stream(input_ids=prompt, sampling=ONE_TOKEN)
        wait_until(lambda: served.metrics()["num_requests_running"] == 1)
        stream.close()
        served.wait_until_idle()


def test_a_finished_request_holds_nothing(served: Served) -> None:
    with served.client() as client:
        stream = client.stream("Hello", sampling=ONE_TOKEN)
        next(stream)
    served.wait_until_idle()


def test_an_http_client_that_leaves_after_the_first_token(served: Served) -> None:
    connection = http.client.HTTPConnection(served.url("HTTP").removeprefix("http://"), timeout=TIMEOUT_S)
    body = {"text_input": "Hello", "max_tokens": 100_000, "stream": True}
    connection.request("POST", "/v2/models/llm/generate_stream", json.dumps(body))
    assert connection.getresponse().readline().startswith(b"data: ")
    connection.close()
    served.wait_until_idle()
