from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from trtforge.runtime.scheduling.speculation import PromptLookup


def naive(tokens: list[int], max_ngram: int, max_tokens: int) -> list[int]:
    """The definition, position by position."""
    for length in range(max_ngram, 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length : start + length + max_tokens]
    return []


# Token ids whose bytes are found across the borders of others.
token_ids = st.sampled_from([0, 1, 256, 65536, 257, 65792])


@given(st.lists(token_ids, min_size=1, max_size=40), st.integers(2, 5), st.integers(0, 6))
def test_drafts_are_what_followed_the_latest_longest_match(
    tokens: list[int], max_ngram: int, max_tokens: int
) -> None:
    proposed = PromptLookup(max_ngram).propose(array("i", tokens), max_tokens)
    assert proposed == (naive(tokens, max_ngram, max_tokens) if max_tokens else [])
