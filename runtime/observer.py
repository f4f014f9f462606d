"""Who sees every request of a served model, and tells it to the metrics, the log and the tracer."""

from __future__ import annotations

import time
from collections import deque

from trtforge.runtime.engine_client import EngineClient
from trtforge.runtime.metrics import Metrics
from trtforge.runtime.outputs import GenerationOutput
from trtforge.runtime.request_log import log_request
from trtforge.runtime.request_record import RequestRecord
from trtforge.runtime.tracing import Tracer
from trtforge.runtime.triton_metrics import TritonMetrics

PUBLISH_INTERVAL_S = 0.5


class Observer:
    """Requests are noted by the threads that handle them; `report`, which may wait for the server, a
    collector or whoever reads the log, is called by one that may wait."""

    def __init__(self, model_name: str) -> None:
        self.metrics = Metrics()
        self._triton_metrics = TritonMetrics(model_name, self.metrics.instruments())
        self._tracer = Tracer(model_name)
        self._ended: deque[RequestRecord] = deque()
        self._next_publish_s = 0.0

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

    def report(self, client: EngineClient) -> None:
        """Log and trace the requests that have ended since, and publish all metrics now and then."""
        self._report_ended()
        now_s = time.monotonic()
        if now_s >= self._next_publish_s:
            self._next_publish_s = now_s + PUBLISH_INTERVAL_S
            self.metrics.observe_load(
                client.stats, is_ready=client.is_alive, num_restarts=client.num_restarts
            )
            self._triton_metrics.publish()

    def close(self) -> None:
        """Log and trace what is left."""
        self._report_ended()
        self._tracer.close()

    def _report_ended(self) -> None:
        while self._ended:
            record = self._ended.popleft()
            record.count_end()
            log_request(record)
            self._tracer.trace(record)
