"""A rank's way to the others of its group: memory of their machine, or a network."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trtforge.errors import ConfigError
from trtforge.manifest import Manifest
from trtforge.runtime.parallel.communicator import Communicator, GroupShape
from trtforge.runtime.parallel.group_memory import GroupMemory
from trtforge.runtime.parallel.messages import Load
from trtforge.runtime.parallel.shared_memory import SharedMemory
from trtforge.runtime.parallel.step_exchange import MemoryReceiver, MessageReceiver, StepReceiver


@dataclass(frozen=True, slots=True)
class Membership:
    """What a rank has of its group."""

    communicator: Communicator
    steps: StepReceiver


class GroupAccess(Protocol):
    """Used once by a rank."""

    def meet(self, rank: int) -> int:
        """The port at which the first rank waits for the others; 0 from the others."""
        ...

    def join(self, rank: int, load: Load, manifest: Manifest, timeout_s: float) -> Membership:
        """Become a member, whose waits last `timeout_s` at most; 0: for ever."""
        ...


class MemoryAccess:
    """For ranks of one machine."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    def meet(self, rank: int) -> int:
        """They have met already."""
        return 0

    def join(self, rank: int, load: Load, manifest: Manifest, timeout_s: float) -> Membership:
        """Waits for nobody."""
        group = GroupMemory(self._memory, manifest)
        steps = MemoryReceiver(group.steps, manifest.ranks[rank].logits_columns)
        return Membership(group.communicator(rank, timeout_s), steps)


class NetworkAccess:
    """For ranks on any machines, each of which has the model's folder at the same place."""

    def __init__(self, control_fd: int) -> None:
        """`control_fd` is the socket to the driver: other ranks reach this one where the driver does."""
        with socket.socket(fileno=control_fd) as control:
            self._own_host: str = control.getsockname()[0]
            control.detach()
        self._meeting: Any = None  # to be kept as long as the ranks need it

    def meet(self, rank: int) -> int:
        """Opens the port, in the first rank."""
        if rank > 0:
            return 0
        from trtforge.runtime.parallel.gloo_communicator import open_meeting

        self._meeting = open_meeting(self._own_host)
        port: int = self._meeting.port
        return port

    def join(self, rank: int, load: Load, manifest: Manifest, timeout_s: float) -> Membership:
        """Waits for the others. Raises ConfigError if this machine has not the model that the driver has."""
        from trtforge.runtime.parallel.gloo_communicator import GlooCommunicator

        if Manifest.load(Path(load.model_dir)) != manifest:
            raise ConfigError(
                f"{load.model_dir} on {self._own_host} is another build than the one that is served: all "
                "machines need the same folder at the same place"
            )
        if load.meeting is None:
            raise ConfigError("ranks that share no memory were not told where to meet")
        communicator = GlooCommunicator(
            GroupShape(manifest.tp_size, manifest.pp_size),
            rank,
            own_host=self._own_host,
            meeting=load.meeting,
            timeout_s=timeout_s,
        )
        return Membership(communicator, MessageReceiver(manifest.ranks[rank].logits_columns))
