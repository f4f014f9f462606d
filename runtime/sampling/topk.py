"""The largest of many numbers without sorting them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import Float32Array

_GROUP_SIZE = 64
_GROUPS_PER_K = 4  # so that hardly more than k numbers remain


def largest(values: Float32Array, k: int) -> npt.NDArray[np.int64]:
    """Indices, ascending, of the k largest numbers and of all that equal the smallest of them.

    values [N] without NaN, 1 <= k < N.
    """
    bound = values
    num_groups = values.size // _GROUP_SIZE
    if num_groups >= _GROUPS_PER_K * k:
        # k groups have their largest number at or above the k-th largest of the groups' largest numbers: so
        # have at least k numbers.
        grouped = values[: num_groups * _GROUP_SIZE].reshape(_GROUP_SIZE, num_groups)
        bound = grouped.max(axis=0)
    candidates = np.flatnonzero(values >= _kth_largest(bound, k))
    if num_groups >= _GROUPS_PER_K * k:
        of_candidates = values[candidates]
        candidates = candidates[of_candidates >= _kth_largest(of_candidates, k)]
    return candidates


def _kth_largest(values: Float32Array, k: int) -> np.float32:
    kth = values.size - k
    value: np.float32 = np.partition(values, kth)[kth]
    return value
