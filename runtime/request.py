"""What a caller asks for, from the Triton adapter down to the engine core. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
# Why there was an error: the request itself, no room for it now, its timeout, or the server.
ErrorKind = Literal["request", "capacity", "timeout", "server"]

GuidedKind = Literal["json", "json_schema", "regex", "ebnf", "choice"]


@dataclass(frozen=True, slots=True)
class GuidedDecoding:
    """What the answer has to look like.

    `guide` is the schema, regular expression or grammar (in xgrammar's EBNF) as text; a JSON list of strings
    for "choice"; empty for "json", which allows any JSON.
    """

    kind: GuidedKind
    guide: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop. The defaults switch everything off: greedy.

    Filters apply in the order of transformers' logits processors: penalties, n-grams, bad words, min_tokens,
    bias, grammar, temperature, top-k, top-p, min-p, typical-p.
    """

    max_tokens: int = 16
    min_tokens: int = 0  # no stop token before; stop strings are not looked for before either
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # of tokens in prompt and answer
    presence_penalty: float = 0.0  # of tokens in the answer
    frequency_penalty: float = 0.0  # likewise, for each occurrence
    no_repeat_ngram_size: int = 0  # 0: off
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # never generated; made of bad_words too
    seed: int | None = None  # None: drawn when the request arrives
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1  # answers to the prompt, each with random numbers of its own
    beam_width: int = 1  # above 1: beam search, which returns the n best beams
    length_penalty: float = 1.0  # of beam search: a beam's score is divided by its length to this power
    logprobs: int | None = None  # of each generated token, and of so many likeliest ones beside it
    prompt_logprobs: int | None = None  # likewise of each prompt token but the first
    guided: GuidedDecoding | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request: a prompt as text or as token ids, and how to continue it."""

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0  # lower goes first
    timeout_s: float | None = None  # from arrival to the last token; None: the model's default
    cache_salt: str = ""  # only requests with the same salt share cached prefixes


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A tokenized request as the engine core takes it.

    `sampling.seed` is set if there is a temperature; `stop` and `bad_words` are not looked at: strings are
    handled where text exists, beside the detokenizer. Beam search is not the core's either: it is many
    requests of one token.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
