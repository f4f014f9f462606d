"""One thread that hands over the outputs of many requests, so that the engine's reader never waits."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

from trtforge.runtime.outputs import GenerationOutput

logger = logging.getLogger(__name__)

Deliver = Callable[[list[GenerationOutput]], None]


class Mailbox:
    """Outputs of one request that wait for the outbox's thread, which takes all of them at once."""

    __slots__ = ("_deliver", "_is_ready", "_outputs", "_ready")

    def __init__(self, deliver: Deliver, ready: queue.SimpleQueue[Mailbox | None]) -> None:
        self._deliver = deliver
        self._ready = ready
        self._outputs: deque[GenerationOutput] = deque()
        self._is_ready = False  # lies in the queue of those that have something

    def put(self, output: GenerationOutput) -> None:
        """Leave an output; one thread at a time."""
        # No lock: the thread clears the mark before it looks, so whoever finds the mark set is seen.
        self._outputs.append(output)
        if not self._is_ready:
            self._is_ready = True
            self._ready.put(self)

    def empty(self) -> None:
        """Deliver what is here; called by the outbox's thread."""
        self._is_ready = False
        outputs = []
        while self._outputs:
            outputs.append(self._outputs.popleft())
        if outputs:
            self._deliver(outputs)


class Outbox:
    """Delivers outputs in a thread of its own, requests in the order in which they had something first.

    While one delivery is under way everybody's outputs collect: they leave together, so that a slow receiver
    gets fewer and larger deliveries, never a growing queue of them.
    """

    def __init__(self) -> None:
        self._ready: queue.SimpleQueue[Mailbox | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def mailbox(self, deliver: Deliver) -> Mailbox:
        """A new request's mailbox; `deliver` is called in the outbox's thread."""
        return Mailbox(deliver, self._ready)

    def close(self) -> None:
        """Deliver what is left and end the thread."""
        self._ready.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (mailbox := self._ready.get()) is not None:
            try:
                mailbox.empty()
            except Exception:
                # One request's trouble must not end the thread that all others need.
                logger.exception("outputs could not be delivered")
