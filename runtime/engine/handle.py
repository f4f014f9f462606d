"""Starts the engine process, holds the socket to it and gets rid of it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError, ServerError
from trtforge.runtime.engine.messages import (
    Channel,
    Crashed,
    FromEngine,
    Ready,
    Shutdown,
    StartupFailed,
    ToEngine,
    client_end,
)
from trtforge.runtime.engine.watchdog import STEP_TIMEOUT_SIGNAL, SilenceWatchdog
from trtforge.runtime.outputs import EngineStats

logger = logging.getLogger(__name__)

ENGINE_PROGRAM = ("-m", "trtforge.runtime.engine.process")  # what Python runs
STOP_TIMEOUT_S = 5.0  # a step of a large prefill can take seconds; then the process is killed
# An engine at work reports every step. One that is silent for a step's longest time and this is stuck.
SILENCE_MARGIN_S = 5.0
# From the server's guard: the time that requests in flight had, when the server was told to stop, is over.
CUT_OFF_SIGNAL = signal.SIGUSR1


class EngineHandle:
    """One engine process, loading `model_dir` from now on. It ends when this process does.

    `is_busy` says whether the engine owes an answer: then it may be silent for
    `options.step_timeout_s` and SILENCE_MARGIN_S, or it is killed.
    """

    def __init__(self, model_dir: Path, options: EngineOptions, is_busy: Callable[[], bool]) -> None:
        self._step_timeout_s = options.step_timeout_s
        self._is_busy = is_busy
        self._watchdog: SilenceWatchdog | None = None
        self._silence = ""  # why it was killed, if it was for that
        self._crash = ""  # what it has said of its end
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            command = [
                sys.executable,
                *ENGINE_PROGRAM,
                f"--model-dir={model_dir}",
                f"--fd={fd}",
                f"--options={options.model_dump_json()}",
            ]
            self._process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL)
        self.channel: Channel[ToEngine, FromEngine] = client_end(Connection(ours.detach()))

    def wait_until_ready(self) -> EngineStats:
        """The idle engine's statistics.

        Raises ConfigError if the model cannot be served, ServerError if the process dies on the way.
        """
        try:
            message = self.channel.receive()
        except (EOFError, OSError):
            status = self.reap()
            raise ServerError(
                f"the engine process ended ({status}) before its model was loaded; its log says why"
            ) from None
        if isinstance(message, StartupFailed):
            self.reap()
            raise ConfigError(message.error)
        if not isinstance(message, Ready):
            raise ServerError(f"the engine process started with {type(message).__name__}, not with Ready")
        logger.info(
            "engine process %d is ready: %d blocks of %d tokens",
            self._process.pid,
            message.num_blocks,
            message.block_size,
        )
        if self._step_timeout_s:
            limit_s = self._step_timeout_s + SILENCE_MARGIN_S
            self._watchdog = SilenceWatchdog(limit_s, self._is_busy, self._kill_the_silent)
        return EngineStats(num_blocks=message.num_blocks, num_free_blocks=message.num_blocks)

    def receive(self) -> FromEngine:
        """Wait for a message; raises EOFError or OSError if the engine is gone."""
        message = self.channel.receive()
        if self._watchdog is not None:
            self._watchdog.heard()
        if isinstance(message, Crashed):
            self._crash = message.error
        return message

    @property
    def was_cut_off(self) -> bool:
        """Whether the process has ended because the server that it works for is going down."""
        return self._process.returncode == -CUT_OFF_SIGNAL

    def request_stop(self) -> None:
        """Ask the process to end after its current step."""
        # One that has ended by itself cannot be asked.
        with contextlib.suppress(OSError):
            self.channel.send(Shutdown())

    def wait_until_gone(self) -> str:
        """Wait for the process, kill it after STOP_TIMEOUT_S; returns how it ended."""
        try:
            status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if self._watchdog is not None:
            self._watchdog.stop()
        return self._in_words(status)

    def reap(self) -> str:
        """Close the socket, which ends the process if it still runs; returns how it ended."""
        self.channel.close()
        return self.wait_until_gone()

    def _kill_the_silent(self) -> None:
        self._silence = f"nothing was heard of it for {self._step_timeout_s + SILENCE_MARGIN_S:g} s"
        logger.error("engine process %d is killed: %s", self._process.pid, self._silence)
        self._process.kill()

    def _in_words(self, status: int) -> str:
        if self._silence:
            return self._silence
        if self._crash:
            return self._crash
        if status == -STEP_TIMEOUT_SIGNAL:
            return f"a step took longer than {self._step_timeout_s:g} s"
        return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
