"""Holds the socket to a rank's process and gets rid of it; starts it, if it is to be on this machine."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from multiprocessing.connection import Connection

from trtforge.runtime.engine.messages import Channel
from trtforge.runtime.parallel.messages import Failed, FromRank, ToRank, driver_end

RANK_PROGRAM = ("-m", "trtforge.runtime.parallel.rank_process")  # what Python runs
_EXIT_TIMEOUT_S = 1.0  # between the end of the socket and that of the process


def start_process(rank: int, control_fd: int, memory_fd: int | None = None) -> subprocess.Popen[bytes]:
    """A rank's process on this machine. It ends when the socket's other end does, and with the thread that
    has called this."""
    options, fds = [f"--rank={rank}", f"--control={control_fd}"], [control_fd]
    if memory_fd is not None:
        options.append(f"--memory={memory_fd}")
        fds.append(memory_fd)
    command = [sys.executable, *RANK_PROGRAM, *options]
    return subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)


def in_words(status: int) -> str:
    """How a process with the return code `status` has ended."""
    return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


class RankHandle(ABC):
    """One rank's process, which ends when the handle's connection does."""

    def __init__(self, rank: int, connection: Connection) -> None:
        self.rank = rank
        self.connection = connection
        self._channel: Channel[ToRank, FromRank] = driver_end(connection)

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process's id, on its machine."""

    @abstractmethod
    def kill(self) -> None:
        """End the process whatever it does. Idempotent."""

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Whether the process ends within that time."""

    @abstractmethod
    def ending(self) -> str:
        """How the process has ended, whose socket has, in words."""

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


class LocalRank(RankHandle):
    """A process on this machine. It also ends with the thread that has made the handle."""

    def __init__(self, rank: int, memory_fd: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = start_process(rank, theirs.fileno(), memory_fd)
        super().__init__(rank, Connection(ours.detach()))

    @property
    def pid(self) -> int:
        """As the system has it."""
        return self._process.pid

    def kill(self) -> None:
        """By SIGKILL."""
        self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Also leaves no zombie."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ending(self) -> str:
        """Waits a moment for the process."""
        if not self.wait(_EXIT_TIMEOUT_S):
            return "it closed its socket"
        return in_words(self._process.returncode)
