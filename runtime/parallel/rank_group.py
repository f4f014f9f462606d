"""The processes of all ranks, as one thing that works or is gone."""

from __future__ import annotations

import logging
import select
import selectors
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence

from trtforge.errors import CapacityError, ConfigError, DeviceError, TrtforgeError
from trtforge.runtime.parallel.messages import Close, Failed, FailureKind, FromRank, ToRank
from trtforge.runtime.parallel.rank_handle import RankHandle
from trtforge.runtime.parallel.signals import Signals

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 3.0
_KILL_TIMEOUT_S = 10.0  # a process that is in a driver's hands can last

_ERRORS: dict[FailureKind, type[TrtforgeError]] = {
    "config": ConfigError,
    "capacity": CapacityError,
    "server": DeviceError,
}


class RankGroup:
    """Ranks that start, answer and end together. Not thread-safe.

    If one of them dies, fails or does not answer in time, all are killed at once: those that compute with it
    can neither go on nor always be asked to stop.
    """

    def __init__(self, handles: Sequence[RankHandle], signals: Signals | None) -> None:
        """Take over the processes, whose `signals` are those of their memory, if they share one."""
        self._signals = signals
        self._failure = ""
        self._handles = handles
        self._selector = selectors.DefaultSelector()
        # Also if nobody closes the group; its processes would go on until this one ends.
        self._kill = weakref.finalize(self, _kill_all, handles)
        for handle in handles:
            self._selector.register(handle.connection, selectors.EVENT_READ, handle)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [handle.pid for handle in self._handles]

    def ask(self, message: ToRank, limit_s: float = 0.0) -> list[FromRank]:
        """Tell all ranks something; returns their answers once all are there, by rank.

        Raises, and has ended the whole group then, DeviceError if a rank dies, fails or needs more than
        `limit_s` (0: no limit), ConfigError or CapacityError if it says that it failed for such a reason.
        """
        if self._failure:
            raise DeviceError(f"the ranks have ended: {self._failure}")
        for handle in self._handles:
            handle.send(message)
        answers: dict[int, FromRank] = {}
        deadline_s = time.monotonic() + limit_s
        while len(answers) < len(self._handles):
            ready = self._selector.select(max(0.0, deadline_s - time.monotonic()) if limit_s else None)
            if not ready:
                late = [handle.rank for handle in self._handles if handle.rank not in answers]
                raise self._end(self._lateness(late, limit_s))
            ended = []
            for handle in (key.data for key, _ in ready):
                answer = handle.receive()
                if isinstance(answer, Failed):
                    raise self._end(f"rank {handle.rank} failed: {answer.error}", answer.kind)
                if answer is None:
                    ended.append(handle)
                else:
                    answers[handle.rank] = answer
            if ended:
                raise self._end_of(ended)
        return [answers[rank] for rank in range(len(self._handles))]

    def watch(self, on_death: Callable[[TrtforgeError], None]) -> None:
        """Call `on_death`, once and in another thread, when a rank ends before the group is closed."""
        poll = select.poll()
        handles = {handle.connection.fileno(): handle for handle in self._handles}
        for fd in handles:
            poll.register(fd, select.POLLRDHUP)

        def wait() -> None:
            handle = handles[poll.poll()[0][0]]
            if not self._failure:
                on_death(DeviceError(f"rank {handle.rank} died ({handle.ending()})"))

        threading.Thread(target=wait, name="rank-watch", daemon=True).start()

    def close(self) -> None:
        """End all ranks, in order if they still work; idempotent."""
        if self._failure:
            return
        self._failure = "the group was closed"
        for handle in self._handles:
            handle.send(Close())
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for handle in self._handles:
            if not handle.wait(max(0.0, deadline_s - time.monotonic())):
                logger.warning("rank %d does not stop and is killed", handle.rank)
        self._selector.close()
        self._kill()

    def _lateness(self, late: Collection[int], limit_s: float) -> str:
        # Others wait for those; all of them are late where nobody is to blame.
        ranks = (self._signals.culprits(late) if self._signals else late) or late
        names = ", ".join(map(str, ranks))
        return f"rank {names} did not finish a step within {limit_s:g} s"

    def _end_of(self, ended: Sequence[RankHandle]) -> TrtforgeError:
        """One that has ended may have done so because another one has failed, which has said why before."""
        for handle in self._handles:
            words = handle.last_words()
            if words is not None:
                return self._end(f"rank {handle.rank} failed: {words.error}", words.kind)
        return self._end(f"rank {ended[0].rank} died ({ended[0].ending()})")

    def _end(self, failure: str, kind: FailureKind = "server") -> TrtforgeError:
        """Kill all; returns the error to raise."""
        self._failure = failure
        if self._signals:
            self._signals.fail()
        self._selector.close()
        self._kill()
        logger.error("%s; all ranks are killed", failure)
        return _ERRORS[kind](failure)


def _kill_all(handles: Sequence[RankHandle]) -> None:
    for handle in handles:
        handle.kill()
    for handle in handles:
        if not handle.wait(_KILL_TIMEOUT_S):
            logger.error("rank %d, process %d, was killed and has not ended", handle.rank, handle.pid)
        handle.connection.close()
