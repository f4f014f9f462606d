"""What crosses the socket between the engine client and the engine process: msgpack, one message a frame."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import msgspec

from trtforge.runtime.outputs import EngineOutput, EngineStats
from trtforge.runtime.request import EngineRequest, ErrorKind


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Queue a request."""

    request: EngineRequest


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop a request, or one of its answers; unknown and ended ones are ignored."""

    request_id: str
    index: int | None = None  # None: all answers


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Release the model and exit."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded."""

    num_blocks: int
    block_size: int


class StartupFailed(msgspec.Struct, frozen=True, tag="startup_failed"):
    """The process ends because the model cannot be served."""

    error: str


class Crashed(msgspec.Struct, frozen=True, tag="crashed"):
    """The process ends because a step failed in a way after which nothing can be trusted."""

    error: str


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """Everything that one step produced."""

    outputs: list[EngineOutput]
    stats: EngineStats  # after the step


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The engine core did not take a request."""

    request_id: str
    error: str
    error_kind: ErrorKind


ToEngine = Add | Cancel | Shutdown
FromEngine = Ready | StartupFailed | Crashed | Outputs | Refused

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class Channel(Generic[Sent, Received]):
    """One end of the socket. One thread at a time may send and one receive."""

    def __init__(self, connection: Connection, received: Any) -> None:
        self._connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)

    def send(self, message: Sent) -> None:
        """Raises OSError if the other end is gone."""
        self._connection.send_bytes(self._encoder.encode(message))

    def receive(self) -> Received:
        """Wait for a message; raises EOFError or OSError if the other end is gone."""
        return self._decoder.decode(self._connection.recv_bytes())

    def close(self) -> None:
        """The other end sees that nobody is here any more; idempotent."""
        self._connection.close()


def client_end(connection: Connection) -> Channel[ToEngine, FromEngine]:
    """The end of the engine client."""
    return Channel(connection, FromEngine)


def engine_end(connection: Connection) -> Channel[FromEngine, ToEngine]:
    """The end of the engine process."""
    return Channel(connection, ToEngine)
