"""Requests as users send them, made from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Means published for ShareGPT (Kwon et al., Efficient Memory Management for Large Language Model Serving
# with PagedAttention, 2023); the shape is ours: log-normal, which has the long tail of real lengths.
SHAREGPT_PROMPT_TOKENS = 161.0
SHAREGPT_ANSWER_TOKENS = 338.0
SIGMA = 1.0  # of the logarithm: the standard deviation is 1.3 times the mean


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent, and how long the answer turns out to be."""

    prompt: tuple[int, ...]
    num_answer_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system prompt, and what the user says in each turn with the length of the answer to it."""

    system_prompt: tuple[int, ...]
    turns: tuple[Request, ...]


def lengths(random: np.random.Generator, mean: float, count: int, limit: int) -> npt.NDArray[np.int64]:
    """Log-normal lengths with this mean before they are cut to 1..limit."""
    drawn = random.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA, count)
    return np.clip(drawn.round().astype(np.int64), 1, limit)


@dataclass(frozen=True, slots=True)
class Mix:
    """Independent requests of mixed lengths."""

    num_requests: int
    prompt_tokens: float
    answer_tokens: float
    max_tokens: int  # of the prompt, and of the answer
    vocab_size: int

    def make(self, seed: int, token_seed: int = 0) -> list[Request]:
        """The requests; the seed decides lengths and, with `token_seed`, tokens."""
        random = np.random.default_rng(seed)
        prompts = lengths(random, self.prompt_tokens, self.num_requests, self.max_tokens)
        answers = lengths(random, self.answer_tokens, self.num_requests, self.max_tokens)
        random = np.random.default_rng((seed, token_seed))
        return [
            Request(tuple(random.integers(3, self.vocab_size, prompt).tolist()), int(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Chats:
    """Conversations that share a system prompt; every turn sends all that was said again."""

    num_conversations: int
    num_turns: int
    system_tokens: int
    user_tokens: float
    answer_tokens: float
    vocab_size: int

    def make(self, seed: int) -> list[Conversation]:
        """The conversations; the seed decides lengths and tokens."""
        random = np.random.default_rng(seed)
        system_prompt = tuple(random.integers(3, self.vocab_size, self.system_tokens).tolist())
        mix = Mix(self.num_turns, self.user_tokens, self.answer_tokens, 512, self.vocab_size)
        return [
            Conversation(system_prompt, tuple(mix.make(int(random.integers(1 << 32)))))
            for _ in range(self.num_conversations)
        ]
