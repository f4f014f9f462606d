"""What clients see when a part of a real server hangs, dies or is stopped, and that it comes back."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from trtforge.client.streaming import Client, SamplingOptions
from trtforge.errors import CapacityError, ServerError, TrtforgeError

pytestmark = pytest.mark.e2e

TIMEOUT_S = 60
NUM_BLOCKS = 8192
MAX_MODEL_LEN = NUM_BLOCKS * 16
ENDLESS = SamplingOptions(max_tokens=100_000)
ONE_TOKEN = SamplingOptions(max_tokens=1)
TRTFORGE = (sys.executable, "-m", "trtforge")
SHM = Path("/dev/shm")
HANGING_ENGINE = Path(__file__).with_name("hanging_engine.py")
HANG = 7
# With the option -X, which nobody reads, the guard knows it for an engine.
USE_HANGING_ENGINE = f"""
import trtforge.runtime.engine.handle
trtforge.runtime.engine.handle.ENGINE_PROGRAM = (
    "-X", "trtforge.runtime.engine.process", {str(HANGING_ENGINE)!r}
)
"""

MakeRepository = Callable[..., Path]


@dataclass
class Served:
    """A running `trtforge serve`."""

    process: subprocess.Popen[str]
    ready_message: str
    repository: Path

    def url(self, name: str) -> str:
        found = re.search(rf"{name} +(\S+)", self.ready_message)
        assert found is not None, self.ready_message
        return found[1]

    def client(self) -> Client:
        return Client(self.url("gRPC"))

    def find(self, what: str) -> psutil.Process:
        """The process with this in its command line: tritonserver, python_backend_stub, engine."""
        descendants = psutil.Process(self.process.pid).children(recursive=True)
        pattern = {"engine": "--model-dir=", "guard": "process_guard"}.get(what, what)
        (found,) = [p for p in descendants if _command(p, what).count(pattern)]
        return found

    def shm_regions(self) -> list[Path]:
        prefix = re.search(r"shm-region-prefix-name=(\S+)", " ".join(self.find("guard").cmdline()))
        assert prefix is not None
        return list(SHM.glob(f"{prefix[1]}*"))

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(self.url("metrics"), timeout=TIMEOUT_S) as page:
            lines = re.findall(r"^trtforge_(\w+)\{.*\} (\S+)$", page.read().decode(), re.MULTILINE)
        return {name: float(value) for name, value in lines}

    def wait_until_idle(self) -> None:
        """Until no request holds anything."""
        idle = {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_free_blocks": NUM_BLOCKS}
        wait_until(lambda: idle.items() <= self.metrics().items())

    def status_of(self, path: str) -> int:
        """HTTP status of a GET; 0 without a server."""
        try:
            with urllib.request.urlopen(self.url("HTTP") + path, timeout=TIMEOUT_S) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


def _command(process: psutil.Process, what: str) -> str:
    try:
        return process.name() if what == "tritonserver" else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@contextmanager
def serving(repository: Path, *options: str) -> Iterator[Served]:
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    process = subprocess.Popen(
        [*TRTFORGE, "serve", str(repository), *ports, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    else:
        raise AssertionError(process.communicate(timeout=TIMEOUT_S))
    try:
        yield Served(process, "".join(lines), repository)
    finally:
        for _ in range(2):
            process.terminate()
            time.sleep(0.1)
        process.communicate(timeout=TIMEOUT_S)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def set_parameters(repository: Path, **parameters: object) -> None:
    path = repository / "llm" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    for name, value in parameters.items():
        config.parameters[name].string_value = str(value)
    path.write_text(text_format.MessageToString(config))


def wait_for_answer(client: Client) -> list[TrtforgeError]:
    """Until the model answers; the errors on the way."""
    errors: list[TrtforgeError] = []

    def answers() -> bool:
        try:
            return bool(client.generate("Hello", sampling=ONE_TOKEN, timeout_s=TIMEOUT_S).token_ids)
        except (CapacityError, ServerError) as error:
            errors.append(error)
            return False

    wait_until(answers)
    return errors


def assert_gone(processes: list[psutil.Process], shm_regions: list[Path]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    assert alive == []
    # The guard removes them, some moments after the last process.
    wait_until(lambda: not any(region.exists() for region in shm_regions))


@pytest.fixture(scope="module")
def repository(make_fake_repository: MakeRepository) -> Path:
    """Requests that no test waits for fit in; a prompt that starts with HANG makes a step hang."""
    repository = make_fake_repository(num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN, max_num_seqs=8)
    set_parameters(repository, step_timeout_s=2, prefix_caching="false")
    model = repository / "llm" / "1" / "model.py"
    model.write_text(model.read_text() + USE_HANGING_ENGINE)
    return repository


@pytest.fixture(scope="module")
def served(repository: Path) -> Iterator[Served]:
    with serving(repository, "--exit-timeout=2", "--max-restarts=9") as served:
        yield served


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
