"""What a caller asks for and what it gets, from the Triton adapter down to the engine core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
# Why there was an error: the request itself, no room for it now, or the server.
ErrorKind = Literal["request", "capacity", "server"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop."""

    max_tokens: int = 16
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: drawn when the request arrives
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request: a prompt as text or as token ids, and how to continue it."""

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """What one step added to one request.

    `text` and `token_ids` are new since the previous output. The last output of a request, and only
    it, has a finish_reason; with finish_reason "error", `error` and `error_kind` say why.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_generated_tokens: int  # so far, this output included
    error: str | None = None
    error_kind: ErrorKind = "server"


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine core is."""

    num_running: int  # requests that hold cache blocks
    num_waiting: int  # requests not started yet or preempted
    num_free_blocks: int


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A tokenized request as the engine core takes it. `sampling.seed` is set; `sampling.stop` is not
    looked at: stop strings are found where text exists, beside the detokenizer."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Tokens that one step added to one request; the last one has a finish_reason.

    The stop token itself (end of sequence or one of stop_token_ids) is among the token ids.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
