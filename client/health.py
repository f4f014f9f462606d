"""Does a model answer? Asked by a real request for one token, since readiness does not tell."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from typing import Literal

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trtforge import wire
from trtforge.client import answers, protocol
from trtforge.client.protocol import Prompt, RequestOptions, SamplingOptions
from trtforge.client.streaming import Client
from trtforge.errors import ServerError

METRICS_TIMEOUT_S = 5.0

# "alive": the model answered, be it that it has no room. "silent": nothing came in time; a busy model may
# have it so. "refused": the server has an error of its own. "dead": its process for the model is gone.
Verdict = Literal["alive", "silent", "refused", "dead"]

# The server's words for a python model whose process it has lost.
_LOST_PROCESS = "is not healthy"
_METRIC = re.compile(r'^trtforge_.*model="([^"]*)".*$', re.MULTILINE)


def check_health(url: str, model: str | None, timeout_s: float) -> tuple[str, ...]:
    """Ask `model`, or every model of the server, for a token; returns who answered.

    Raises what the first one that does not answer within `timeout_s` raises, see `Client`, and ServerError
    if there is none.
    """
    models = (model,) if model is not None else list_models(url, timeout_s)
    if not models:
        raise ServerError(f"the server at {url} has no models")
    for name in models:
        with Client(url, name) as client:
            client.generate("Hello", sampling=SamplingOptions(max_tokens=1), timeout_s=timeout_s)
    return models


def list_models(url: str, timeout_s: float) -> tuple[str, ...]:
    """Names of the models that the server knows, ready or not; raises ServerError without a server."""
    with grpc.insecure_channel(url, options=protocol.CHANNEL_OPTIONS) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            index = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise answers.rpc_error(error, url) from error
    return tuple(sorted({model.name for model in index.models}))


def probe(url: str, model: str, timeout_s: float) -> tuple[Verdict, str]:
    """Ask for one token; the verdict, and what the server said."""
    request = protocol.infer_request(
        model,
        Prompt("Hello"),
        SamplingOptions(max_tokens=1),
        RequestOptions(),
        stream=False,
        request_id="probe",
    )
    with grpc.insecure_channel(url, options=protocol.CHANNEL_OPTIONS) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            response = next(stub.ModelStreamInfer(iter([request]), timeout=timeout_s))
        except StopIteration:
            return "refused", "the stream ended without an answer"
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return "silent", f"no answer within {timeout_s:g} s"
            return "refused", f"{error.code().name}: {error.details()}"
    code, text = wire.split_error_text(response.error_message.strip())
    if code is not None or not text:
        return "alive", text  # errors with a code come from the model's process
    return ("dead" if _LOST_PROCESS in text else "refused"), text


def read_progress(metrics_url: str) -> dict[str, list[str]]:
    """By model, the metrics that its own process sets: they change while it works."""
    text = ""
    # No metrics, no progress: whatever the reason.
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(metrics_url, timeout=METRICS_TIMEOUT_S) as page,  # noqa: S310
    ):
        text = page.read().decode()
    progress: dict[str, list[str]] = {}
    for line in _METRIC.finditer(text):
        progress.setdefault(line[1], []).append(line[0])
    return progress
