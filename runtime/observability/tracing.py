"""OpenTelemetry spans of requests, below those that Triton makes when it traces.

Needs the extra `tracing`. Where spans go is told by OpenTelemetry's own environment variables.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from typing import Any

from trtforge.runtime.observability.request_record import RequestRecord

logger = logging.getLogger(__name__)

NS = 1_000_000_000


class Tracer:
    """Sends the spans of requests whose trace context is known, from a thread of its own."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._sdk: _Sdk | None = None
        self._is_missing = False

    def trace(self, record: RequestRecord) -> None:
        """Make the spans of a request that has ended, unless Triton does not trace it."""
        if record.trace_context is None or self._is_missing:
            return
        if self._sdk is None:
            # Only now: the packages are optional, and not small.
            if importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is None:
                self._is_missing = True
                logger.warning(
                    "Triton traces requests, their own spans need: pip install 'trtforge[tracing]'"
                )
                return
            self._sdk = _Sdk()
        self._sdk.send(json.loads(record.trace_context), self._model_name, record)

    def close(self) -> None:
        """Send what is left."""
        if self._sdk is not None:
            self._sdk.provider.shutdown()


class _Sdk:
    """The one place that knows OpenTelemetry's packages."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = TracerProvider()
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self.provider.get_tracer("trtforge")
        self._extract = TraceContextTextMapPropagator().extract
        self._error = Status(StatusCode.ERROR)

    def send(self, carrier: dict[str, str], model_name: str, record: RequestRecord) -> None:
        context = self._extract(carrier)
        phases = phases_ns(record)
        for position, (name, start_ns, end_ns) in enumerate(phases, start=1):
            is_last = position == len(phases)
            span = self._tracer.start_span(
                name,
                context,
                start_time=start_ns,
                attributes=_attributes(name, model_name, record, is_last=is_last),
            )
            if is_last and record.error_kind is not None:
                span.set_status(self._error)
            span.end(end_ns)


def phases_ns(record: RequestRecord) -> list[tuple[str, int, int]]:
    """Name, start and end of what the request went through, in nanoseconds of Unix time.

    Of a request without a first token nothing is known but when it came and ended: that is one "queue".
    """
    if record.end_s is None:
        return []
    if record.queue_s is None or record.first_token_s is None:
        ends = [("queue", record.end_s)]
    else:
        scheduled_s = record.arrival_s + record.queue_s
        ends = [
            ("queue", scheduled_s),
            ("prefill", record.first_token_s),
            ("decode", record.end_s),
        ]
    phases = []
    start_ns = record.arrival_unix_ns
    for name, end_s in ends:
        end_ns = record.arrival_unix_ns + int((end_s - record.arrival_s) * NS)
        phases.append((name, start_ns, end_ns))
        start_ns = end_ns
    return phases


def _attributes(name: str, model_name: str, record: RequestRecord, *, is_last: bool) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": model_name,
        "trtforge.request_id": record.request_id,
    }
    if record.client_id:
        attributes["triton.request_id"] = record.client_id
    if name == "prefill":
        attributes["gen_ai.usage.input_tokens"] = record.num_prompt_tokens
        attributes["gen_ai.usage.cache_read.input_tokens"] = record.num_cached_tokens
    if name == "decode":
        attributes["gen_ai.usage.output_tokens"] = record.num_generated_tokens
    if is_last:
        attributes["gen_ai.response.finish_reasons"] = (record.finish_reason or "",)
        if record.error_kind is not None:
            attributes["error.type"] = record.error_kind
    return attributes
