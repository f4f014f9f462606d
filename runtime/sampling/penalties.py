"""Penalties for tokens that occur already: their logits alone are read and written."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import Float32Array
from trtforge.runtime.request import SamplingParams
from trtforge.runtime.sampling.processor import History, LogitsProcessor


class Penalties(LogitsProcessor):
    """Repetition penalty over prompt and answer, then frequency and presence penalty over the answer.

    Repetition: Keskar et al., CTRL (2019), as in transformers' RepetitionPenaltyLogitsProcessor. Frequency
    and presence: as the OpenAI API documents them.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: array[int]) -> None:
        self._repetition = np.float32(params.repetition_penalty)
        self._frequency = np.float32(params.frequency_penalty)
        self._presence = np.float32(params.presence_penalty)
        self._counts = _TokenCounts()
        if params.repetition_penalty != 1:
            self._counts.add_uncounted(np.unique(np.asarray(prompt_token_ids, dtype=np.int32)))

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Whether the request has any penalty."""
        return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0

    def apply(self, logits: Float32Array, history: History) -> None:
        token_ids, counts = self._counts.arrays(history.drafts)
        values = logits[token_ids]
        if self._repetition != 1:
            values = np.where(values < 0, values * self._repetition, values / self._repetition)
        if self._frequency:
            values -= self._frequency * counts
        if self._presence:
            values -= self._presence * (counts > 0)
        logits[token_ids] = values

    def accept(self, token_ids: Sequence[int]) -> None:
        self._counts.add(token_ids)

    def fork(self) -> Penalties:
        forked = copy.copy(self)
        forked._counts = self._counts.copy()
        return forked


class _TokenCounts:
    """The tokens that occur, in order of their first occurrence, and how often each one was added."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}  # token id: its index in the arrays
        self._token_ids = np.empty(16, np.int64)
        self._counts = np.zeros(16, np.float32)

    def copy(self) -> _TokenCounts:
        copied = _TokenCounts()
        copied._slots = self._slots.copy()
        copied._token_ids = self._token_ids.copy()
        copied._counts = self._counts.copy()
        return copied

    def add_uncounted(self, token_ids: npt.NDArray[np.int32]) -> None:
        """Let distinct tokens occur with count 0; nothing was added before."""
        self._slots = dict(zip(token_ids.tolist(), range(len(token_ids)), strict=True))
        self._token_ids = token_ids.astype(np.int64)
        self._counts = np.zeros(len(token_ids), np.float32)

    def add(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            slot = self._slots.get(token_id)
            if slot is None:
                slot = self._slots[token_id] = len(self._slots)
                if slot == len(self._counts):
                    self._grow()
                self._token_ids[slot] = token_id
            self._counts[slot] += 1

    def arrays(self, more: Sequence[int]) -> tuple[npt.NDArray[np.int64], Float32Array]:
        """Token ids and counts, as if `more` had been added. Not to be written to."""
        size = len(self._slots)
        token_ids, counts = self._token_ids[:size], self._counts[:size]
        if not more:
            return token_ids, counts
        counts = counts.copy()
        new: dict[int, int] = {}
        for token_id in more:
            slot = self._slots.get(token_id)
            if slot is None:
                new[token_id] = new.get(token_id, 0) + 1
            else:
                counts[slot] += 1
        return (
            np.concatenate([token_ids, np.fromiter(new, np.int64, len(new))]),
            np.concatenate([counts, np.fromiter(new.values(), np.float32, len(new))]),
        )

    def _grow(self) -> None:
        size = len(self._counts)
        self._token_ids = np.concatenate([self._token_ids, np.empty(size + 16, np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(size + 16, np.float32)])
