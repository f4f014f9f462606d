"""One answer in the making inside the engine core: its tokens, how many are in the cache, and where."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, Literal

from trtforge.runtime.request import EngineRequest, FinishReason, SamplingParams

SequenceStatus = Literal["waiting", "running", "preempted", "finished"]


def _empty_blocks() -> array[int]:
    return array("i")


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and generated tokens of one answer to a request, and its place in the paged cache.

    Tokens and blocks are C ints, so that a step's inputs are joined from memory and not converted one by one.

    `token_ids` ends with tokens that are not certain yet: while a step runs that will give the next token, a
    placeholder for it; in speculation the drafts that the step checks. `num_computed_tokens` counts what
    scheduled steps have put into the cache or are about to. Preemption by recompute empties `block_table` and
    sets it to 0, after which prompt and generated tokens are computed again like a prompt; preemption by swap
    moves the blocks' contents to `host_blocks` and keeps it.
    """

    request_id: str
    token_ids: array[int]  # prompt, then generated
    num_prompt_tokens: int
    max_num_tokens: int  # prompt included
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    order: tuple[int, int, int]  # (priority, arrival, index): who is scheduled first
    cache_salt: str = ""
    followers: tuple[Sequence, ...] = ()  # the other answers, until they fork off at the first token
    num_computed_tokens: int = 0
    num_draft_tokens: int = 0  # the last ones of token_ids
    block_table: array[int] = field(default_factory=_empty_blocks)
    host_blocks: array[int] = field(default_factory=_empty_blocks)
    num_safe_tokens: int = 0  # so many tokens fit its blocks, the new ones into blocks of its own
    num_released_blocks: int = 0  # leading entries of block_table that lie behind the window: not its own
    num_cached_blocks: int = 0  # leading blocks that the prefix cache has been told of
    cache_parent: int | str = ""  # what the prefix cache calls the last of them
    num_hit_tokens: int = 0  # prompt tokens that the prefix cache had at the first admission
    sampling_state: Any = None  # the sampler's; None for plain greedy decoding
    num_prompt_logprobs: int = 0  # prompt tokens whose logprobs were given out
    status: SequenceStatus = "waiting"

    @classmethod
    def from_request(
        cls, request: EngineRequest, eos_token_ids: tuple[int, ...], max_model_len: int, arrival: int = 0
    ) -> Sequence:
        """A waiting sequence, followed by those of the request's other answers.

        `max_tokens` is cut to what `max_model_len` leaves after the prompt.
        """
        sampling = request.sampling
        num_prompt_tokens = len(request.prompt_token_ids)
        eos = () if sampling.ignore_eos else eos_token_ids
        answers = [
            cls(
                request_id=request.request_id,
                token_ids=array("i", request.prompt_token_ids),
                num_prompt_tokens=num_prompt_tokens,
                max_num_tokens=min(num_prompt_tokens + sampling.max_tokens, max_model_len),
                sampling=sampling,
                stop_token_ids=frozenset(eos + sampling.stop_token_ids),
                order=(request.priority, arrival, index),
                cache_salt=request.cache_salt,
                cache_parent=request.cache_salt,
            )
            for index in range(sampling.n)
        ]
        first = answers[0]
        first.followers = tuple(answers[1:])
        return first

    @property
    def priority(self) -> int:
        """Lower goes first."""
        return self.order[0]

    @property
    def index(self) -> int:
        """Which of the request's answers this is."""
        return self.order[2]

    @property
    def num_answers(self) -> int:
        """Sequences that it stands for: itself and those that will fork off."""
        return 1 + len(self.followers)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt, uncertain ones included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of them are still to be given out, with the first answer."""
        return (
            self.sampling.prompt_logprobs is not None
            and self.num_prompt_logprobs < self.num_prompt_tokens - 1
            and self.order[2] == 0
        )

    def propose(self, draft_token_ids: list[int]) -> None:
        """Append drafts; they are taken back or confirmed when the step that checks them is over."""
        self.token_ids.extend(draft_token_ids)
        self.num_draft_tokens = len(draft_token_ids)

    def drop_drafts(self) -> None:
        """Take all drafts back."""
        if self.num_draft_tokens:
            del self.token_ids[-self.num_draft_tokens :]
            self.num_draft_tokens = 0

    def finish_reason(self) -> FinishReason | None:
        """Why the last token ends the sequence, or None."""
        if self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        if len(self.token_ids) >= self.max_num_tokens:
            return "length"
        return None
