"""Sums over ranks, and what one pipeline stage hands to the next, through memory of one machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from trtforge.errors import ServerError
from trtforge.runtime.parallel.communicator import Array, Communicator, GroupShape, flat
from trtforge.runtime.parallel.shared_memory import SharedMemory
from trtforge.runtime.parallel.signals import Counter, Signals, signals_bytes

REDUCE_CHUNK_BYTES = 1 << 20
MAIL_CHUNK_BYTES = 1 << 24
_NUM_SLOTS = 2  # of each kind: one is written while another one may still be read
_HEADER_BYTES = 64


def communicator_bytes(shape: GroupShape) -> int:
    """Memory that a group's communicators need; most of it is touched by large steps only."""
    return signals_bytes(shape.num_ranks) + shape.num_ranks * _bytes_of_rank()


def _bytes_of_rank() -> int:
    return _NUM_SLOTS * (REDUCE_CHUNK_BYTES + _HEADER_BYTES + MAIL_CHUNK_BYTES)


class MemoryCommunicator(Communicator):
    """One rank's part in a group that shares memory.

    Each rank writes what it has where its peers see it, and each adds all of it up in the order of ranks, so
    that all have the same bits. A slot is written again two chunks later: who is that far has seen that its
    peers were one chunk further, with the earlier one behind them.
    """

    def __init__(self, memory: SharedMemory, shape: GroupShape, rank: int, *, timeout_s: float = 0.0) -> None:
        """`memory` has communicator_bytes at its beginning; waits last `timeout_s` at most, 0: for ever."""
        super().__init__(shape, rank)
        self._memory = memory
        self._peers = shape.peers(rank)
        self._signals = Signals(memory, shape.num_ranks, rank, timeout_s)
        self._num_reduced = self._num_sent = self._num_taken = self._num_arrived = 0
        self._slots: dict[np.dtype[Any], list[list[Array]]] = {}

    @property
    def host(self) -> str:
        """The one that they are all on."""
        return "127.0.0.1"

    def fail(self) -> None:
        """End the waits of all ranks with an error."""
        self._signals.fail()

    def barrier(self) -> None:
        """Return when all ranks of the group have come here."""
        self._num_arrived += 1
        self._signals.raise_to(Counter.ARRIVED, self._num_arrived)
        for rank in range(self.shape.num_ranks):
            self._signals.wait_for(rank, Counter.ARRIVED, self._num_arrived)

    # ------------------------------------------------------------------ within a stage

    def all_reduce(self, source: Array, target: Array) -> None:
        """As the rank adds it up itself, in the order of ranks."""
        given, wanted = flat(source), flat(target)
        step = REDUCE_CHUNK_BYTES // given.dtype.itemsize
        for begin in range(0, len(given), step):
            self._reduce_chunk(given[begin : begin + step], wanted[begin : begin + step])

    def _reduce_chunk(self, source: Array, target: Array) -> None:
        self._num_reduced = number = self._num_reduced + 1
        slots = self._slots_of(source.dtype)[number % _NUM_SLOTS]
        size = len(source)
        slots[self.rank - self._peers.start][:size] = source
        self._signals.raise_to(Counter.REDUCED, number)
        for peer in self._peers:
            self._signals.wait_for(peer, Counter.REDUCED, number)
        total = slots[0][:size].astype(np.float32, copy=False)
        room = target if source.dtype == np.float32 else np.empty(size, np.float32)
        for slot in slots[1:]:
            total = np.add(total, slot[:size].astype(np.float32, copy=False), out=room)
        if total is not target:
            target[:] = total

    def _slots_of(self, dtype: np.dtype[Any]) -> list[list[Array]]:
        """For each of the slots, the arrays of all peers."""
        if dtype not in self._slots:
            length = REDUCE_CHUNK_BYTES // dtype.itemsize
            self._slots[dtype] = [
                [
                    self._memory.array(self._offset(peer) + slot * REDUCE_CHUNK_BYTES, (length,), dtype)
                    for peer in self._peers
                ]
                for slot in range(_NUM_SLOTS)
            ]
        return self._slots[dtype]

    # ------------------------------------------------------------------ between stages

    def send(self, array: Array) -> None:
        """In chunks; waits while the next stage has not taken the last ones."""
        receiver = self.rank + self.shape.tp_size
        data = flat(array).view(np.uint8)
        for chunk in _chunks(data):
            self._num_sent = number = self._num_sent + 1
            self._signals.wait_for(receiver, Counter.TAKEN, number - _NUM_SLOTS)
            header, room = self._mail(self.rank, number)
            header[0] = len(chunk)
            room[: len(chunk)] = chunk
            self._signals.raise_to(Counter.SENT, number)

    def receive(self, array: Array) -> None:
        """In chunks, as they were sent."""
        sender = self.rank - self.shape.tp_size
        data = flat(array).view(np.uint8)
        for chunk in _chunks(data):
            self._num_taken = number = self._num_taken + 1
            self._signals.wait_for(sender, Counter.SENT, number)
            header, room = self._mail(sender, number)
            if header[0] != len(chunk):
                raise ServerError(
                    f"rank {sender} has sent {header[0]} bytes and rank {self.rank} waits for {len(chunk)}: "
                    "their graphs are not of one build"
                )
            chunk[:] = room[: len(chunk)]
            self._signals.raise_to(Counter.TAKEN, number)

    def _mail(self, sender: int, number: int) -> tuple[Array, Array]:
        slot_bytes = _HEADER_BYTES + MAIL_CHUNK_BYTES
        offset = self._offset(sender) + _NUM_SLOTS * REDUCE_CHUNK_BYTES + number % _NUM_SLOTS * slot_bytes
        header = self._memory.array(offset, (1,), np.int64)
        return header, self._memory.array(offset + _HEADER_BYTES, (MAIL_CHUNK_BYTES,), np.uint8)

    def _offset(self, rank: int) -> int:
        return signals_bytes(self.shape.num_ranks) + rank * _bytes_of_rank()


def _chunks(data: Array) -> list[Array]:
    return [data[begin : begin + MAIL_CHUNK_BYTES] for begin in range(0, len(data), MAIL_CHUNK_BYTES)]
