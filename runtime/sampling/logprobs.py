"""Log-probabilities that tokens had, from the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import Float32Array
from trtforge.runtime.outputs import TokenLogprobs
from trtforge.runtime.sampling.topk import largest


def token_logprobs(logits: Float32Array, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probability and rank of one token, and the `num_top` likeliest ones.

    logits [vocab_size] before any filter, with a finite maximum. Of tokens with equal logits the one with
    the smaller id comes first, in `top` and in `rank`.
    """
    value = logits[token_id]
    rank = 1 + np.count_nonzero(logits > value) + np.count_nonzero(logits[:token_id] == value)
    shifted = logits - logits.max()
    log_sum = float(np.log(np.exp(shifted).sum(dtype=np.float64)))
    top = _likeliest(logits, num_top)
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(shifted[token_id]) - log_sum,
        rank=int(rank),
        top=tuple((index, float(shifted[index]) - log_sum) for index in top.tolist()),
    )


def prompt_logprobs(
    logits: Float32Array, next_token_ids: Sequence[int], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """Of each prompt token that follows a row: logits [P, vocab_size], P next tokens.

    Raises ValueError if a row's logits are NaN or infinite.
    """
    if not np.isfinite(logits.max(axis=1)).all():
        raise ValueError("the model's logits are NaN or infinite")
    return tuple(
        token_logprobs(row, token_id, num_top) for row, token_id in zip(logits, next_token_ids, strict=True)
    )


def _likeliest(logits: Float32Array, num_top: int) -> npt.NDArray[np.int64]:
    if num_top == 0:
        return np.empty(0, np.int64)
    candidates = largest(logits, num_top) if num_top < logits.size else np.arange(logits.size)
    order = np.argsort(-logits[candidates], kind="stable")  # the smaller id first among equals
    likeliest: npt.NDArray[np.int64] = candidates[order[:num_top]]
    return likeliest
