"""What becomes of one request, from its arrival to its end: for metrics, the log and traces."""

from __future__ import annotations

import time

from trtforge.errors import CapacityError, RequestError
from trtforge.runtime.observability.metrics import Metrics
from trtforge.runtime.outputs import GenerationOutput
from trtforge.runtime.request import ErrorKind, FinishReason


class RequestRecord:
    """Times of one request, in seconds of the monotonic clock. `observe` is called by one thread."""

    __slots__ = (
        *("_last_token_s", "_metrics", "arrival_s", "arrival_unix_ns", "client_id", "end_s", "error_kind"),
        *("finish_reason", "first_token_s", "is_undeliverable", "num_cached_tokens", "num_generated_tokens"),
        *("num_prompt_tokens", "queue_s", "request_id", "trace_context"),
    )

    def __init__(
        self, metrics: Metrics, request_id: str, client_id: str, trace_context: str | None = None
    ) -> None:
        """The request arrives now. `client_id` is what its client calls it; `trace_context` is Triton's."""
        self._metrics = metrics
        self._last_token_s: dict[int, float] = {}  # of each answer
        self.request_id = request_id
        self.client_id = client_id
        self.trace_context = trace_context
        self.arrival_s = time.monotonic()
        self.arrival_unix_ns = time.time_ns()
        self.queue_s: float | None = None  # None: it was not scheduled
        self.first_token_s: float | None = None
        self.end_s: float | None = None
        self.finish_reason: FinishReason | None = None
        self.error_kind: ErrorKind | None = None
        self.is_undeliverable = False  # a response could not be sent: the request is being cancelled
        self.num_prompt_tokens = 0  # 0: not known yet
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0

    def observe(self, output: GenerationOutput) -> bool:
        """Take an output when it arrives; whether it is the last. Each token passes here."""
        num_tokens = len(output.token_ids)
        now_s = time.monotonic()
        if output.start is not None:
            self._begin(output, now_s)
        if num_tokens:
            last_s = self._last_token_s.get(output.index)
            if last_s is not None:
                # Tokens that come together share the time since the one before them.
                self._metrics.inter_token_latency.observe((now_s - last_s) / num_tokens, num_tokens)
            self._last_token_s[output.index] = now_s
            self.num_generated_tokens += num_tokens
            self._metrics.generation_tokens.value += num_tokens
        if output.is_final:
            self.num_prompt_tokens = output.num_prompt_tokens
            if self.is_undeliverable:
                self._end("error", now_s, "server")
            else:
                self._end(output.finish_reason, now_s, output.error_kind)
        return output.is_final

    def refuse(self, error: Exception) -> None:
        """The request ends before the engine has it."""
        kind: ErrorKind = "server"
        if isinstance(error, RequestError):
            kind = "request"
        elif isinstance(error, CapacityError):
            kind = "capacity"
        self._end("error", time.monotonic(), kind)

    def count_end(self) -> None:
        """Count the request among those that have ended as it has."""
        metrics = self._metrics
        if self.error_kind is not None:
            metrics.failed[self.error_kind].add()
        elif self.finish_reason == "cancelled":
            metrics.cancelled.add()
        elif self.finish_reason is not None and self.end_s is not None:
            metrics.success[self.finish_reason].add()
            metrics.e2e_latency.observe(self.end_s - self.arrival_s)
            if self.first_token_s is not None:
                metrics.decode_time.observe(self.end_s - self.first_token_s)
            metrics.request_prompt_tokens.observe(self.num_prompt_tokens)
            metrics.request_generation_tokens.observe(self.num_generated_tokens)

    def _begin(self, output: GenerationOutput, now_s: float) -> None:
        if output.start is None:
            return
        self.first_token_s = now_s
        self.queue_s = output.start.queue_s
        self.num_cached_tokens = output.start.num_cached_tokens
        first_token_after_s = now_s - self.arrival_s
        metrics = self._metrics
        metrics.prompt_tokens.value += output.num_prompt_tokens
        metrics.time_to_first_token.observe(first_token_after_s)
        metrics.queue_time.observe(self.queue_s)
        metrics.prefill_time.observe(max(first_token_after_s - self.queue_s, 0.0))

    def _end(self, reason: FinishReason | None, now_s: float, error_kind: ErrorKind) -> None:
        self.end_s = now_s
        self.finish_reason = reason
        if reason == "error":
            self.error_kind = error_kind
