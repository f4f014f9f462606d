"""How ranks wait for each other: counters in shared memory that only grow.

A rank writes its data and then raises its counter; who has seen the counter reads the data. x86 keeps
that order between processors. Others need fences, which Python has not: they are refused.
"""

from __future__ import annotations

import enum
import os
import platform
import time
from collections.abc import Collection

from trtforge.errors import ConfigError, ServerError
from trtforge.runtime.parallel.shared_memory import SharedMemory, aligned

_ORDERED_MACHINES = ("x86_64", "AMD64", "i686")

# Peers that have a core each are there within some microseconds. Where they have not, somebody has to leave
# the core to them: a yield does, if they are ready to run. After that it is worth sleeping.
_NUM_LOOKS = 300
_NUM_YIELDS = 500
_MIN_SLEEP_S = 20e-6
_MAX_SLEEP_S = 1e-3


class PeerFailedError(ServerError):
    """The group of ranks failed, and not because of this one."""


class PeerTimeoutError(ServerError):
    """Another rank did not come in time."""


class Counter(enum.IntEnum):
    """What each rank has of its own. AWAITED and AWAITED_VALUE say what it sleeps for."""

    REDUCED = 0  # chunks that it gave to a sum
    SENT = 1  # chunks for the next stage
    TAKEN = 2  # chunks of the stage before
    ARRIVED = 3  # barriers
    AWAITED = 4  # place of a counter, plus 1; 0: it is not asleep
    AWAITED_VALUE = 5


_STRIDE = 8  # integers a rank: a cache line
_FAILED = 0  # place of the flag, in a line of its own


def signals_bytes(num_ranks: int) -> int:
    """Size of the counters of a group."""
    return aligned(8 * _STRIDE * (num_ranks + 1))


class Signals:
    """The counters of a group, at the beginning of `memory`."""

    def __init__(self, memory: SharedMemory, num_ranks: int, rank: int = -1, timeout_s: float = 0.0) -> None:
        """Those of `rank` are raised here; without one they can only be looked at. Waits last `timeout_s` at
        most; 0: as long as it takes.

        Raises ConfigError for a processor that does not keep the order of writes.
        """
        if platform.machine() not in _ORDERED_MACHINES:
            raise ConfigError(
                f"the ranks of a model signal each other through memory in a way that {platform.machine()} "
                f"processors do not support: use a machine with one of {', '.join(_ORDERED_MACHINES)}"
            )
        self._values = memory.integers(0, _STRIDE * (num_ranks + 1))
        self._rank = rank
        self._timeout_s = timeout_s

    @property
    def has_failed(self) -> bool:
        """Whether somebody has said that the group is of no use any more."""
        return bool(self._values[_FAILED])

    def fail(self) -> None:
        """End all waits, now and later, with PeerFailedError."""
        self._values[_FAILED] = 1

    def raise_to(self, counter: Counter, value: int) -> None:
        """Say that everything up to `value` is there."""
        self._values[_place(self._rank, counter)] = value

    def wait_for(self, rank: int, counter: Counter, value: int) -> None:
        """Return once the counter of `rank` has come to `value`.

        Raises PeerFailedError if the group fails meanwhile, and PeerTimeoutError.
        """
        values, place = self._values, _place(rank, counter)
        for _ in range(_NUM_LOOKS):
            if values[place] >= value:
                return
        awaited = _place(self._rank, Counter.AWAITED)
        values[_place(self._rank, Counter.AWAITED_VALUE)] = value
        values[awaited] = place + 1
        try:
            self._sleep_until(rank, place, value)
        finally:
            values[awaited] = 0

    def _sleep_until(self, rank: int, place: int, value: int) -> None:
        values = self._values
        for _ in range(_NUM_YIELDS):
            if values[place] >= value:
                return
            os.sched_yield()
        started_s = time.monotonic()
        sleep_s = _MIN_SLEEP_S
        while values[place] < value:
            if values[_FAILED]:
                raise PeerFailedError(f"the group failed while rank {self._rank} waited for rank {rank}")
            if self._timeout_s and time.monotonic() - started_s > self._timeout_s:
                raise PeerTimeoutError(f"rank {rank} did not come within {self._timeout_s:g} s")
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, _MAX_SLEEP_S)

    def culprits(self, ranks: Collection[int]) -> list[int]:
        """Those of `ranks`, all of them late, that do not wait for another one."""
        return [rank for rank in ranks if not self._is_waiting(rank)]

    def _is_waiting(self, rank: int) -> bool:
        place = self._values[_place(rank, Counter.AWAITED)] - 1
        value = self._values[_place(rank, Counter.AWAITED_VALUE)]
        return place >= 0 and self._values[place] < value


def _place(rank: int, counter: Counter) -> int:
    return _STRIDE * (rank + 1) + counter
