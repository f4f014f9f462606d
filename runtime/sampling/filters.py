"""Temperature, top-k, top-p, min-p and typical-p: which tokens can be drawn, with which weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import Float32Array
from trtforge.runtime.request import SamplingParams
from trtforge.runtime.sampling.topk import largest

# What float32 keeps apart from 0 and infinity; long before, sampling is greedy or uniform.
_MIN_TEMPERATURE = float(np.finfo(np.float32).tiny)
_MAX_TEMPERATURE = float(np.finfo(np.float32).max)


def token_weights(
    logits: Float32Array, params: SamplingParams
) -> tuple[npt.NDArray[np.int64] | None, Float32Array]:
    """Candidates (None: all tokens) and their relative probabilities, 0 for those filtered out.

    logits [vocab_size] with a finite maximum; temperature above 0. Order and meaning of the filters are
    those of the logits warpers in transformers (temperature, top-k, top-p, min-p, typical-p), except that
    tokens with equal logits are kept or removed together in all of them.
    """
    candidates = None
    if 0 < params.top_k < logits.size:
        candidates = largest(logits, params.top_k)
        logits = logits[candidates]
    temperature = np.float32(min(max(params.temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE))
    with np.errstate(over="ignore"):  # to -inf, whose weight is 0
        weights: Float32Array = logits - logits.max()
        weights /= temperature
        np.exp(weights, out=weights)
    if params.top_p < 1:
        weights[weights < _nucleus_threshold(weights, params.top_p)] = 0
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    if params.typical_p < 1:
        weights[~_is_typical(weights, params.typical_p)] = 0
    return candidates, weights


def _nucleus_threshold(weights: Float32Array, top_p: float) -> np.float32:
    """Smallest weight among the fewest likeliest tokens that together reach the share `top_p`."""
    total = weights.sum(dtype=np.float64)
    tail = (1 - top_p) * total  # least likely tokens of this weight together are removed
    # Tokens below the mean weight of a tail spread over all tokens can't outweigh it: only the rest
    # is sorted, a few hundred tokens in place of the vocabulary.
    head = np.sort(weights[weights >= tail / weights.size])
    cumulative = np.cumsum(head, dtype=np.float64)
    cumulative += total - cumulative[-1]
    first_kept = np.searchsorted(cumulative, tail, side="right")
    threshold: np.float32 = head[min(first_kept, head.size - 1)]
    return threshold


def _is_typical(weights: Float32Array, typical_p: float) -> npt.NDArray[np.bool_]:
    """The fewest tokens whose surprise is closest to its mean and that reach the share `typical_p`.

    Meister et al., Locally typical sampling (2022).
    """
    possible = np.flatnonzero(weights)
    probabilities = weights[possible].astype(np.float64)
    probabilities /= probabilities.sum()
    surprise = -np.log(probabilities)
    # Equal weights have equal distances: no ties are broken by rounding.
    distance = np.abs(surprise - (probabilities * surprise).sum())
    order = np.argsort(distance, kind="stable")
    share = np.cumsum(probabilities[order])
    last = min(int(np.searchsorted(share, typical_p, side="left")), order.size - 1)
    typical = np.zeros(weights.size, bool)
    typical[possible[distance <= distance[order[last]]]] = True
    return typical
