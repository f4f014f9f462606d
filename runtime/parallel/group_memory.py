"""All that the processes of a group share: what ranks tell each other, and the step."""

from __future__ import annotations

from trtforge.manifest import Manifest
from trtforge.runtime.parallel.communicator import GroupShape
from trtforge.runtime.parallel.memory_communicator import MemoryCommunicator, communicator_bytes
from trtforge.runtime.parallel.shared_memory import SharedMemory, aligned
from trtforge.runtime.parallel.signals import Signals
from trtforge.runtime.parallel.step_memory import StepMemory, StepSizes


class GroupMemory:
    """One piece of memory, laid out by the model's sizes."""

    def __init__(self, memory: SharedMemory, manifest: Manifest) -> None:
        self._memory = memory
        self.shape = GroupShape(manifest.tp_size, manifest.pp_size)
        self.signals = Signals(memory, self.shape.num_ranks)
        self.steps = StepMemory(
            memory,
            aligned(communicator_bytes(self.shape)),
            StepSizes.largest(manifest),
            manifest.model.vocab_size,
        )

    @classmethod
    def create(cls, manifest: Manifest) -> tuple[GroupMemory, int]:
        """Memory for a group that starts, and its descriptor, which the caller closes."""
        shape = GroupShape(manifest.tp_size, manifest.pp_size)
        step_bytes = StepMemory.num_bytes(StepSizes.largest(manifest), manifest.model.vocab_size)
        memory, fd = SharedMemory.create(aligned(communicator_bytes(shape)) + step_bytes)
        return cls(memory, manifest), fd

    def communicator(self, rank: int, timeout_s: float) -> MemoryCommunicator:
        """The part of a rank, whose waits last `timeout_s` at most; 0: for ever."""
        return MemoryCommunicator(self._memory, self.shape, rank, timeout_s=timeout_s)
