"""What clients see when a part of a real server dies or is stopped, and that it comes back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from asking import ONE_TOKEN, wait_for_answer, wait_until
from faults.servers import (
    ENDLESS,
    TIMEOUT_S,
    TRTFORGE,
    MakeRepository,
    Served,
    assert_gone,
    serving,
)

from trtforge.client.streaming import SamplingOptions
from trtforge.errors import CapacityError, ServerError

pytestmark = pytest.mark.e2e


# --------------------------------------------------------------------------- the server


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_stub_is_replaced(repository: Path, number: signal.Signals) -> None:
    with serving(repository) as served, served.client() as client:
        stream = client.stream("Hello", sampling=ENDLESS)
        next(stream)
        processes = [served.find(name) for name in ("tritonserver", "python_backend_stub", "engine")]
        regions = served.shm_regions()
        os.kill(served.find("python_backend_stub").pid, number)
        with pytest.raises(ServerError):
            list(stream)
        assert_gone(processes, regions)
        wait_for_answer(client)
        process = served.process
        process.terminate()
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    # Now and then the server does notice: it aborts.
    assert re.match(r"trtforge: (model 'llm' is dead: |tritonserver ended)", errors), errors
    assert "\nrestart 1 of 5" in errors
    assert "the server answers again" in errors


def test_a_model_that_no_longer_answers_is_replaced(make_scripted_repository: MakeRepository) -> None:
    # The second request is the first probe.
    with serving(make_scripted_repository("once"), "--hang-timeout=2", "--exit-timeout=1") as served:
        assert "'llm' is dead: it neither answered nor worked for" in _line(served.process)
        assert "restart 1 of 5" in _line(served.process)
        assert "answers again" in _line(served.process)


def test_a_killed_server_is_replaced(served: Served) -> None:
    regions = served.shm_regions()
    processes = [served.find(name) for name in ("tritonserver", "python_backend_stub", "engine")]
    assert regions
    with served.client() as client:
        processes[0].kill()
        assert_gone(processes, regions)
        wait_for_answer(client)


def test_a_busy_server_is_left_alone(served: Served) -> None:
    server = served.find("tritonserver")
    with served.client() as client:
        streams = [client.stream("Hello", sampling=ENDLESS) for _ in range(30)]
        next(streams[0])
        time.sleep(15)  # longer than a probe waits
        assert next(streams[0]).token_ids
        for stream in streams:
            stream.close()
    assert served.find("tritonserver") == server


# --------------------------------------------------------------------------- the end


def test_requests_in_flight_finish_or_fail_clearly(repository: Path) -> None:
    """Within the exit timeout a short one finishes, a long one is told at its end; new ones are refused."""
    with serving(repository, "--exit-timeout=6") as served, served.client() as client:
        processes = [served.find(name) for name in ("guard", "tritonserver", "python_backend_stub", "engine")]
        regions = served.shm_regions()
        short = client.stream("Hello", sampling=SamplingOptions(max_tokens=600))
        long = client.stream("Hello", sampling=ENDLESS)
        next(short), next(long)
        assert served.status_of("/v2/health/ready") == 200
        served.process.terminate()
        wait_until(lambda: served.status_of("/v2/health/ready") != 200)
        with pytest.raises(ServerError):
            client.generate("Hello", sampling=ONE_TOKEN, timeout_s=TIMEOUT_S)
        assert list(short)[-1].finish_reason == "length"
        with pytest.raises(CapacityError, match="the engine was shut down before the request had finished"):
            list(long)
        output, errors = served.process.communicate(timeout=TIMEOUT_S)
        assert (served.process.returncode, output, errors) == (0, "Stopped.\n", "")
        assert_gone(processes, regions)


def test_a_second_signal_stops_at_once(repository: Path) -> None:
    with serving(repository, "--exit-timeout=600") as served, served.client() as client:
        processes = [served.find(name) for name in ("guard", "tritonserver", "python_backend_stub", "engine")]
        regions = served.shm_regions()
        stream = client.stream("Hello", sampling=ENDLESS)
        next(stream)
        served.process.terminate()
        wait_until(lambda: served.status_of("/v2/health/ready") != 200)
        assert served.process.poll() is None
        served.process.terminate()
        with pytest.raises(ServerError):
            list(stream)
        output, _ = served.process.communicate(timeout=TIMEOUT_S)
        assert (served.process.returncode, output) == (0, "Stopped.\n")
        assert_gone(processes, regions)


def test_a_killed_launcher_takes_everything_along(repository: Path) -> None:
    with serving(repository, "--exit-timeout=1") as served, served.client() as client:
        processes = [served.find(name) for name in ("guard", "tritonserver", "python_backend_stub", "engine")]
        regions = served.shm_regions()
        stream = client.stream("Hello", sampling=ENDLESS)
        next(stream)
        served.process.kill()
        with pytest.raises(CapacityError, match="shut down"):
            list(stream)
        assert_gone(processes, regions)


def test_restarts_are_bounded(repository: Path) -> None:
    with serving(repository, "--max-restarts=1") as served, served.client() as client:
        served.find("tritonserver").kill()
        wait_until(lambda: "answers again" in _line(served.process))
        wait_for_answer(client)
        served.find("tritonserver").kill()
        _, errors = served.process.communicate(timeout=TIMEOUT_S)
        assert served.process.returncode == 8
        assert "error: tritonserver ended with status 137" in errors


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


def test_health_without_a_server() -> None:
    command = [*TRTFORGE, "health", "--url", "127.0.0.1:1", "--timeout", "2"]
    unhealthy = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert unhealthy.returncode == 8
