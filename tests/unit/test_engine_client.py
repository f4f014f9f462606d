"""The engine client with a real engine process behind it, which runs the fake executor."""

from __future__ import annotations

import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, ConfigError, RequestError, ServerError
from trtforge.manifest import Manifest, Rank
from trtforge.runtime.engine.client import EngineClient
from trtforge.runtime.outputs import GenerationOutput
from trtforge.runtime.request import GenerationRequest, SamplingParams

TIMEOUT_S = 30
GREEDY = SamplingParams(max_tokens=24)
ENDLESS = SamplingParams(max_tokens=100_000)

Start = Callable[..., EngineClient]
FindEngines = Callable[..., list[psutil.Process]]


class Answer:
    """Collects the outputs of one request."""

    def __init__(self) -> None:
        self.outputs: list[GenerationOutput] = []
        self.started = threading.Event()
        self._finished = threading.Event()

    def __call__(self, output: GenerationOutput) -> None:
        self.outputs.append(output)
        self.started.set()
        if output.finish_reason is not None:
            self._finished.set()

    def last(self) -> GenerationOutput:
        assert self._finished.wait(TIMEOUT_S), "no last output"
        return self.outputs[-1]

    def text(self) -> str:
        assert self.last().error is None
        return "".join(output.text for output in self.outputs)

    def token_ids(self) -> list[int]:
        self.last()
        return [token_id for output in self.outputs for token_id in output.token_ids]


def submit(
    client: EngineClient, prompt: str | tuple[int, ...], sampling: SamplingParams = GREEDY, name: str = "a"
) -> Answer:
    answer = Answer()
    client.submit(GenerationRequest(name, prompt, sampling), answer)
    return answer


@pytest.fixture
def start() -> Iterator[Start]:
    clients = []

    def start(repository: Path) -> EngineClient:
        client = EngineClient(repository / "llm" / "1", EngineOptions())
        clients.append(client)
        client.start()
        return client

    yield start
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def client(fake_repository: Path) -> Iterator[EngineClient]:
    """One for all tests that leave it as it was."""
    client = EngineClient(fake_repository / "llm" / "1", EngineOptions())
    client.start()
    yield client
    client.close()


@pytest.fixture(scope="module")
def long_repository(make_fake_repository: Callable[..., Path]) -> Path:
    """Room for a request that no test waits for."""
    return make_fake_repository(num_blocks=8192, max_model_len=8192 * 16)


def test_text_and_tokens(client: EngineClient) -> None:
    answer = submit(client, "早上好, world")
    last = answer.last()
    assert last.finish_reason == "length"
    assert last.num_prompt_tokens == len(client.tokenizer.encode("早上好, world"))
    assert [output.num_generated_tokens for output in answer.outputs] == list(range(1, 25))
    assert [output.finish_reason for output in answer.outputs[:-1]] == [None] * 23
    assert answer.text() == client.tokenizer.decode(answer.token_ids())


def test_token_ids_as_prompt(client: EngineClient) -> None:
    prompt = client.tokenizer.encode("Hello")
    assert submit(client, prompt).token_ids() == submit(client, "Hello", name="b").token_ids()


def test_many_at_once_equal_each_alone(client: EngineClient) -> None:
    params = [replace(GREEDY, temperature=i % 2 * 0.9, seed=i) for i in range(32)]
    alone = [submit(client, f"prompt {i}", params[i]).text() for i in range(32)]
    together = [submit(client, f"prompt {i}", params[i], name=str(i)) for i in range(32)]
    assert [answer.text() for answer in together] == alone


def test_without_a_seed_every_request_differs(client: EngineClient) -> None:
    sampling = replace(GREEDY, temperature=1.0)
    assert submit(client, "Hello", sampling).token_ids() != submit(client, "Hello", sampling).token_ids()


def test_stop_string(client: EngineClient) -> None:
    whole = submit(client, "Hello").text()
    stop = whole[5:8]
    answer = submit(client, "Hello", replace(ENDLESS, stop=("never found", stop)))
    assert answer.text() == whole[: whole.index(stop)]
    assert answer.last().finish_reason == "stop"


def test_stop_token_is_no_text(client: EngineClient) -> None:
    token_ids = submit(client, "Hello").token_ids()
    stop_token_id = token_ids[9]
    end = token_ids.index(stop_token_id)
    answer = submit(client, "Hello", replace(ENDLESS, stop_token_ids=(stop_token_id,)))
    assert answer.text() == client.tokenizer.decode(token_ids[:end])
    assert answer.token_ids() == token_ids[: end + 1]
    assert answer.last().finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "mentioned"),
    [
        ("", "empty"),
        ((), "empty"),
        ("word " * 511, r"tokens: at most 511"),
        ("x" * 10_000_000, "10000000 characters"),
        ((1,) * 512, "512 tokens: at most 511"),
        ((1, 10**6), "1000000: allowed are 0 to"),
        ((-1, 1), "-1: allowed are 0 to"),
    ],
)
def test_bad_prompts(client: EngineClient, prompt: str | tuple[int, ...], mentioned: str) -> None:
    with pytest.raises(RequestError, match=mentioned):
        submit(client, prompt)


def test_what_the_core_refuses_ends_the_request(client: EngineClient) -> None:
    last = submit(client, "Hello", replace(GREEDY, top_p=7.0)).last()
    assert (last.finish_reason, last.error_kind) == ("error", "request")
    assert "top_p" in str(last.error)


