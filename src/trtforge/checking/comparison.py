"""How far two runtimes' logits are apart, and how far they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.manifest import CacheDType, DType
from trtforge.runtime.executor import Float32Array

_Float64Array = npt.NDArray[np.float64]

_TYPICAL = 0.9  # of the rows


@dataclass(frozen=True, slots=True)
class Errors:
    """Of R rows of logits against the same rows of another runtime; infinite where one is not finite.

    A row's error is the largest of its logits', as a part of the row's range, from its lowest logit to its
    highest, which does not change with what is added to all logits.
    """

    num_rows: int
    max_abs: float  # of all logits
    typical: float  # of nine tenths of the rows, the worst one's error
    worst: float  # of all rows
    max_kl: float  # nats that are lost by taking a row's probabilities for the other's
    top1: float  # rows whose likeliest token is the same, from 0 to 1


def compare(actual: Float32Array, expected: Float32Array) -> Errors:
    """The errors of `actual`, [R, V], against `expected`, [R, V]."""
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return Errors(len(expected), math.inf, math.inf, math.inf, math.inf, 0.0)
    wide, wide_expected = actual.astype(np.float64), expected.astype(np.float64)
    distances = np.abs(wide - wide_expected).max(axis=1)
    ranges = np.maximum(np.ptp(wide_expected, axis=1), np.finfo(np.float32).tiny)
    relative = distances / ranges
    log_p, log_q = log_softmax(wide_expected), log_softmax(wide)
    return Errors(
        num_rows=len(expected),
        max_abs=float(distances.max()),
        typical=float(np.quantile(relative, _TYPICAL, method="lower")),
        worst=float(relative.max()),
        max_kl=float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).max()),
        top1=float((actual.argmax(axis=1) == expected.argmax(axis=1)).mean()),
    )


def log_softmax(logits: _Float64Array) -> _Float64Array:
    """Log-probabilities of each row of `logits`, [R, V]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: _Float64Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


# A number is off by up to this much of itself when it is rounded.
_UNIT_ROUNDOFF = {
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    # 2**-24, but what counts is that sums of many numbers are added up in another order.
    "float32": 2.0**-20,
}
_E4M3_SPACING = 2.0**-3  # of neighbours, as a part of themselves
_MARGIN = 2


def tolerance(dtype: DType, cache_dtype: CacheDType, num_layers: int) -> float:
    """The bound of `Errors.typical` that rounding to `dtype` stays below, against float32 with such a cache.

    Each layer adds two rounded terms to the hidden state, and errors that do not know each other add up like
    a random walk: the roundoff times the root of their number, with a margin for what is rounded within a
    layer. A few rows hang on small differences of large numbers, those of first tokens above all. They are
    up to ten times worse than the others in every runtime, and say nothing.

    In a cache of 8-bit floats, whose neighbours are v = 2 ** -3 apart, numbers that differ by u are rounded
    to different ones once in v / u times: the mean square of the difference becomes u * v. A few such keys
    make all later layers differ more, in float32 too, so that u is taken to be bfloat16's in every dtype.
    """
    roundoff = _UNIT_ROUNDOFF[dtype]
    if cache_dtype == "float8_e4m3fn":
        roundoff = math.sqrt(_UNIT_ROUNDOFF["bfloat16"] * _E4M3_SPACING)
    return _MARGIN * roundoff * math.sqrt(2 * num_layers + 1)
