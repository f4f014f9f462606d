"""Cases that every implementation of Rope is given.

Each element is two products and a sum in float32, rounded once: implementations agree but for one spacing of
the dtype, and what float32 loses where the products cancel. What is not rotated is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.plugins.op import Array, AttributeValue


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes of a call, and how it rotates."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int = 0
    interleaved: int = 0

    @property
    def attributes(self) -> dict[str, AttributeValue]:
        return {"interleaved": self.interleaved, "rotary_dim": self.rotary_dim}


CASES: Mapping[str, Case] = {
    "halves": Case(3, 4, 2, 64),
    "interleaved": Case(3, 4, 2, 64, interleaved=1),
    "odd-sizes": Case(2, 7, 1, 80),
    "odd-sizes-interleaved": Case(2, 7, 1, 96, interleaved=1),
    "partial": Case(2, 4, 4, 80, rotary_dim=32),
    "partial-interleaved": Case(2, 3, 1, 128, rotary_dim=48, interleaved=1),
}


def inputs(case: Case, dtype: npt.DTypeLike) -> dict[str, Array]:
    """Inputs by name; cos and sin of random angles."""
    rng = np.random.default_rng(case.head_dim)
    pairs = (case.rotary_dim or case.head_dim) // 2
    angles = rng.uniform(0, 2 * np.pi, (case.num_tokens, pairs))
    return {
        "q": rng.normal(size=(case.num_tokens, case.num_heads, case.head_dim)).astype(dtype),
        "k": rng.normal(size=(case.num_tokens, case.num_kv_heads, case.head_dim)).astype(dtype),
        "cos": np.cos(angles).astype(dtype),
        "sin": np.sin(angles).astype(dtype),
    }
