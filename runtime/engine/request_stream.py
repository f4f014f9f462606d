"""A request in flight as the engine client sees it: what the engine adds to each answer, turned into text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from trtforge.runtime.outputs import EngineOutput, GenerationOutput
from trtforge.runtime.request import ErrorKind, SamplingParams
from trtforge.runtime.text.detokenizer import Detokenizer
from trtforge.runtime.text.text_stream import TextStream

OnOutput = Callable[[GenerationOutput], None]


class RequestStream:
    """A request's answers. Hundreds of them advance in every step: `advance` is written to be cheap."""

    __slots__ = ("_answers", "_num_open", "_num_prompt_tokens", "engine_id", "on_output", "request_id")

    def __init__(
        self,
        engine_id: str,
        request_id: str,
        on_output: OnOutput,
        num_prompt_tokens: int,
        sampling: SamplingParams,
        new_text_stream: Callable[[], TextStream],
    ) -> None:
        self.engine_id = engine_id
        self.request_id = request_id
        self.on_output = on_output
        self._num_prompt_tokens = num_prompt_tokens
        self._num_open = sampling.n
        self._answers: list[_Answer | None] = [  # None: ended
            _Answer(Detokenizer(new_text_stream(), sampling.stop, sampling.min_tokens))
            for _ in range(sampling.n)
        ]

    def advance(self, output: EngineOutput) -> GenerationOutput | None:
        """Take what the engine produced; the result may end an answer that the engine goes on with.

        None for an answer that has ended already.
        """
        reason = output.finish_reason
        if reason == "error" or reason == "cancelled":
            return self.failure(reason, output.error, output.error_kind)
        answer = self._answers[output.index]
        if answer is None:
            return None
        token_ids, logprobs, detokenizer = output.token_ids, output.logprobs, answer.detokenizer
        if reason is None:
            text = detokenizer.push(token_ids)
        else:
            # A stop token ends the text, it is no part of it.
            text = detokenizer.push(token_ids[:-1] if reason == "stop" else token_ids)
            text += detokenizer.finish()
        if detokenizer.stopped:
            reason = "stop"
            num_tokens = detokenizer.num_tokens - answer.num_tokens
            token_ids = token_ids[:num_tokens]
            logprobs = logprobs and logprobs[:num_tokens]
        answer.num_tokens += len(token_ids)
        if logprobs:
            answer.cumulative_logprob += sum([entry.logprob for entry in logprobs])
        if reason is not None:
            self._answers[output.index] = None
            self._num_open -= 1
        return GenerationOutput(
            self.request_id,
            text,
            token_ids,
            reason,
            self._num_prompt_tokens,
            answer.num_tokens,
            output.index,
            not self._num_open,
            None,
            "server",
            logprobs,
            output.prompt_logprobs,
            answer.cumulative_logprob,
            output.start,
        )

    def failure(
        self, reason: Literal["error", "cancelled"], error: str | None, error_kind: ErrorKind = "server"
    ) -> GenerationOutput:
        """The last output of a request whose answers end all at once."""
        first = self._answers[0]
        return GenerationOutput(
            self.request_id,
            "",
            (),
            reason,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=first.num_tokens if first else 0,
            is_final=True,
            error=error,
            error_kind=error_kind,
        )


class _Answer:
    __slots__ = ("cumulative_logprob", "detokenizer", "num_tokens")

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.detokenizer = detokenizer
        self.num_tokens = 0
        self.cumulative_logprob = 0.0