def test_an_id_in_use_is_refused(start: Start, long_repository: Path) -> None:
    client = start(long_repository)
    submit(client, "Hello", ENDLESS)
    with pytest.raises(RequestError, match="'a' is in use"):
        submit(client, "Hello")


def test_cancel(start: Start, long_repository: Path) -> None:
    client = start(long_repository)
    running, other = submit(client, "Hello", ENDLESS, "running"), submit(client, "Hello", ENDLESS, "other")
    assert running.started.wait(TIMEOUT_S)
    client.cancel("running")
    client.cancel("unknown")
    assert running.last().finish_reason == "cancelled"
    client.cancel("running")
    assert other.started.wait(TIMEOUT_S)
    assert other.outputs[-1].finish_reason is None
    client.cancel("other")
    assert other.last().finish_reason == "cancelled"


def test_a_callback_that_raises_harms_only_its_own_request(client: EngineClient) -> None:
    expected = submit(client, "Hello", name="before").text()
    calls: queue.SimpleQueue[GenerationOutput] = queue.SimpleQueue()

    def broken(output: GenerationOutput) -> None:
        calls.put(output)
        raise OSError("the receiver is gone")

    client.submit(GenerationRequest("broken", "Hello", GREEDY), broken)
    assert submit(client, "Hello", name="good").text() == expected
    assert calls.qsize() == 1
    # Its id is free again: the engine was told.
    assert submit(client, "Hello", name="broken").text() == expected


def test_when_the_engine_dies_requests_fail_and_it_comes_back(
    start: Start, long_repository: Path, find_engines: FindEngines
) -> None:
    client = start(long_repository)
    expected = submit(client, "Hello").text()
    refused: list[Exception] = []

    class Resubmit(Answer):
        def __call__(self, output: GenerationOutput) -> None:
            if output.finish_reason is not None:
                try:
                    submit(client, "Hello", name="during the restart")
                except CapacityError as error:
                    refused.append(error)
            super().__call__(output)

    answers = [Resubmit() for _ in range(3)]
    for i, answer in enumerate(answers):
        client.submit(GenerationRequest(str(i), "Hello", ENDLESS), answer)
    for answer in answers:
        answer.started.wait(TIMEOUT_S)
    (engine,) = find_engines(long_repository, own=True)
    engine.kill()
    for answer in answers:
        last = answer.last()
        assert (last.finish_reason, last.error_kind) == ("error", "server")
        assert "engine process died (signal SIGKILL)" in str(last.error)
        assert [output.finish_reason for output in answer.outputs].count("error") == 1
    assert len(refused) == 3
    assert "restarted" in str(refused[0])

    deadline = time.monotonic() + TIMEOUT_S
    while not client.is_alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert submit(client, "Hello", name="again").text() == expected


def test_a_model_that_cannot_be_served(
    fake_repository: Path, tmp_path: Path, find_engines: FindEngines
) -> None:
    shutil.copytree(fake_repository, tmp_path / "copy")
    folder = tmp_path / "copy" / "llm" / "1"
    manifest = Manifest.load(folder)
    columns = (0, manifest.model.vocab_size)
    ranks = (Rank(onnx="rank0/model.onnx", kv_layers=manifest.kv_cache.layers, logits_columns=columns),)
    manifest.model_copy(update={"runtime": "tensorrt", "ranks": ranks}).save(folder)
    client = EngineClient(folder, EngineOptions())
    with pytest.raises(ConfigError, match="engine"):
        client.start()
    assert not client.is_alive
    assert find_engines(tmp_path / "copy", own=True) == []
    client.close()


def test_an_engine_that_dies_while_it_starts(
    fake_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    client = EngineClient(fake_repository / "llm" / "1", EngineOptions())
    with pytest.raises(ServerError, match="exit status 3"):
        client.start()
    client.close()


def test_close_ends_everything(start: Start, long_repository: Path, find_engines: FindEngines) -> None:
    client = start(long_repository)
    answer = submit(client, "Hello", ENDLESS)
    answer.started.wait(TIMEOUT_S)
    (engine,) = find_engines(long_repository, own=True)
    client.close()
    assert not engine.is_running()
    last = answer.last()
    assert (last.finish_reason, last.error_kind) == ("error", "capacity")
    with pytest.raises(ServerError, match="shut down"):
        submit(client, "Hello")
    assert not client.is_alive
    client.close()


SERVE_AND_WAIT = """
import sys, pathlib, psutil
from trtforge.engine_options import EngineOptions
from trtforge.runtime.engine.client import EngineClient
client = EngineClient(pathlib.Path(sys.argv[1]), EngineOptions())
client.start()
print(psutil.Process().children()[0].pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stop_signal", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_engine_does_not_outlive_its_owner(fake_repository: Path, stop_signal: signal.Signals) -> None:
    folder = fake_repository / "llm" / "1"
    command = [sys.executable, "-c", SERVE_AND_WAIT, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        engine = psutil.Process(int(owner.stdout.readline()))
        owner.send_signal(stop_signal)
        owner.wait(TIMEOUT_S)
    psutil.wait_procs([engine], timeout=TIMEOUT_S)
    assert not engine.is_running()


def test_the_engine_itself_ignores_the_signals_of_a_terminal(
    client: EngineClient, fake_repository: Path, find_engines: FindEngines
) -> None:
    expected = submit(client, "Hello").text()
    (engine,) = find_engines(fake_repository, own=True)
    engine.send_signal(signal.SIGINT)
    engine.send_signal(signal.SIGTERM)
    assert submit(client, "Hello").text() == expected
    assert find_engines(fake_repository, own=True) == [engine]
