"""Keeps a server answering: notices when it is dead, although it may not know, and starts it again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from trtforge.client.health import Verdict, probe, read_progress
from trtforge.client.triton_server import TritonServer
from trtforge.errors import ServerError, TrtforgeError

PROBE_INTERVAL_S = 2.0
PROBE_TIMEOUT_S = 10.0
# This many without an answer between them are no longer a process that had to wait for the processor, or
# a lack of memory that passes.
MAX_FAILURES: dict[Verdict, int] = {"dead": 2, "refused": 5}
RESTART_DELAYS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # the last one again and again
# A server that ran for so long has not failed because of how it was started.
STABLE_S = 600.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """`max_restarts` in a row, each less than STABLE_S after the one before.

    A model that neither answers nor works for `hang_timeout_s` is dead; 0: it may hang for ever. This has
    to be longer than the model's own step_timeout_s, which is the milder remedy.
    """

    max_restarts: int = 5
    hang_timeout_s: float = 600.0


class Supervisor:
    """Runs `server` until it cannot be kept alive; `report` is told in words what happens."""

    def __init__(self, server: TritonServer, policy: RestartPolicy, report: Callable[[str], None]) -> None:
        self._server = server
        self._policy = policy
        self._report = report
        self._num_restarts = 0  # in a row

    def run(self, on_ready: Callable[[], None]) -> None:
        """Start the server and keep it answering; `on_ready` is called when it has answered first.

        Raises what entering a TritonServer raises if it cannot be started, ServerError if it failed too
        often.
        """
        with self._server:
            on_ready()
            failure, failed_s = self._watch(), time.monotonic()
        while True:
            if self._num_restarts == self._policy.max_restarts:
                raise ServerError(failure)
            delay_s = RESTART_DELAYS_S[min(self._num_restarts, len(RESTART_DELAYS_S) - 1)]
            self._num_restarts += 1
            self._report(f"{failure}\nrestart {self._num_restarts} of {self._policy.max_restarts} ...")
            time.sleep(delay_s)
            try:
                with self._server:
                    self._report(f"the server answers again, after {time.monotonic() - failed_s:.1f} s")
                    failure, failed_s = self._watch(), time.monotonic()
            except TrtforgeError as error:
                failure = str(error)

    def _watch(self) -> str:
        """Why the server has to be started again: it has ended, or was killed because a model is dead."""
        started_s = time.monotonic()
        patients = [_Patient(self._server, model, self._policy) for model in self._server.models]
        failure = ""
        while not failure:
            try:
                self._server.wait(PROBE_INTERVAL_S)
            except ServerError as error:
                failure = str(error)
                break
            progress = read_progress(self._server.metrics_url)
            failure = "; ".join(filter(None, (p.examine(progress.get(p.model)) for p in patients)))
        self._server.kill()
        if time.monotonic() - started_s > STABLE_S:
            self._num_restarts = 0
        return failure


class _Patient:
    """One model of the server, as far as it is known to live."""

    def __init__(self, server: TritonServer, model: str, policy: RestartPolicy) -> None:
        self.model = model
        self._server = server
        self._hang_timeout_s = policy.hang_timeout_s
        self._progress: list[str] | None = None
        self._probe_timeout_s = min(PROBE_TIMEOUT_S, policy.hang_timeout_s or PROBE_TIMEOUT_S)
        self._num_failures: Counter[Verdict] = Counter()  # since it was last known to live
        self._last_alive_s = time.monotonic()

    def examine(self, progress: list[str] | None) -> str:
        """What the model died of; empty if it is alive, or may be."""
        # Who is seen to work need not be asked: a probe waits behind everybody else's requests.
        is_working = progress is not None and progress != self._progress
        self._progress = progress
        if is_working:
            return self._is_alive()
        verdict, text = probe(self._server.grpc_url, self.model, self._probe_timeout_s)
        if verdict == "alive":
            return self._is_alive()
        self._num_failures[verdict] += 1
        if self._num_failures[verdict] == MAX_FAILURES.get(verdict):
            return f"model {self.model!r} is dead: {text}"
        silence_s = time.monotonic() - self._last_alive_s
        if 0 < self._hang_timeout_s < silence_s:
            return f"model {self.model!r} is dead: it neither answered nor worked for {silence_s:.0f} s"
        return ""

    def _is_alive(self) -> str:
        self._num_failures.clear()
        self._last_alive_s = time.monotonic()
        return ""
