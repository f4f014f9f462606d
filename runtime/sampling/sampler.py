"""Chooses each sequence's next token from its logits."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import Float32Array
from trtforge.runtime.outputs import TokenLogprobs
from trtforge.runtime.sampling.draws import draw, uniform
from trtforge.runtime.sampling.filters import token_weights
from trtforge.runtime.sampling.logprobs import token_logprobs
from trtforge.runtime.sampling.state import SamplingState

INVALID_TOKEN = -1  # the row's logits are NaN, +inf or nothing but -inf: the model failed
NO_TOKEN = -2  # every token is forbidden: the answer ends before this one


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """One step's tokens, INVALID_TOKEN and NO_TOKEN among them.

    `logprobs` has an entry for each one that has a token and asked for it; None if nobody asked.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None


class Sampler:
    """Samples tokens. Not thread-safe.

    Rows are never computed together, so that a token depends on nothing but its row's logits and its
    sequence; that costs nothing, since one row fills the vector units and fits the processor's cache.
    """

    def __init__(self, vocab_size: int) -> None:
        self._scratch: Float32Array = np.empty(vocab_size, np.float32)

    def sample(
        self,
        logits: Float32Array,
        states: Sequence[SamplingState | None],
        lengths: Sequence[int],
        rows: Sequence[int] | None = None,
        argmax: npt.NDArray[np.int64] | npt.NDArray[np.int32] | None = None,
    ) -> Sampled:
        """The next token of every entry: as many as `states` and `lengths` have.

        logits [R, vocab_size] are left as they are; -inf alone means: never this token. Entry i continues
        the first lengths[i] tokens of its state from row rows[i], or from row i without `rows`. State None
        is greedy. `argmax` [R] is each row's likeliest token, -1 for invalid logits: where it is given,
        greedy entries without options do not touch the logits.
        """
        if argmax is not None:
            token_ids = (argmax if rows is None else argmax[np.asarray(rows, np.intp)]).tolist()
        else:
            token_ids = _greedy(logits, rows)
        if not any(states):
            return Sampled(token_ids)
        logprobs: list[TokenLogprobs | None] | None = None
        for entry, state in enumerate(states):
            if state is None or token_ids[entry] == INVALID_TOKEN:
                continue
            row = logits[entry if rows is None else rows[entry]]
            token_id = token_ids[entry] = self._choose(row, state, lengths[entry], token_ids[entry])
            if state.params.logprobs is not None and token_id >= 0:
                if logprobs is None:
                    logprobs = [None] * len(token_ids)
                logprobs[entry] = token_logprobs(row, token_id, state.params.logprobs)
        return Sampled(token_ids, logprobs)

    def _choose(self, row: Float32Array, state: SamplingState, length: int, greedy: int) -> int:
        """The token of a valid row whose likeliest one is `greedy`."""
        history = state.history(length)
        if state.processors:
            np.copyto(self._scratch, row)
            row = self._scratch
            with np.errstate(over="ignore"):
                for processor in state.processors:
                    processor.apply(row, history)
            greedy = int(row.argmax())
            if row[greedy] == -np.inf:
                return NO_TOKEN
            if row[greedy] == np.inf:  # a penalty or a bias went beyond float32
                np.minimum(row, np.finfo(np.float32).max, out=row)
        if state.params.temperature == 0:
            return greedy
        candidates, weights = token_weights(row, state.params)
        index = draw(weights, uniform(state.params.seed, history.position))
        return index if candidates is None else int(candidates[index])


def _greedy(logits: Float32Array, rows: Sequence[int] | None) -> list[int]:
    """The likeliest token of every entry, INVALID_TOKEN where it is not finite."""
    token_ids: npt.NDArray[np.int64] = logits.argmax(axis=1)  # the first NaN if there is one
    token_ids[~np.isfinite(logits[np.arange(len(token_ids)), token_ids])] = INVALID_TOKEN
    result: list[int] = (token_ids if rows is None else token_ids[np.asarray(rows, np.intp)]).tolist()
    return result
