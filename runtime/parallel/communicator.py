"""What a rank has of the other ones: sums over those of its stage, and hidden states from stage to stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class GroupShape:
    """How many ranks there are, and what they are to each other: rank pp_rank * tp_size + tp_rank."""

    tp_size: int
    pp_size: int

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.tp_size * self.pp_size

    def pp_rank(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank // self.tp_size

    def is_first(self, rank: int) -> bool:
        """Whether its stage is the first."""
        return self.pp_rank(rank) == 0

    def is_last(self, rank: int) -> bool:
        """Whether its stage is the last."""
        return self.pp_rank(rank) == self.pp_size - 1

    def peers(self, rank: int) -> range:
        """The ranks of its stage, itself included."""
        first = self.pp_rank(rank) * self.tp_size
        return range(first, first + self.tp_size)


class Communicator(ABC):
    """One rank's part in a group. All ranks have to call the same methods in the same order.

    Methods that wait raise PeerFailedError and PeerTimeoutError of `trtforge.runtime.parallel.signals`.
    """

    def __init__(self, shape: GroupShape, rank: int) -> None:
        self.shape = shape
        self.rank = rank  # its number in the group

    @property
    def is_first(self) -> bool:
        """Whether it is of the first stage, which takes tokens; others take hidden states."""
        return self.shape.is_first(self.rank)

    @property
    def is_last(self) -> bool:
        """Whether it is of the last stage, which computes logits."""
        return self.shape.is_last(self.rank)

    @property
    @abstractmethod
    def host(self) -> str:
        """The address at which all ranks reach the first one."""

    @abstractmethod
    def all_reduce(self, source: Array, target: Array) -> None:
        """Write the sum of `source` over the ranks of this stage to `target`, which may be the same array.

        Both are C-contiguous, of one shape and one type of float32, float16 or bfloat16; sums are of float32,
        and have the same bits in all ranks.
        """

    @abstractmethod
    def send(self, array: Array) -> None:
        """Hand a C-contiguous array to the same rank of the next stage; waits for one that is far behind."""

    @abstractmethod
    def receive(self, array: Array) -> None:
        """Fill a C-contiguous array with what the same rank of the stage before has sent.

        Raises ServerError if that is of another size.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return when all ranks of the group have come here."""

    @abstractmethod
    def fail(self) -> None:
        """Tell all ranks, as far as there is a way, that this one is of no use any more."""

    def tell_stage(self, data: bytes) -> bytes:
        """The `data` of a stage's first rank, in all its ranks; what the others give is of the same length,
        and not looked at."""
        values = np.frombuffer(data, np.uint8).astype(np.float32)
        if self.rank != self.shape.peers(self.rank).start:
            values[:] = 0
        self.all_reduce(values, values)  # exact: all others have zeros
        return values.astype(np.uint8).tobytes()

    def tell(self, data: bytes) -> bytes:
        """The `data` of the first rank, in all ranks of all stages; the others' is as in `tell_stage`."""
        told = self.tell_stage(data)
        if not self.is_first:
            values = np.empty(len(data), np.uint8)
            self.receive(values)
            told = values.tobytes()
        if not self.is_last:
            self.send(np.frombuffer(told, np.uint8))
        return told


def flat(array: Array) -> Array:
    """The same memory with one dim. Raises ValueError if there is a gap in it."""
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} and strides {array.strides} is not C-contiguous")
    return array.reshape(-1)
