"""What the driver and its ranks say to each other over sockets; arrays are in shared memory."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Literal

import msgspec

from trtforge.runtime.engine.messages import Channel
from trtforge.runtime.parallel.step_memory import StepSizes
from trtforge.runtime.scheduling.block_moves import Move

FailureKind = Literal["config", "capacity", "server"]


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    """To ranks that share no memory, before Load: the first one opens a port where all of them meet."""


class Met(msgspec.Struct, frozen=True, tag="met"):
    """The port; 0 from all others."""

    port: int


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Load the rank's part of the model."""

    model_dir: str
    manifest: str  # JSON, as the next one
    options: str
    nodes: list[int]  # the machine that each rank is on
    devices: list[int]  # which of the GPUs that it sees each rank has
    meeting: tuple[str, int] | None  # host and port; None: the ranks share memory


class Planned(msgspec.Struct, frozen=True, tag="planned"):
    """How many blocks this rank has room for; it waits for Agreed."""

    num_blocks: int
    num_host_blocks: int


class Agreed(msgspec.Struct, frozen=True, tag="agreed"):
    """How many blocks all ranks have room for."""

    num_blocks: int
    num_host_blocks: int


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The rank takes steps."""


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Execute a step, whose arrays are in memory, or follow where ranks share none: see `step_exchange`."""

    sizes: StepSizes
    arrays: bytes = b""


class Moves(msgspec.Struct, frozen=True, tag="moves"):
    """Move blocks."""

    swap_out: list[Move]
    swap_in: list[Move]
    copies: list[Move]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The answer to Step and Moves, with the rank's logits where they are not in memory."""

    logits: bytes = b""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank is of no use any more, and ends."""

    error: str
    kind: FailureKind


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Release the model and end."""


ToRank = Meet | Load | Agreed | Step | Moves | Close
FromRank = Met | Planned | Loaded | Done | Failed


def driver_end(connection: Connection) -> Channel[ToRank, FromRank]:
    """The end of the driver."""
    return Channel(connection, FromRank)


def rank_end(connection: Connection) -> Channel[FromRank, ToRank]:
    """The end of a rank."""
    return Channel(connection, ToRank)
