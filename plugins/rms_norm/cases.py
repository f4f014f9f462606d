"""Cases that every implementation of AddRmsNorm is given.

Sums in float32 may come in any order, and the result is rounded once: implementations agree but for one
spacing of the dtype. `h` is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from trtforge.plugins.op import Array

EPS = 1e-5
CASES: Mapping[str, tuple[int, ...]] = {
    "one-token": (1, 64),
    "no-power-of-two": (5, 96),
    "odd": (3, 77),
    "wide": (2, 2880),
}


def inputs(shape: tuple[int, ...], dtype: npt.DTypeLike) -> dict[str, Array]:
    """Inputs by name; the first row is zero."""
    rng = np.random.default_rng(shape[-1])
    x, residual = rng.normal(size=shape), 4 * rng.normal(size=shape)
    x[0] = residual[0] = 0.0
    weight = rng.uniform(0.5, 1.5, shape[-1])
    return {"x": x.astype(dtype), "residual": residual.astype(dtype), "weight": weight.astype(dtype)}
