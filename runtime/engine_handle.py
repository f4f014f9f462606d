"""Starts the engine process, holds the socket to it and gets rid of it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError, ServerError
from trtforge.runtime.messages import (
    Channel,
    FromEngine,
    Ready,
    Shutdown,
    StartupFailed,
    ToEngine,
    client_end,
)
from trtforge.runtime.outputs import EngineStats

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0  # a step of a large prefill can take seconds; then the process is killed


class EngineHandle:
    """One engine process, loading `model_dir` from now on. It ends when this process does."""

    def __init__(self, model_dir: Path, options: EngineOptions) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, "-m", "trtforge.runtime.engine_process"]
            command += [f"--model-dir={model_dir}", f"--fd={fd}", f"--options={options.model_dump_json()}"]
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
        return EngineStats(num_blocks=message.num_blocks, num_free_blocks=message.num_blocks)

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
        return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"

    def reap(self) -> str:
        """Close the socket, which ends the process if it still runs; returns how it ended."""
        self.channel.close()
        return self.wait_until_gone()
