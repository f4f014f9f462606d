"""Where the ranks of a model are: here, as processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from trtforge.manifest import Manifest
from trtforge.runtime.parallel.group_memory import GroupMemory
from trtforge.runtime.parallel.rank_handle import LocalRank, RankHandle
from trtforge.runtime.parallel.signals import Signals
from trtforge.runtime.parallel.step_exchange import MemorySender, StepSender


@dataclass(frozen=True, slots=True)
class Placement:
    """The processes of all ranks, started, and how to talk to them. Sequences are by rank."""

    handles: Sequence[RankHandle]
    steps: StepSender
    nodes: Sequence[int]  # the number of the machine that it is on
    devices: Sequence[int]  # which of the GPUs that it sees it has
    signals: Signals | None  # of the memory that they share; None: they meet over the network
    host: str  # at which the others reach the first one then


def place_here(manifest: Manifest) -> Placement:
    """All on this machine, with memory in common and the GPU of their own number."""
    memory, fd = GroupMemory.create(manifest)
    num_ranks = memory.shape.num_ranks
    try:
        handles = [LocalRank(rank, fd) for rank in range(num_ranks)]
    finally:
        os.close(fd)
    steps = MemorySender(memory.steps)
    return Placement(handles, steps, [0] * num_ranks, range(num_ranks), memory.signals, "")
