"""A step that does not end, and an engine that is not heard of."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from trtforge.engine_options import EngineOptions
from trtforge.runtime.engine import handle as engine_handle
from trtforge.runtime.engine.client import EngineClient
from trtforge.runtime.engine.watchdog import SilenceWatchdog
from trtforge.runtime.outputs import GenerationOutput
from trtforge.runtime.request import GenerationRequest, SamplingParams

TIMEOUT_S = 30
SLEEP_WITH_THE_LOCK_HELD = "ctypes.PyDLL(None).sleep(60)"
SLEEP_WITHOUT_IT = "time.sleep(60)"
ENDLESS = GenerationRequest("a", "Hello", SamplingParams(max_tokens=100_000))


def run_step(step: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run `step` under a watchdog, after another one, in a process that was told to ignore SIGALRM."""
    program = f"""if True:
        import ctypes, threading, time
        from trtforge.runtime.engine.watchdog import StepWatchdog
        threading.Thread(target=time.sleep, args=(60,), name="other", daemon=True).start()
        watchdog = StepWatchdog({timeout_s})
        watchdog.arm()
        watchdog.disarm()
        watchdog.arm()
        {step}
        watchdog.disarm()
        print("done")
    """
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("step", [SLEEP_WITH_THE_LOCK_HELD, SLEEP_WITHOUT_IT])
def test_a_step_that_takes_too_long_ends_the_process_with_all_tracebacks(step: str) -> None:
    ended = run_step(step, timeout_s=0.2)
    assert ended.returncode == -signal.SIGALRM
    assert ended.stderr.count("(most recent call first)") == 2
    assert ended.stdout == ""


def test_between_and_without_limits_time_does_not_matter() -> None:
    assert run_step("time.sleep(0.3)", timeout_s=0).stdout == "done\n"
    # Outside of steps nothing is limited.
    ended = run_step("watchdog.disarm(); time.sleep(0.5)", timeout_s=0.2)
    assert (ended.returncode, ended.stdout) == (0, "done\n")


def test_silence_counts_only_while_there_is_work() -> None:
    is_busy, is_silent = threading.Event(), threading.Event()
    watchdog = SilenceWatchdog(0.2, is_busy.is_set, is_silent.set)
    assert not is_silent.wait(0.5)
    is_busy.set()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        watchdog.heard()
        time.sleep(0.01)
    assert not is_silent.is_set()
    assert is_silent.wait(TIMEOUT_S)


@pytest.fixture
def repository(make_fake_repository: Callable[..., Path]) -> Path:
    return make_fake_repository(num_blocks=8192, max_model_len=8192 * 16)


@pytest.fixture
def impatient_client(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineClient]:
    monkeypatch.setattr(engine_handle, "SILENCE_MARGIN_S", 0.5)
    client = EngineClient(repository / "llm" / "1", EngineOptions(step_timeout_s=1))
    client.start()
    yield client
    client.close()


def test_a_stopped_engine_is_replaced(
    impatient_client: EngineClient, repository: Path, find_engines: Callable[..., list[psutil.Process]]
) -> None:
    (engine,) = find_engines(repository, own=True)
    outputs: list[GenerationOutput] = []
    started, ended = threading.Event(), threading.Event()

    def on_output(output: GenerationOutput) -> None:
        outputs.append(output)
        started.set()
        if output.finish_reason is not None:
            ended.set()

    impatient_client.submit(ENDLESS, on_output)
    assert started.wait(TIMEOUT_S)
    engine.suspend()
    assert ended.wait(TIMEOUT_S)
    assert "died (nothing was heard of it for 1.5 s)" in (outputs[-1].error or "")
    deadline = time.monotonic() + TIMEOUT_S
    while not impatient_client.is_alive:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.clear()
    impatient_client.submit(ENDLESS, on_output)
    assert started.wait(TIMEOUT_S)
