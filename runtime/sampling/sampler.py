"""Chooses each sequence's next token from its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trtforge.errors import RequestError
from trtforge.runtime.executor import Float32Array
from trtforge.runtime.request import SamplingParams

INVALID_TOKEN = -1  # a row whose logits are NaN or infinite

# What float32 keeps apart from 0 and infinity; long before, sampling is greedy or uniform.
_MIN_TEMPERATURE = float(np.finfo(np.float32).tiny)
_MAX_TEMPERATURE = float(np.finfo(np.float32).max)
_DRAW_CHUNK = 256


def check_sampling_params(params: SamplingParams) -> None:
    """Raise RequestError, naming the parameter, for a value that `sample` does not take."""
    for name, value, valid, allowed in (
        ("max_tokens", params.max_tokens, params.max_tokens >= 1, "at least 1"),
        (
            "temperature",
            params.temperature,
            params.temperature >= 0 and math.isfinite(params.temperature),
            "finite and at least 0",
        ),
        ("top_k", params.top_k, params.top_k >= 0, "at least 0, where 0 keeps all tokens"),
        ("top_p", params.top_p, 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("min_p", params.min_p, 0 <= params.min_p <= 1, "between 0 and 1"),
        (
            "seed",
            params.seed,
            params.temperature == 0 if params.seed is None else 0 <= params.seed < 2**64,
            "set if temperature is above 0, and an unsigned 64-bit number",
        ),
    ):
        if not valid:
            raise RequestError(f"{name} is {value}; it has to be {allowed}")


def sample(
    logits: Float32Array, params: Sequence[SamplingParams], positions: Sequence[int]
) -> npt.NDArray[np.int64]:
    """The next token of every row; INVALID_TOKEN where the logits are NaN, +inf or nothing but -inf.

    logits [R, vocab_size] are left as they are; -inf alone means: never this token. `params` and
    `positions` (how many tokens the request has generated) have R entries. A row's token depends on
    nothing but its own logits, params and position: rows are never computed together, which costs
    nothing since one row fills the vector units and fits the processor's cache.
    """
    token_ids: npt.NDArray[np.int64] = logits.argmax(axis=1)  # the first NaN if there is one
    token_ids[~np.isfinite(logits[np.arange(len(token_ids)), token_ids])] = INVALID_TOKEN
    random_rows = [row for row, row_params in enumerate(params) if row_params.temperature > 0]
    for row in random_rows:
        if token_ids[row] != INVALID_TOKEN:
            weights = token_weights(logits[row], params[row])
            token_ids[row] = _draw(weights, _uniform(params[row].seed, positions[row]))
    return token_ids


def token_weights(logits: Float32Array, params: SamplingParams) -> Float32Array:
    """Relative probability of every token, 1 for the likeliest and 0 for those filtered out.

    logits [vocab_size], temperature above 0. Order and meaning of the filters are those of the
    logits warpers in transformers (temperature, top-k, top-p, min-p), except that tokens with equal
    logits are kept or removed together in all of them.
    """
    temperature = np.float32(min(max(params.temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE))
    with np.errstate(over="ignore"):  # to -inf, whose weight is 0
        weights: Float32Array = np.exp((logits - logits.max()) / temperature)
    if 0 < params.top_k < logits.size:
        kth = logits.size - params.top_k
        weights[logits < np.partition(logits, kth)[kth]] = 0
    if params.top_p < 1:
        weights[weights < _nucleus_threshold(weights, params.top_p)] = 0
    weights[weights < params.min_p] = 0
    return weights


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


def _uniform(seed: int | None, position: int) -> float:
    """The number in [0, 1) that belongs to a seed and a position, by the counter-based Philox.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _draw(weights: Float32Array, uniform: float) -> int:
    """Inverse of the cumulative distribution at `uniform`, chunk first: most of it is never written."""
    starts = np.arange(0, weights.size, _DRAW_CHUNK)
    chunk_cdf = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * chunk_cdf[-1]
    chunk = _first_above(chunk_cdf, target)
    before = chunk_cdf[chunk - 1] if chunk else 0.0
    start = chunk * _DRAW_CHUNK
    cdf = np.cumsum(weights[start : start + _DRAW_CHUNK], dtype=np.float64)
    return start + _first_above(cdf, target - before)


def _first_above(cdf: npt.NDArray[np.float64], target: float) -> int:
    """First index where `cdf` exceeds `target`, which rounding may have put at or beyond its end.

    The weight at that index is positive.
    """
    inside = min(target, np.nextafter(cdf[-1], 0.0))
    return int(np.searchsorted(cdf, inside, side="right"))
