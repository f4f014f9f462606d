"""Starts the process of a rank, holds the socket to it and gets rid of it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

from trtforge.runtime.engine.messages import Channel
from trtforge.runtime.parallel.messages import Failed, FromRank, ToRank, driver_end

RANK_PROGRAM = ("-m", "trtforge.runtime.parallel.rank_process")  # what Python runs
_EXIT_TIMEOUT_S = 1.0  # between the end of the socket and that of the process


class RankHandle:
    """One rank's process. It ends with this one, and with the thread that has made the handle."""

    def __init__(self, rank: int, memory_fd: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        with theirs:
            options = [f"--rank={rank}", f"--control={theirs.fileno()}", f"--memory={memory_fd}"]
            self.process = subprocess.Popen(
                [sys.executable, *RANK_PROGRAM, *options],
                pass_fds=[theirs.fileno(), memory_fd],
                stdin=subprocess.DEVNULL,
            )
        self.connection = Connection(ours.detach())
        self._channel: Channel[ToRank, FromRank] = driver_end(self.connection)

    def send(self, message: ToRank) -> None:
        """Say something; a rank that has ended is noticed when its answer is waited for."""
        with contextlib.suppress(OSError):
            self._channel.send(message)

    def receive(self) -> FromRank | None:
        """Wait for what the rank says; None if it has ended."""
        try:
            return self._channel.receive()
        except (EOFError, OSError):
            return None

    def last_words(self) -> Failed | None:
        """Why the rank has failed, if it has said so and nobody has heard it yet."""
        with contextlib.suppress(OSError):
            while self.connection.poll(0):
                message = self.receive()
                if message is None or isinstance(message, Failed):
                    return message
        return None

    def ending(self) -> str:
        """How the process has ended, whose socket has; it is killed if it has not."""
        try:
            status = self.process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
