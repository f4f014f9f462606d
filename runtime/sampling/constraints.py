"""Options that forbid tokens or shift their logits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import Float32Array
from trtforge.runtime.sampling.processor import History, LogitsProcessor


class NoRepeatNGrams(LogitsProcessor):
    """No n-gram of prompt and answer occurs twice: transformers' NoRepeatNGramLogitsProcessor.

    Comparing the whole history with its end is a few passes over an array, less than keeping an index of
    n-grams costs, which drafts would have to enter and leave.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def apply(self, logits: Float32Array, history: History) -> None:
        if history.length < self._size:
            return
        token_ids = history.last(history.length)
        num_windows = len(token_ids) - self._size + 1
        prefix = token_ids[num_windows:]
        last = self._size - 1
        if last == 0:
            starts = np.arange(num_windows)
        else:  # by the prefix's last token first, which leaves few
            starts = np.flatnonzero(token_ids[last - 1 : last - 1 + num_windows] == prefix[-1])
        for offset in range(last - 1):
            starts = starts[token_ids[starts + offset] == prefix[offset]]
        logits[token_ids[starts + last]] = -np.inf


class BadWords(LogitsProcessor):
    """Token sequences that are never completed: transformers' NoBadWordsLogitsProcessor.

    Like there, a word that is one stop token is left out: a sequence has to be able to end.
    """

    def __init__(self, words: Iterable[tuple[int, ...]], stop_token_ids: Collection[int]) -> None:
        by_length: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        for word in words:
            if len(word) > 1 or word[0] not in stop_token_ids:
                by_length[len(word) - 1].append(word)
        self._words = {length: np.array(same, np.int64) for length, same in by_length.items()}

    def apply(self, logits: Float32Array, history: History) -> None:
        for prefix_length, words in self._words.items():
            if prefix_length > history.length:
                continue
            matches = (words[:, :-1] == history.last(prefix_length)).all(axis=1)
            logits[words[matches, -1]] = -np.inf


class MinTokens(LogitsProcessor):
    """No stop token before the answer has `min_tokens`: transformers' MinNewTokensLengthLogitsProcessor."""

    def __init__(self, min_tokens: int, stop_token_ids: Collection[int]) -> None:
        self._min_tokens = min_tokens
        self._stop_token_ids = np.fromiter(stop_token_ids, np.int64, len(stop_token_ids))

    def apply(self, logits: Float32Array, history: History) -> None:
        if history.position < self._min_tokens:
            # A model's own end of sequence may lie beyond what it computes.
            logits[self._stop_token_ids[self._stop_token_ids < logits.size]] = -np.inf


class LogitBias(LogitsProcessor):
    """Numbers added to the logits of some tokens."""

    def __init__(self, bias: Collection[tuple[int, float]]) -> None:
        """`bias` are pairs of token id and number, each id once."""
        self._token_ids = np.array([token_id for token_id, _ in bias], np.int64)
        self._values: npt.NDArray[np.float32] = np.array([value for _, value in bias], np.float32)

    def apply(self, logits: Float32Array, history: History) -> None:
        logits[self._token_ids] += self._values
