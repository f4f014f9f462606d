"""Spans of requests on a real tritonserver that traces, with the fake executor behind it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from trtforge.client.triton_server import Ports, TritonServer

pytestmark = pytest.mark.e2e

TIMEOUT_S = 60
ANY_FREE_PORTS = Ports(http=0, grpc=0, metrics=0)


class Collector:
    """Takes the spans that are posted to it in OTLP, as JSON (Triton) or protobuf (ours)."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.add(body, self.headers["Content-Type"])
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Nobody wants to know."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add(self, body: bytes, content_type: str) -> None:
        if content_type == "application/json":
            found = json.loads(body)["resourceSpans"]
            for resource in found:
                for scope in resource["scopeSpans"]:
                    self.spans += scope["spans"]
            return
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans += [
                    {
                        "name": span.name,
                        "traceId": span.trace_id.hex(),
                        "spanId": span.span_id.hex(),
                        "parentSpanId": span.parent_span_id.hex(),
                        "startTimeUnixNano": span.start_time_unix_nano,
                        "endTimeUnixNano": span.end_time_unix_nano,
                        "attributes": {pair.key: plain(pair.value) for pair in span.attributes},
                        "is_error": span.status.code == span.status.STATUS_CODE_ERROR,
                    }
                    for span in scope.spans
                ]

    def of(self, trace_id: str, name: str) -> dict[str, Any]:
        """The one span of that name in a trace, when it comes."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            found = [span for span in self.spans if (span["traceId"], span["name"]) == (trace_id, name)]
            if found:
                (span,) = found
                return span
            time.sleep(0.1)
        raise AssertionError(f"no span {name!r} of trace {trace_id} in {self.spans}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(item) for item in value.array_value.values]
    return getattr(value, kind)


class TracingServer(TritonServer):
    """A tritonserver that traces every request."""

    collector_url = ""

    def _options(self, shm_prefix: str) -> list[str]:
        return [
            *super()._options(shm_prefix),
            "--trace-config=mode=opentelemetry",
            "--trace-config=rate=1",
            "--trace-config=level=TIMESTAMPS",
            f"--trace-config=opentelemetry,url={self.collector_url}",
            "--trace-config=opentelemetry,bsp_schedule_delay=200",
        ]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def tracing_server(fake_repository: Path, collector: Collector) -> Iterator[TritonServer]:
    server = TracingServer(fake_repository, ports=ANY_FREE_PORTS, exit_timeout_s=5.0)
    server.collector_url = collector.url
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with server:
            yield server


def triton_input(name: str, values: list[int]) -> triton.InferInput:
    tensor = triton.InferInput(name, [len(values)], "INT32")
    tensor.set_data_from_numpy(np.array(values, np.int32))
    return tensor


def ask_traced(server: TritonServer, trace_id: str, **tensors: list[int]) -> None:
    done = threading.Event()
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    with triton.InferenceServerClient(server.grpc_url) as stub:
        stub.start_stream(lambda result, error: done.set(), headers=headers)
        inputs = [triton_input(name, values) for name, values in tensors.items()]
        stub.async_stream_infer("llm", inputs, request_id="traced")
        assert done.wait(TIMEOUT_S)


def test_spans_are_children_of_tritons(tracing_server: TritonServer, collector: Collector) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    ask_traced(tracing_server, trace_id, input_ids=[1, 2, 3], max_tokens=[4])
    queue, prefill, decode = (collector.of(trace_id, name) for name in ("queue", "prefill", "decode"))
    parent = collector.of(trace_id, "llm")
    assert {span["parentSpanId"] for span in (queue, prefill, decode)} == {parent["spanId"]}
    assert int(parent["startTimeUnixNano"]) <= queue["startTimeUnixNano"]
    assert queue["endTimeUnixNano"] == prefill["startTimeUnixNano"]
    assert prefill["endTimeUnixNano"] == decode["startTimeUnixNano"] <= decode["endTimeUnixNano"]
    assert prefill["attributes"]["gen_ai.usage.input_tokens"] == 3
    assert decode["attributes"]["gen_ai.usage.output_tokens"] == 4
    assert decode["attributes"]["gen_ai.response.finish_reasons"] == ["length"]
    assert decode["attributes"]["triton.request_id"] == "traced"
    assert not decode["is_error"]


def test_a_refused_request_has_one_span_with_the_error(
    tracing_server: TritonServer, collector: Collector
) -> None:
    trace_id = "1af7651916cd43dd8448eb211c80319c"
    ask_traced(tracing_server, trace_id, input_ids=[1, 2, 3], max_tokens=[-4])
    queue = collector.of(trace_id, "queue")
    assert queue["is_error"]
    assert queue["attributes"]["error.type"] == "request"
