"""Cases that every implementation of QkNorm is given.

Sums in float32 may come in any order, and the result is rounded once: implementations agree but for one
spacing of the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.plugins.op import Array, AttributeValue


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes of a call, and whether the weights are stored as what they are above one."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    unit_offset: int = 0

    @property
    def attributes(self) -> dict[str, AttributeValue]:
        return {"eps": 1e-6, "unit_offset": self.unit_offset}


CASES: Mapping[str, Case] = {
    "qwen3": Case(3, 4, 2, 128),
    "gemma3": Case(2, 4, 1, 256, unit_offset=1),
    "one-row": Case(1, 1, 1, 64),
    "several-tiles": Case(11, 3, 1, 128),
    "no-power-of-two": Case(5, 7, 1, 80, unit_offset=1),
    "odd": Case(2, 5, 3, 77),
}


def inputs(case: Case, dtype: npt.DTypeLike) -> dict[str, Array]:
    """Inputs by name; the first head of q is zero, the last one of k so small that eps counts."""
    rng = np.random.default_rng(case.head_dim)
    q = 4 * rng.normal(size=(case.num_tokens, case.num_heads, case.head_dim))
    k = rng.normal(size=(case.num_tokens, case.num_kv_heads, case.head_dim))
    q[0, 0] = 0.0
    k[-1, -1] *= 1e-3
    q_weight, k_weight = rng.uniform(0.5, 1.5, (2, case.head_dim)) - case.unit_offset
    arrays = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight}
    return {name: array.astype(dtype) for name, array in arrays.items()}
