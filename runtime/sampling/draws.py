"""Random draws that a seed and a position alone decide."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import Float32Array

_DRAW_CHUNK = 256


def uniform(seed: int | None, position: int) -> float:
    """The number in [0, 1) that belongs to a seed and a position, by the counter-based Philox.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def draw(weights: Float32Array, number: float) -> int:
    """Inverse of the cumulative distribution at `number`, chunk first: most of it is never written.

    weights [N], not all 0; number in [0, 1). The index it gives has a positive weight.
    """
    starts = np.arange(0, weights.size, _DRAW_CHUNK)
    chunk_cdf = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = number * chunk_cdf[-1]
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
