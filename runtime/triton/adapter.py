"""The Triton side of the engine: requests in from the python backend, responses out through its senders."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from trtforge import wire
from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, RequestError, TrtforgeError
from trtforge.runtime.engine.client import EngineClient
from trtforge.runtime.observability.observer import Observer
from trtforge.runtime.observability.request_log import install_request_log
from trtforge.runtime.observability.request_record import RequestRecord
from trtforge.runtime.outputs import GenerationOutput
from trtforge.runtime.triton.outbox import Outbox
from trtforge.runtime.triton.requests import parse_request
from trtforge.runtime.triton.responses import Answers, Arrays
from trtforge.runtime.triton.sampling_values import ModelLimits

logger = logging.getLogger(__name__)

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

CANCELLATION_POLL_S = 0.05
# Asking a sender costs some 14 µs: with very many requests the pauses get longer, to this multiple of the
# time that the asking took.
CANCELLATION_PAUSE_RATIO = 9


class TritonPythonModel:
    """One model instance: an engine client, and the requests that it is answering.

    Triton calls `initialize`, `execute` and `finalize`; responses leave from the outbox's thread.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine on the model's version folder. An error is the reason Triton shows for the
        model not being loaded."""
        logging.basicConfig(
            level=logging.INFO,
            format="%(asctime)s %(levelname)s triton[%(process)d] %(name)s: %(message)s",
        )
        install_request_log()
        model_dir = Path(args["model_repository"]) / args["model_version"]
        self._observer = Observer(args["model_name"])
        options = _options(json.loads(args["model_config"]))
        self._client = EngineClient(model_dir, options, self._observer.metrics.observe_step)
        manifest = self._client.manifest
        self._limits = ModelLimits(manifest.model.vocab_size, manifest.limits.max_model_len)
        # Clients may use the same id twice: the engine's ids are our own.
        self._next_id = itertools.count(1)
        self._jobs: dict[str, _Job] = {}
        self._jobs_lock = threading.Lock()
        self._stopping = threading.Event()
        self._decode_token = functools.cache(lambda token_id: self._client.tokenizer.decode([token_id]))
        self._client.start()
        self._observer.start(self._client)
        self._outbox = Outbox()
        self._poller = threading.Thread(target=self._poll, name="poller", daemon=True)
        self._poller.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand the requests to the engine and return; each is answered by its own response sender."""
        for request in requests:
            self._accept(request)

    def is_ready(self) -> bool:
        """Whether requests are taken. Newer servers call it when they are asked for the model's readiness;
        2.51 does not."""
        return self._client.is_alive

    def finalize(self) -> None:
        """Stop the engine. Triton has waited for the requests in flight; what is left fails."""
        self._stopping.set()
        self._client.close()
        self._outbox.close()
        self._poller.join()
        self._observer.close()

    def _accept(self, request: Any) -> None:
        request_id = str(next(self._next_id))
        record = self._observer.arrival(request_id, request.request_id(), request.trace().get_context())
        sender = _Sender(request_id, request.get_response_sender())
        try:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            generation, options = parse_request(
                request_id,
                tensors,
                self._limits,
                self._client.tokenizer,
                json.loads(request.parameters()),
                request.timeout(),
            )
            job = _Job(self, record, sender, Answers(options, self._decode_token))
            with self._jobs_lock:
                self._jobs[request_id] = job
            mailbox = self._outbox.mailbox(job.deliver)

            def on_output(output: GenerationOutput) -> None:
                self._observer.output(record, output)
                mailbox.put(output)

            self._client.submit(generation, on_output)
        except Exception as error:
            # Whatever is wrong with this request, the others of the batch go on.
            if not isinstance(error, (RequestError, CapacityError)):
                logger.exception("request %s failed", request_id)
            self.forget(request_id)
            self._observer.refusal(record, error)
            sender.fail(error)

    def forget(self, request_id: str, *, cancel: bool = False) -> None:
        """Let go of a request that has ended, or is to be cancelled."""
        with self._jobs_lock:
            self._jobs.pop(request_id, None)
        if cancel:
            self._client.cancel(request_id)

    def _poll(self) -> None:
        pause_s = CANCELLATION_POLL_S
        while not self._stopping.wait(pause_s):
            with self._jobs_lock:
                jobs = list(self._jobs.items())
            start = time.monotonic()
            for request_id, job in jobs:
                if job.sender.was_just_cancelled():
                    self._client.cancel(request_id)
            elapsed_s = time.monotonic() - start
            pause_s = max(CANCELLATION_POLL_S, CANCELLATION_PAUSE_RATIO * elapsed_s)


