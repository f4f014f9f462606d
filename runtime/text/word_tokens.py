"""Words of a request as token ids, in each form in which a model could write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text."""
        ...


def word_forms(tokenizer: Encoder, word: str) -> tuple[tuple[int, ...], ...]:
    """Token ids of a word where a text starts with it, and after a space; once if they are the same."""
    bare = word.lstrip(" ") or word
    forms = (tokenizer.encode(text, add_special_tokens=False) for text in (bare, f" {bare}"))
    return tuple(dict.fromkeys(form for form in forms if form))


def bad_words_token_ids(tokenizer: Encoder, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """All forms of all words: sequences of tokens that must not be generated."""
    return tuple(dict.fromkeys(form for word in words for form in word_forms(tokenizer, word)))


def word_biases(tokenizer: Encoder, words: Iterable[tuple[str, float]]) -> dict[int, float]:
    """What is added to the logit of each token that occurs in any form of a word.

    Every token of a word gets the word's whole bias, as TensorRT-LLM does it.
    """
    biases: dict[int, float] = {}
    for word, bias in words:
        for token_id in {token_id for form in word_forms(tokenizer, word) for token_id in form}:
            biases[token_id] = biases.get(token_id, 0.0) + bias
    return biases
