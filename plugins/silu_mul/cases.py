"""Cases that every implementation of SiluMul is given.

Each element is computed in float32, whose exponential and hyperbolic tangent err by a few of its units, and
rounded once: implementations agree but for one spacing of the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from trtforge.plugins.op import Array

CASES: Mapping[str, tuple[int, ...]] = {
    "one-token": (1, 2, 64),
    "odd": (5, 2, 77),
    "several-tiles": (3, 2, 2200),
}


def inputs(shape: tuple[int, ...], dtype: npt.DTypeLike) -> dict[str, Array]:
    """The input by name, with gates far from zero on both sides."""
    rng = np.random.default_rng(shape[-1])
    return {"gate_up": (rng.normal(size=shape) * rng.choice([0, 1, 4, 12], shape)).astype(dtype)}