class _Sender:
    """A response sender of Triton's that several threads may use, up to the final response."""

    def __init__(self, request_id: str, sender: Any) -> None:
        self._request_id = request_id
        self._sender = sender
        # The server frees what the sender refers to with the final response: nothing may be asked of it
        # at the same time or later.
        self._lock = threading.Lock()
        self._is_finished = False
        self._is_cancelled = False

    def send(self, response: Any, *, is_final: bool) -> None:
        """Send a response, unless the final one was sent."""
        with self._lock:
            if not self._is_finished:
                self._sender.send(response, flags=FINAL if is_final else 0)
                self._is_finished = is_final

    def fail(self, failure: Exception | GenerationOutput) -> None:
        """End the request with an error. What goes wrong on the way is logged: there is no other answer."""
        try:
            self.send(pb_utils.InferenceResponse(error=triton_error(failure)), is_final=True)
        except Exception:
            logger.exception("request %s could not be told that it failed", self._request_id)

    def was_just_cancelled(self) -> bool:
        """Whether the client has given up since the last call; True at most once."""
        with self._lock:
            if self._is_finished or self._is_cancelled:
                return False
            self._is_cancelled = bool(self._sender.is_cancelled())
            return self._is_cancelled


class _Job:
    """A request that the engine works on, up to its final response."""

    def __init__(
        self, model: TritonPythonModel, record: RequestRecord, sender: _Sender, answers: Answers
    ) -> None:
        self._model = model
        self._record = record
        self._request_id = record.request_id
        self.sender = sender
        self._answers = answers

    def deliver(self, outputs: Sequence[GenerationOutput]) -> None:
        """Send what has come, or keep it until the answer is whole."""
        try:
            self._send(outputs)
        except Exception as error:
            logger.exception("request %s ends: its response could not be sent", self._request_id)
            self._record.is_undeliverable = True
            self._model.forget(self._request_id, cancel=True)
            self.sender.fail(error)
        else:
            if outputs[-1].is_final:
                self._model.forget(self._request_id)

    def _send(self, outputs: Sequence[GenerationOutput]) -> None:
        last = outputs[-1]
        failure = last if last.finish_reason in ("error", "cancelled") else None
        for output in outputs[:-1] if failure else outputs:
            self._answers.add(output)
        responses = self._answers.take()
        for position, arrays in enumerate(responses, start=1):
            is_final = last.is_final and failure is None and position == len(responses)
            self.sender.send(_response(arrays), is_final=is_final)
        if failure is not None:
            self.sender.fail(failure)


def _response(arrays: Arrays) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])


def triton_error(failure: Exception | GenerationOutput) -> Any:
    """The one place where failures become Triton's error codes."""
    code: wire.ErrorCode
    match failure:
        case RequestError() | GenerationOutput(error_kind="request"):
            code = "INVALID_ARG"
        case CapacityError() | GenerationOutput(error_kind="capacity"):
            code = "UNAVAILABLE"
        case GenerationOutput(error_kind="timeout"):
            code = "TIMEOUT"
        case GenerationOutput(finish_reason="cancelled"):
            code = "CANCELLED"
        case _:
            code = "INTERNAL"
    # Triton has no code for a timeout: to it the request could succeed later.
    status = "UNAVAILABLE" if code == "TIMEOUT" else code
    return pb_utils.TritonError(
        wire.error_text(code, _message(failure)), getattr(pb_utils.TritonError, status)
    )


def _message(failure: Exception | GenerationOutput) -> str:
    if isinstance(failure, GenerationOutput):
        return failure.error or "the request was cancelled"
    if isinstance(failure, TrtforgeError):
        return str(failure)
    return f"internal error, the server's log has more: {type(failure).__name__}: {failure}"


def _options(model_config: dict[str, Any]) -> EngineOptions:
    parameters = model_config.get("parameters", {})
    values = {name: value["string_value"] for name, value in parameters.items()}
    return EngineOptions.from_parameters(values, os.environ)
