"""Beam search over an engine that knows none: each beam's next token is a request of its own.

A beam's prompt is cached up to its last block, so that such a request costs about one decode.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trtforge.errors import CapacityError, RequestError, TrtforgeError
from trtforge.runtime.beam_selection import BeamSelection, Hypothesis
from trtforge.runtime.engine.request_stream import OnOutput
from trtforge.runtime.outputs import GenerationOutput, RequestStart, TokenLogprobs
from trtforge.runtime.request import ErrorKind, FinishReason, GenerationRequest, SamplingParams

MAX_BEAM_WIDTH = 16
MAX_BEAM_STOP_TOKEN_IDS = 16

# What may be set beside beam_width; the rest would change logits, which beam search takes as they are.
_ALLOWED = frozenset(
    (
        *("max_tokens", "min_tokens", "seed", "stop_token_ids", "ignore_eos", "n"),
        *("beam_width", "length_penalty", "logprobs", "top_k", "top_p", "min_p", "typical_p"),
    )
)


def check_beam_search(sampling: SamplingParams) -> None:
    """Raise RequestError for what beam search does not do."""
    if sampling.beam_width > MAX_BEAM_WIDTH:
        raise RequestError(f"beam_width is {sampling.beam_width}: it has to be from 1 to {MAX_BEAM_WIDTH}")
    if sampling.n > sampling.beam_width:
        raise RequestError(f"n is {sampling.n}: it has to be at most beam_width, {sampling.beam_width}")
    if len(sampling.stop_token_ids) > MAX_BEAM_STOP_TOKEN_IDS:
        raise RequestError(
            f"there are {len(sampling.stop_token_ids)} stop_token_ids: beam search takes at most "
            f"{MAX_BEAM_STOP_TOKEN_IDS}"
        )
    off = SamplingParams()
    for name in SamplingParams.__slots__:
        value = getattr(sampling, name)
        if name not in _ALLOWED and value != getattr(off, name):
            raise RequestError(
                f"{name} is given with beam_width {sampling.beam_width}: leave one of them out"
            )


@dataclass(frozen=True, slots=True)
class BeamSearchModel:
    """What a beam search needs of the model and its engine client."""

    submit: Callable[[GenerationRequest, OnOutput], None]
    cancel: Callable[[str], None]
    decode: Callable[[tuple[int, ...]], str]
    eos_token_ids: tuple[int, ...]
    max_model_len: int


class BeamSearch:
    """One request answered by beam search: an output for each of its n answers, all at the end.

    Outputs come from the thread that the requests' outputs come from. `cancel` may be called by any.
    """

    def __init__(
        self,
        model: BeamSearchModel,
        request: GenerationRequest,
        prompt: tuple[int, ...],
        on_output: OnOutput,
    ) -> None:
        """Raises RequestError for what beam search does not do."""
        sampling = request.sampling
        check_beam_search(sampling)
        self._model = model
        self._request = request
        self._prompt = prompt
        self._on_output = on_output
        self._deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        eos = () if sampling.ignore_eos else model.eos_token_ids
        self._stop_token_ids = frozenset(eos + sampling.stop_token_ids)
        self._selection = BeamSelection(
            sampling.beam_width,
            min(sampling.max_tokens, model.max_model_len - len(prompt)),
            self._stop_token_ids,
            sampling.length_penalty,
            sampling.min_tokens,
        )
        self._start: RequestStart | None = None
        self._num_steps = 0
        self._candidates: list[tuple[tuple[int, float], ...]] = []  # one for each beam; empty: not known yet
        self._num_missing = 0
        self._is_over = False
        # Guards the list of requests in flight against `cancel`.
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._in_flight: list[str] = []

    def start(self) -> None:
        """Submit the first step. Raises what submitting a request raises."""
        self._submit_step()

    def cancel(self) -> None:
        """End the search; its last output has finish_reason "cancelled"."""
        with self._lock:
            self._is_cancelled = True
            for request_id in self._in_flight:
                self._model.cancel(request_id)

    def _submit_step(self) -> None:
        beams = self._selection.running
        sampling = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=self._selection.num_candidates)
        timeout_s = None
        if self._deadline is not None:
            timeout_s = max(self._deadline - time.monotonic(), 0.001)
        self._num_steps += 1
        self._num_missing = len(beams)
        self._candidates = [()] * len(beams)
        with self._lock:
            self._in_flight.clear()
            for position, beam in enumerate(beams):
                request_id = f"{self._request.request_id}/{self._num_steps}.{position}"
                step = GenerationRequest(
                    request_id,
                    self._prompt + beam.token_ids,
                    sampling,
                    self._request.priority,
                    timeout_s,
                    self._request.cache_salt,
                )
                self._model.submit(step, partial(self._take, position))
                self._in_flight.append(request_id)
                if self._is_cancelled:
                    self._model.cancel(request_id)

    def _take(self, position: int, output: GenerationOutput) -> None:
        if self._is_over:
            return
        if output.finish_reason in ("error", "cancelled"):
            self._fail(output.finish_reason, output.error, output.error_kind)
            return
        if output.start is not None and self._start is None:
            self._start = output.start
        if output.logprobs:
            self._candidates[position] = output.logprobs[0].top
        if not output.is_final:
            return
        self._num_missing -= 1
        if self._num_missing:
            return
        try:
            self._advance()
        except CapacityError as error:
            self._fail("error", str(error), "capacity")
        except TrtforgeError as error:
            self._fail("error", str(error), "server")

    def _advance(self) -> None:
        self._selection.advance(self._candidates)
        if self._is_cancelled:
            self._fail("cancelled", None, "server")
        elif self._selection.is_over:
            self._finish()
        else:
            self._submit_step()

    def _finish(self) -> None:
        self._is_over = True
        hypotheses = self._selection.best(self._request.sampling.n)
        if not hypotheses:
            self._on_output(self._last("error", error="beam search found no continuation"))
        for index, hypothesis in enumerate(hypotheses):
            is_final = index == len(hypotheses) - 1
            self._on_output(self._answer(index, hypothesis, is_final=is_final))

    def _answer(self, index: int, hypothesis: Hypothesis, *, is_final: bool) -> GenerationOutput:
        beam = hypothesis.beam
        stopped = beam.token_ids[-1] in self._stop_token_ids
        num_top = self._request.sampling.logprobs
        logprobs: tuple[TokenLogprobs, ...] | None = None
        if num_top is not None:
            logprobs = tuple(
                TokenLogprobs(entry.token_id, entry.logprob, entry.rank, entry.top[:num_top])
                for entry in beam.logprobs
            )
        return GenerationOutput(
            self._request.request_id,
            self._model.decode(beam.token_ids[:-1] if stopped else beam.token_ids),
            beam.token_ids,
            "stop" if stopped else "length",
            len(self._prompt),
            len(beam.token_ids),
            index=index,
            is_final=is_final,
            logprobs=logprobs,
            cumulative_logprob=beam.cumulative_logprob,
            start=self._start if index == 0 else None,
        )

    def _fail(self, reason: FinishReason, error: str | None, error_kind: ErrorKind) -> None:
        self._is_over = True
        self.cancel()
        self._on_output(self._last(reason, error, error_kind))

    def _last(
        self, reason: FinishReason, error: str | None = None, error_kind: ErrorKind = "server"
    ) -> GenerationOutput:
        return GenerationOutput(
            self._request.request_id,
            "",
            (),
            reason,
            len(self._prompt),
            self._num_steps - 1,
            is_final=True,
            error=error,
            error_kind=error_kind,
        )


class BeamSearches:
    """The beam searches that are going on, by request id. Any thread may start and cancel."""

    def __init__(self, model: BeamSearchModel) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._searches: dict[str, BeamSearch] = {}

    def start(self, request: GenerationRequest, prompt: tuple[int, ...], on_output: OnOutput) -> None:
        """Start a search. Raises what submitting a request raises."""

        def deliver(output: GenerationOutput) -> None:
            if output.is_final:
                self._forget(request.request_id)
            on_output(output)

        search = BeamSearch(self._model, request, prompt, deliver)
        with self._lock:
            if request.request_id in self._searches:
                raise RequestError(f"request id {request.request_id!r} is in use: give each request its own")
            self._searches[request.request_id] = search
        try:
            search.start()
        except TrtforgeError:
            self._forget(request.request_id)
            raise

    def cancel(self, request_id: str) -> bool:
        """Cancel the search of this id; False if there is none."""
        with self._lock:
            search = self._searches.get(request_id)
        if search is not None:
            search.cancel()
        return search is not None

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._searches.pop(request_id, None)
