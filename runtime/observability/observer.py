"""Who sees every request of a served model, and tells it to the metrics, the log and the tracer."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from trtforge.runtime.engine.client import EngineClient
from trtforge.runtime.observability.metrics import Metrics
from trtforge.runtime.observability.request_log import log_request
from trtforge.runtime.observability.request_record import RequestRecord
from trtforge.runtime.observability.tracing import Tracer
from trtforge.runtime.outputs import GenerationOutput
from trtforge.runtime.triton.metrics import TritonMetrics

logger = logging.getLogger(__name__)

GAUGE_INTERVAL_S = 0.05  # probes look at them, and a dead engine may be back within a second
REPORT_INTERVAL_S = 1.0


class Observer:
    """Notes what happens in the threads where it happens, and reports it from one of its own: the server,
    a collector of traces or whoever reads the log may be slow."""

    def __init__(self, model_name: str) -> None:
        self.metrics = Metrics()
        instruments = self.metrics.instruments()
        self._gauges = TritonMetrics(model_name, [one for one in instruments if not one.is_counter])
        self._counters = TritonMetrics(model_name, [one for one in instruments if one.is_counter])
        self._tracer = Tracer(model_name)
        self._ended: deque[RequestRecord] = deque()
        self._stopping = threading.Event()
        self._reporter: threading.Thread | None = None

    def start(self, client: EngineClient) -> None:
        """Begin to report, the load of `client`'s engine too."""
        self._reporter = threading.Thread(target=self._run, args=(client,), name="reporter", daemon=True)
        self._reporter.start()

    def close(self) -> None:
        """Log and trace what is left."""
        self._stopping.set()
        if self._reporter is not None:
            self._reporter.join()
        self._report_ended()
        self._tracer.close()

    def arrival(self, request_id: str, client_id: str, trace_context: str | None) -> RequestRecord:
        """A request has come."""
        return RequestRecord(self.metrics, request_id, client_id, trace_context)

    def output(self, record: RequestRecord, output: GenerationOutput) -> None:
        """The engine has something for the request."""
        if record.observe(output):
            self._ended.append(record)

    def refusal(self, record: RequestRecord, error: Exception) -> None:
        """The request ends before the engine has it."""
        record.refuse(error)
        self._ended.append(record)

    def _run(self, client: EngineClient) -> None:
        next_report_s = 0.0
        while not self._stopping.wait(GAUGE_INTERVAL_S):
            now_s = time.monotonic()
            is_due = now_s >= next_report_s
            if is_due:
                next_report_s = now_s + REPORT_INTERVAL_S
            try:
                self.metrics.observe_load(
                    client.stats, is_ready=client.is_alive, num_restarts=client.num_restarts
                )
                self._gauges.publish()
                if is_due:
                    self._report_ended()
                    self._counters.publish()
            except Exception:
                # Perhaps the next time: nobody else would report.
                logger.exception("metrics, log lines or traces could not be reported")

    def _report_ended(self) -> None:
        while self._ended:
            record = self._ended.popleft()
            record.count_end()
            log_request(record)
            self._tracer.trace(record)
