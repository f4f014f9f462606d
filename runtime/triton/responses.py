"""A request's outputs as the tensors of its responses, see `wire.RESPONSE_TENSORS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trtforge.runtime.outputs import GenerationOutput, TokenLogprobs
from trtforge.runtime.triton.requests import ResponseOptions

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
DecodeToken = Callable[[int], str]

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


class Answers:
    """Collects the outputs of one request until they are sent, in the way the request asked for."""

    def __init__(self, options: ResponseOptions, decode_token: DecodeToken) -> None:
        self._options = options
        self._decode_token = decode_token
        self._answers = [_Answer(index) for index in range(options.num_answers)]
        self._news: list[_Answer] = []  # have something that was not sent, in order of arrival
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_prompt_tokens = 0
        self._num_cached_tokens: int | None = None
        self._is_final = False

    def add(self, output: GenerationOutput) -> None:
        """Take an output that is neither an error nor a cancellation."""
        self._num_prompt_tokens = output.num_prompt_tokens
        self._is_final = output.is_final
        if output.start is not None:
            self._num_cached_tokens = output.start.num_cached_tokens
        if output.prompt_logprobs is not None:
            self._prompt_logprobs += output.prompt_logprobs
        if output.token_ids or output.finish_reason is not None:
            answer = self._answers[output.index]
            if not answer.has_news:
                answer.has_news = True
                self._news.append(answer)
            answer.add(output)

    def take(self) -> list[Arrays]:
        """The responses that can be sent now: of a stream one for each answer that has something new, else
        a single one at the end."""
        if self._options.stream:
            responses = [self._response([answer], "") for answer in self._news]
        elif self._is_final:
            responses = [self._response(self._answers, self._options.prefix)]
        else:
            return []
        for answer in self._news:
            answer.clear()
        self._news.clear()
        return responses

    def _response(self, answers: Sequence[_Answer], prefix: str) -> Arrays:
        arrays: Arrays = {
            "text_output": _strings([prefix + "".join(answer.texts) for answer in answers]),
            "output_ids": _integers([token_id for answer in answers for token_id in answer.token_ids]),
        }
        for name in self._options.outputs:
            array = _OUTPUTS[name](self, answers)
            if array is not None:
                arrays[name] = array
        return arrays

    def _num_input_tokens(self, _: Sequence[_Answer]) -> Array:
        return _integers([self._num_prompt_tokens])

    def _cached_tokens(self, _: Sequence[_Answer]) -> Array | None:
        return None if self._num_cached_tokens is None else _integers([self._num_cached_tokens])

    def _token_logprobs(self, answers: Sequence[_Answer]) -> Array:
        return _strings([self._json(answer.logprobs) for answer in answers])

    def _take_prompt_logprobs(self, _: Sequence[_Answer]) -> Array | None:
        if not self._prompt_logprobs:
            return None  # they were sent with the first response
        # The first prompt token has no probability: nothing comes before it.
        text = self._json([None, *self._prompt_logprobs])
        self._prompt_logprobs.clear()
        return _strings([text])

    def _json(self, logprobs: Sequence[TokenLogprobs | None]) -> str:
        """As vLLM's backend writes them: for each token an object of the tokens that were looked at."""
        return json.dumps([None if entry is None else self._alternatives(entry) for entry in logprobs])

    def _alternatives(self, entry: TokenLogprobs) -> dict[str, dict[str, Any]]:
        tokens = [(entry.rank, entry.token_id, entry.logprob)]
        tokens += [(rank, token_id, logprob) for rank, (token_id, logprob) in enumerate(entry.top, start=1)]
        return {
            str(token_id): {
                "logprob": max(logprob, MIN_LOGPROB),
                "rank": rank,
                "decoded_token": self._decode_token(token_id),
            }
            for rank, token_id, logprob in tokens
        }


class _Answer:
    """What one answer has that was not sent."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.has_news = False
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.num_tokens = 0
        self.cumulative_logprob = 0.0
        self.finish_reason = ""

    def add(self, output: GenerationOutput) -> None:
        self.texts.append(output.text)
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs += output.logprobs
        self.num_tokens = output.num_generated_tokens
        self.cumulative_logprob = output.cumulative_logprob
        self.finish_reason = output.finish_reason or ""

    def clear(self) -> None:
        self.has_news = False
        self.texts.clear()
        self.token_ids.clear()
        self.logprobs.clear()


def _strings(texts: list[str]) -> Array:
    return np.array([text.encode() for text in texts], dtype=np.object_)


def _integers(numbers: list[int]) -> Array:
    return np.array(numbers, dtype=np.int32)


def _cumulative(_: Answers, answers: Sequence[_Answer]) -> Array:
    return np.array([answer.cumulative_logprob for answer in answers], dtype=np.float32)


def _padded(_: Answers, answers: Sequence[_Answer]) -> Array:
    """[answers, tokens of the longest]; 0 after the end of the shorter ones."""
    padded = np.zeros((len(answers), max(len(answer.logprobs) for answer in answers)), dtype=np.float32)
    for row, answer in zip(padded, answers, strict=True):
        row[: len(answer.logprobs)] = [entry.logprob for entry in answer.logprobs]
    return padded


# The tensors that are sent when they are asked for; None: not with this response.
_OUTPUTS: dict[str, Callable[[Answers, Sequence[_Answer]], Array | None]] = {
    "sequence_index": lambda _, answers: _integers([answer.index for answer in answers]),
    "finish_reason": lambda _, answers: _strings([answer.finish_reason for answer in answers]),
    "num_input_tokens": Answers._num_input_tokens,
    "num_output_tokens": lambda _, answers: _integers([answer.num_tokens for answer in answers]),
    "num_cached_tokens": Answers._cached_tokens,
    "cum_log_probs": _cumulative,
    "output_log_probs": _padded,
    "cumulative_logprob": _cumulative,
    "logprobs": Answers._token_logprobs,
    "prompt_logprobs": Answers._take_prompt_logprobs,
}
