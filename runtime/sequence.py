"""A request's life inside the engine core: its tokens, how many are in the cache, and where."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal

from trtforge.runtime.request import EngineRequest, FinishReason, SamplingParams

SequenceStatus = Literal["waiting", "running", "preempted", "finished"]


def _empty_block_table() -> array[int]:
    return array("i")


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and generated tokens of one request, and its place in the paged cache.

    Tokens and blocks are C ints, so that a step's inputs are joined from memory and not converted
    one by one. `token_ids` only grows. `block_table` only grows while the sequence runs; preemption
    empties it and sets `num_computed_tokens` to 0, after which prompt and generated tokens are
    computed again like a prompt.
    """

    request_id: str
    token_ids: array[int]  # prompt, then generated
    num_prompt_tokens: int
    max_num_tokens: int  # prompt included
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    num_computed_tokens: int = 0  # leading tokens whose keys and values are in the cache
    block_table: array[int] = field(default_factory=_empty_block_table)
    status: SequenceStatus = "waiting"

    @classmethod
    def from_request(
        cls, request: EngineRequest, eos_token_ids: tuple[int, ...], max_model_len: int
    ) -> Sequence:
        """A waiting sequence. `max_tokens` is cut to what `max_model_len` leaves after the prompt."""
        sampling = request.sampling
        num_prompt_tokens = len(request.prompt_token_ids)
        eos = () if sampling.ignore_eos else eos_token_ids
        return cls(
            request_id=request.request_id,
            token_ids=array("i", request.prompt_token_ids),
            num_prompt_tokens=num_prompt_tokens,
            max_num_tokens=min(num_prompt_tokens + sampling.max_tokens, max_model_len),
            sampling=sampling,
            stop_token_ids=frozenset(eos + sampling.stop_token_ids),
        )

    @property
    def num_generated_tokens(self) -> int:
        """Tokens sampled so far; also the position of the next one in the request's random stream."""
        return len(self.token_ids) - self.num_prompt_tokens

    def advance(self, num_tokens: int) -> bool:
        """Count `num_tokens` more tokens as computed.

        Returns whether all known tokens are: only then do the step's logits give the next one.
        """
        self.num_computed_tokens += num_tokens
        return self.num_computed_tokens == len(self.token_ids)

    def finish_reason(self) -> FinishReason | None:
        """Why the last token ends the sequence, or None."""
        if self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        if len(self.token_ids) >= self.max_num_tokens:
            return "length"
        return None
