"""What a request gets back, from the engine core up to the Triton adapter.

msgspec structs: hundreds are made in every step, and a frozen dataclass takes four times as long to make.
"""

from __future__ import annotations

import msgspec

from trtforge.runtime.request import ErrorKind, FinishReason


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Natural logarithms of the probabilities that one token had, before any filter or temperature.

    `top` are (token id, logprob) of the likeliest ones, the likeliest first, as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...] = ()


class EngineOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Tokens that one step added to one answer; the last one has a finish_reason.

    A request with n > 1 has n answers, which end one by one. The stop token itself (end of sequence or one
    of stop_token_ids) is among the token ids.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    index: int = 0  # which of the n answers
    error: str | None = None
    error_kind: ErrorKind = "server"
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one a token, if asked for
    # Of prompt tokens from the second on; in one or more outputs of their own before the first token.
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    start: RequestStart | None = None  # with the first token of answer 0


class RequestStart(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a request came to its first token."""

    queue_s: float  # from arrival to the first time it was scheduled
    num_cached_tokens: int  # prompt tokens that the prefix cache had


class GenerationOutput(msgspec.Struct, frozen=True, gc=False):
    """What one step added to one answer of a request.

    `text` and `token_ids` are new since the answer's previous output. The last output of an answer, and only
    it, has a finish_reason; the request ends with its last answer. With finish_reason "error", `error`
    and `error_kind` say why; an error or a cancellation ends all answers at once, as one output of answer 0.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_generated_tokens: int  # of this answer so far, this output included
    index: int = 0  # which of the n answers
    is_final: bool = False  # the request has no further output
    error: str | None = None
    error_kind: ErrorKind = "server"
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    cumulative_logprob: float = 0.0  # of the answer so far; 0 without logprobs
    start: RequestStart | None = None


class EngineStats(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How busy the engine core is after a step, what that step took, and sums since the core started."""

    num_running: int = 0  # sequences that hold cache blocks
    num_waiting: int = 0  # sequences not started yet or preempted
    num_blocks: int = 0
    num_free_blocks: int = 0  # no sequence holds them; cached prefixes may lie in them
    num_cached_blocks: int = 0  # hold a prefix that a request could use, whether held or not
    step_s: float = 0.0  # the whole step, 0 if none was run
    executor_s: float = 0.0  # of which the executor computed
    schedule_s: float = 0.0  # of which the scheduler chose and allocated
    num_batched_tokens: int = 0  # of the step
    num_preemptions: int = 0  # sums from here on
    num_prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # of which found
    num_swapped_blocks: int = 0  # moved to host memory
    num_draft_tokens: int = 0  # proposed by speculation
    num_accepted_tokens: int = 0  # of which the model agreed with
