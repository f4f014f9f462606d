"""Guesses the next tokens of sequences, for the model to check in one step."""

from __future__ import annotations

from array import array
from typing import Protocol


class Drafter(Protocol):
    """Proposes tokens. Whatever it proposes, the tokens that come out are the same: see `EngineCore`."""

    def propose(self, token_ids: array[int], max_tokens: int) -> list[int]:
        """Up to `max_tokens` tokens that may follow `token_ids`."""
        ...


class PromptLookup:
    """What followed the last time that the sequence's own last tokens stood in it.

    The longest run of `max_ngram` down to `min_ngram` last tokens that occurs before is taken, at its latest
    occurrence. Saxena, Prompt Lookup Decoding (2023).
    """

    def __init__(self, max_ngram: int, min_ngram: int = 2) -> None:
        self._ngrams = range(max_ngram, min(min_ngram, max_ngram) - 1, -1)

    def propose(self, token_ids: array[int], max_tokens: int) -> list[int]:
        """Copy what followed; nothing if the last tokens stand there for the first time."""
        if max_tokens <= 0:
            return []
        text = token_ids.tobytes()
        size = token_ids.itemsize
        for length in self._ngrams:
            if length >= len(token_ids):
                continue
            end = len(text) - size  # the run itself ends at len(text)
            ngram = text[len(text) - length * size :]
            start = text.rfind(ngram, 0, end)
            while start > 0 and start % size:  # found across the borders of tokens
                start = text.rfind(ngram, 0, start + len(ngram) - 1)
            if start >= 0 and start % size == 0:
                following = start // size + length
                return token_ids[following : following + max_tokens].tolist()
        return []
