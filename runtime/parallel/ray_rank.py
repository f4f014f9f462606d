"""A rank that Ray has started, maybe on another machine."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from typing import Any

import ray

from trtforge.runtime.parallel.rank_handle import RankHandle, in_words, start_process

# A machine that has vanished closes no connection: after this time without answers the system does.
_KEEPALIVE_S = 5
_LOST_AFTER_S = 20
_ASK_TIMEOUT_S = 3.0
_POLL_S = 0.1


def watch_connection(connection: Connection) -> None:
    """Have the system end a connection whose other machine has vanished, and send messages at once."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _LOST_AFTER_S)


class RankHost:
    """A Ray actor, on the machine that Ray has chosen: starts the process of a rank and stays beside it.

    The process ends with the actor, and with the connection to the driver.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, rank: int, driver: tuple[str, int], key: bytes) -> int:
        """Connect to the `driver`, which asks for the `key`, and leave the connection to a new process.

        Returns its id.
        """
        with Client(driver, authkey=key) as connection:
            watch_connection(connection)
            connection.send_bytes(rank.to_bytes(4, "big"))
            self._process = start_process(rank, connection.fileno())
        return self._process.pid

    def status(self) -> int | None:
        """The process's return code; None if it runs."""
        return None if self._process is None else self._process.poll()


@dataclass(frozen=True, slots=True)
class RayNode:
    """A machine of the cluster."""

    id: str
    address: str


class RayRank(RankHandle):
    """A rank's process beside its actor."""

    def __init__(self, rank: int, connection: Connection, actor: Any, node: RayNode, pid: int) -> None:
        """`actor` is the RankHost on `node` that has started the process `pid`."""
        super().__init__(rank, connection)
        self._actor = actor
        self._node = node
        self._pid = pid

    @property
    def pid(self) -> int:
        """On the machine that it runs on."""
        return self._pid

    @property
    def host(self) -> str:
        """The address from which it has connected."""
        with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            address: str = end.getpeername()[0]
        return address

    def kill(self) -> None:
        """With its actor."""
        ray.kill(self._actor)

    def wait(self, timeout_s: float) -> bool:
        """A process that ends closes its connection."""
        poll = select.poll()
        poll.register(self.connection.fileno(), select.POLLRDHUP)
        return bool(poll.poll(1000 * timeout_s))

    def ending(self) -> str:
        """Asks the actor for the process, and Ray for the node."""
        address = self._node.address
        failure = ""
        deadline_s = time.monotonic() + _ASK_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if not any(node["NodeID"] == self._node.id and node["Alive"] for node in ray.nodes()):
                return f"the node {address} has left the Ray cluster"
            try:
                status = ray.get(self._actor.status.remote(), timeout=_ASK_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError):
                # Ray takes longer than this to give up a node.
                failure = f"the node {address} does not answer"
            else:
                failure = f"it closed its socket on the node {address}"
                if status is not None:
                    return f"{in_words(status)} on the node {address}"
            time.sleep(_POLL_S)
        return failure
