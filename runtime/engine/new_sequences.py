"""From a request to the sequences that run: its checks, and what its answers are sampled with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtforge.errors import RequestError
from trtforge.runtime.request import EngineRequest
from trtforge.runtime.sampling.params import check_sampling_params
from trtforge.runtime.sampling.state import SamplingState, needs_state
from trtforge.runtime.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from trtforge.runtime.sampling.grammar import CompiledGrammar


@dataclass(frozen=True, slots=True)
class NewSequences:
    """Makes the sequences of requests to one model."""

    vocab_size: int
    max_model_len: int  # tokens
    eos_token_ids: tuple[int, ...]

    def make(self, request: EngineRequest, grammar: CompiledGrammar | None, arrival: int) -> Sequence:
        """The sequence of the first answer, with those of the others as its followers. `arrival` is the
        request's place among all.

        Raises RequestError for a prompt that is empty, too long or has unknown tokens, and for sampling
        parameters out of range.
        """
        self._check_prompt(request.prompt_token_ids)
        check_sampling_params(request.sampling, self.vocab_size)
        sequence = Sequence.from_request(request, self.eos_token_ids, self.max_model_len, arrival)
        if needs_state(sequence.sampling):
            for answer in (sequence, *sequence.followers):
                answer.sampling_state = _sampling_state(answer, grammar)
        return sequence

    def _check_prompt(self, prompt_token_ids: tuple[int, ...]) -> None:
        if not prompt_token_ids:
            raise RequestError("the prompt is empty; it needs at least one token")
        if len(prompt_token_ids) + 1 > self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt_token_ids)} tokens; the model takes at most "
                f"{self.max_model_len - 1}, and one to generate"
            )
        for token_id in (min(prompt_token_ids), max(prompt_token_ids)):
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"prompt token id {token_id} is not in the vocabulary, 0 to {self.vocab_size - 1}"
                )


def _sampling_state(answer: Sequence, grammar: CompiledGrammar | None) -> SamplingState:
    params = answer.sampling
    if params.seed is not None:  # 64 bits of the key of 128 are the caller's
        params = replace(params, seed=params.seed | answer.index << 64)
    matcher = None if grammar is None else grammar.matcher()
    return SamplingState(params, answer.token_ids, answer.num_prompt_tokens, answer.stop_token_ids, matcher)
