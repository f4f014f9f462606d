"""Two watchdogs over the engine process: its own over each step, and its client's over its silence."""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from collections.abc import Callable

STEP_TIMEOUT_SIGNAL = signal.SIGALRM

MAX_POLL_INTERVAL_S = 1.0


class StepWatchdog:
    """Ends this process with STEP_TIMEOUT_SIGNAL when it is not armed again, or disarmed, in time.

    Every thread's traceback goes to standard error before. The kernel's timer and a signal handler that
    is not Python's do it, so native code that holds the interpreter lock does not keep it from working.
    Arming and disarming take about 3 µs together. To be made and used in the main thread.
    """

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` 0: no limit."""
        self._timeout_s = timeout_s
        # The process may have inherited that the signal is ignored or blocked.
        signal.signal(STEP_TIMEOUT_SIGNAL, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STEP_TIMEOUT_SIGNAL})
        faulthandler.register(STEP_TIMEOUT_SIGNAL, all_threads=True, chain=True)

    def arm(self) -> None:
        """The time starts, again if it has started before."""
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s)

    def disarm(self) -> None:
        """Nothing is waited for."""
        signal.setitimer(signal.ITIMER_REAL, 0)


class SilenceWatchdog:
    """Calls `on_silence`, once, when an engine that has work was not heard of for `limit_s`.

    It sees what the engine's own watchdog cannot: a process that is stopped, or stuck outside its steps.
    """

    def __init__(self, limit_s: float, is_busy: Callable[[], bool], on_silence: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._is_busy = is_busy
        self._on_silence = on_silence
        self._last_heard_s = time.monotonic()
        self._stopping = threading.Event()
        threading.Thread(target=self._watch, name="silence-watchdog", daemon=True).start()

    def heard(self) -> None:
        """The engine has given a sign of life."""
        self._last_heard_s = time.monotonic()

    def stop(self) -> None:
        """Watch no longer; idempotent."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(min(MAX_POLL_INTERVAL_S, self._limit_s / 4)):
            if not self._is_busy():
                self.heard()  # an idle engine has nothing to say
            elif time.monotonic() - self._last_heard_s > self._limit_s:
                self._on_silence()
                return
