"""Starting and stopping a real tritonserver, from Python and from the command line."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from trtforge.client.streaming import Client
from trtforge.client.triton_server import Ports, TritonServer
from trtforge.errors import ConfigError, ServerError

pytestmark = pytest.mark.e2e

FREE_PORTS = Ports(http=0, grpc=0, metrics=0)
ENDLESS = json.dumps({"count": 100_000, "delay_ms": 5})
ANY_FREE = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
TRTFORGE = (sys.executable, "-m", "trtforge")

MakeRepository = Callable[..., Path]


@dataclass(frozen=True)
class Footprint:
    """What a running server consists of outside this process."""

    server: psutil.Process
    processes: list[psutil.Process]  # the server's, its guard and its stubs
    shm_prefix: str

    @property
    def shm_regions(self) -> list[Path]:
        return list(Path("/dev/shm").glob(f"{self.shm_prefix}*"))

    def assert_gone(self) -> None:
        _, alive = psutil.wait_procs(self.processes, timeout=30)
        assert alive == []
        assert self.shm_regions == []


def footprint(repository: Path, owner: psutil.Process | None = None) -> Footprint:
    """The server of `repository` that `owner`, by default this process, has started."""
    descendants = (owner or psutil.Process()).children(recursive=True)
    (server,) = (
        process
        for process in descendants
        if process.name() == "tritonserver" and f"--model-repository={repository}" in process.cmdline()
    )
    prefix = re.search(r"shm-region-prefix-name=(\S+)", " ".join(server.cmdline()))
    assert prefix is not None
    return Footprint(server, [server, server.parent(), *server.children(recursive=True)], prefix[1])


# --------------------------------------------------------------------------- from Python


def test_nothing_but_the_log_stays_behind(make_scripted_repository: MakeRepository, tmp_path: Path) -> None:
    repository = make_scripted_repository()
    log_file = tmp_path / "server.log"
    server = TritonServer(repository, ports=FREE_PORTS, log_file=log_file)
    with server, Client(server.grpc_url) as client:
        assert client.generate("hi").text == "hi "
        running = footprint(repository)
        assert len(running.processes) == 3
        assert running.shm_regions
        work_folders = [Path(a) for p in running.processes for a in p.cmdline() if "trtforge-server-" in a]
    running.assert_gone()
    assert not any(folder.exists() for folder in work_folders)
    assert "successfully loaded 'llm'" in log_file.read_text()
    assert "All models are stopped" in log_file.read_text()


def test_the_model_runs_in_this_environment(scripted_server: TritonServer) -> None:
    with Client(scripted_server.grpc_url) as client:
        assert json.loads(client.generate('{"python": true}').text) == [sys.version, sys.prefix]


def test_requests_past_the_exit_timeout_are_ended(make_scripted_repository: MakeRepository) -> None:
    repository = make_scripted_repository()
    with TritonServer(repository, ports=FREE_PORTS, exit_timeout_s=1) as server:
        client = Client(server.grpc_url)
        stream = client.stream(ENDLESS)
        next(stream)
        running = footprint(repository)
    with pytest.raises(ServerError), client:
        list(stream)
    running.assert_gone()


@pytest.mark.parametrize(
    ("start_up", "message"),
    [
        ("fail", "the weights are made of cheese"),
        ("hang", "not up after 3 s"),
        ("refuse", "failed its first request.*no answer before tea"),
    ],
)
def test_a_model_that_does_not_work_fails_the_start(
    make_scripted_repository: MakeRepository, start_up: str, message: str
) -> None:
    repository = make_scripted_repository(start_up)
    timeout_s = 3.0 if start_up == "hang" else 60.0
    server = TritonServer(repository, ports=FREE_PORTS, start_timeout_s=timeout_s, exit_timeout_s=1)
    with pytest.raises(ServerError, match=message), server:
        pass
    assert not any(
        f"{repository}/" in f"{argument}/"
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE  # other tests' servers, killed and not yet waited for
        for argument in child.cmdline()
    )


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_port_in_use_is_named(make_scripted_repository: MakeRepository, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ports = Ports(**{"http": 0, "grpc": 0, "metrics": 0, name: port})
        server = TritonServer(make_scripted_repository(), ports=ports)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--{name}-port"), server:
            pass


def test_a_server_does_not_outlive_its_owner(make_scripted_repository: MakeRepository) -> None:
    repository = make_scripted_repository()
    with serving(repository) as serve:
        running = footprint(repository, psutil.Process(serve.process.pid))
        serve.process.kill()
        running.assert_gone()


def test_a_server_does_not_outlive_its_guard(make_scripted_repository: MakeRepository) -> None:
    repository = make_scripted_repository()
    with TritonServer(repository, ports=FREE_PORTS) as server:
        running = footprint(repository)
        running.server.parent().kill()
        with pytest.raises(ServerError, match="ended with status"):
            server.wait()
    running.assert_gone()


# --------------------------------------------------------------------------- from the command line


@dataclass(frozen=True)
class Serve:
    """A running `trtforge serve` and what it printed until it was ready."""

    process: subprocess.Popen[str]
    ready_message: str

    @property
    def url(self) -> str:
        found = re.search(r"gRPC +(\S+)", self.ready_message)
        assert found is not None, self.ready_message
        return found[1]

    def ask(self, *arguments: str, **kwargs: str) -> subprocess.CompletedProcess[str]:
        command = [*TRTFORGE, "ask", "--url", self.url, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **kwargs)


@contextmanager
def serving(repository: Path) -> Iterator[Serve]:
    process = subprocess.Popen(
        [*TRTFORGE, "serve", str(repository), *ANY_FREE, "--exit-timeout", "1", "--max-restarts", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    try:
        yield Serve(process, "".join(lines))
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def serve(make_scripted_repository: MakeRepository) -> Iterator[Serve]:
    with serving(make_scripted_repository()) as serve:
        yield serve


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_cleanly(make_scripted_repository: MakeRepository, number: signal.Signals) -> None:
    repository = make_scripted_repository()
    with serving(repository) as serve:
        assert "Ready: llm\n" in serve.ready_message
        assert f'trtforge ask "What is the capital of France?" --url {serve.url}\n' in serve.ready_message
        running = footprint(repository, psutil.Process(serve.process.pid))
        serve.process.send_signal(number)
        output, errors = serve.process.communicate(timeout=60)
        assert (serve.process.returncode, output, errors) == (0, "Stopped.\n", "")
        running.assert_gone()


def test_serve_says_when_its_server_dies(make_scripted_repository: MakeRepository) -> None:
    repository = make_scripted_repository()
    with serving(repository) as serve:
        running = footprint(repository, psutil.Process(serve.process.pid))
        running.server.kill()
        _, errors = serve.process.communicate(timeout=60)
        assert serve.process.returncode == 8
        assert errors.startswith("trtforge: error: tritonserver ended with status 137")
        running.assert_gone()


def test_serve_stops_while_it_starts(make_scripted_repository: MakeRepository) -> None:
    repository = make_scripted_repository("hang")
    process = subprocess.Popen(
        [*TRTFORGE, "serve", str(repository), *ANY_FREE, "--exit-timeout", "1", "--max-restarts", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    owner = psutil.Process(process.pid)
    while not any(child.name() == "triton_python_backend_stub" for child in owner.children(recursive=True)):
        assert process.poll() is None
        time.sleep(0.05)
    running = footprint(repository, owner)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.endswith("Stopped.\n")
    running.assert_gone()


def test_ask_prints_the_answer_alone(serve: Serve) -> None:
    answer = serve.ask("--raw", "one two three")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "one two three \n", "")


def test_ask_reads_stdin_and_tells_the_speed(serve: Serve) -> None:
    answer = serve.ask("--raw", "--stats", "-", input="vier fünf\n")
    assert (answer.returncode, answer.stdout) == (0, "vier fünf \n")
    assert re.fullmatch(r"3 tokens in, 2 out; first after \d+ ms, then [\d.]+ tokens/s\n", answer.stderr)


def test_ask_sends_messages_and_options(serve: Serve) -> None:
    answer = serve.ask(
        "hi", "--system", "be kind", "--temperature", "0.5", "--seed", "7", "--max-tokens", "9"
    )
    seen = json.loads(answer.stdout)
    assert json.loads(seen["messages"]) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
    ]
    assert (seen["temperature"], seen["seed"], seen["max_tokens"]) == (0.5, 7, 9)
    assert "top_k" not in seen


def test_ask_says_that_an_answer_is_cut_off(serve: Serve) -> None:
    answer = serve.ask("--raw", "one two three", "--max-tokens", "2")
    assert (answer.returncode, answer.stdout) == (0, "one two \n")
    assert "--max-tokens" in answer.stderr


@pytest.mark.parametrize(("code", "status"), [("INVALID_ARG", 7), ("UNAVAILABLE", 6), ("INTERNAL", 8)])
def test_ask_ends_with_the_error_s_exit_code(serve: Serve, code: str, status: int) -> None:
    answer = serve.ask("--raw", json.dumps({"error": [code, "no way"]}))
    assert answer.returncode == status
    assert re.fullmatch(r"trtforge: error: .*no way\n", answer.stderr)


def test_ctrl_c_cancels_the_question(serve: Serve) -> None:
    asking = subprocess.Popen(
        [*TRTFORGE, "ask", "--raw", ENDLESS, "--url", serve.url, "--max-tokens", "1000000"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert asking.stdout is not None
    assert asking.stdout.read(6) == "w0 w1 "
    asking.send_signal(signal.SIGINT)
    asking.communicate(timeout=60)
    assert asking.returncode == 130
    with Client(serve.url) as client:
        deadline = time.monotonic() + 30
        while json.loads(client.generate('{"report": true}').text) == []:
            assert time.monotonic() < deadline, "the server did not see the cancellation"
            time.sleep(0.02)
