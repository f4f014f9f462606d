"""Cases that every implementation of Fp8Gemm is given.

The weight and a dtype of 16 bits lose nothing on their way to float32, so that implementations differ in the
order in which they add up in float32, and by one rounding of the result to the dtype: `RELATIVE` of it, plus
`ABSOLUTE`, far above what float32 loses in a sum of these sizes, where terms cancel. Quantized activations
are the same values everywhere, by IEEE division and rounding to nearest even.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.plugins.fp8_gemm.op import E4M3_MAX, SCALE_BLOCK, scale_shape
from trtforge.plugins.op import Array, AttributeValue

RELATIVE: Mapping[str, float] = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-18}
ABSOLUTE = 1e-4


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes of a call, and what it has."""

    num_tokens: int
    out_features: int
    in_features: int
    scales: str
    activation: str = "none"
    bias: bool = False

    @property
    def attributes(self) -> dict[str, AttributeValue]:
        return {"scales": self.scales, "activation": self.activation}


CASES: Mapping[str, Case] = {
    "one-token": Case(1, 64, 128, "tensor"),
    "split": Case(3, 64, 1168, "channel", bias=True),
    "odd-outputs": Case(5, 77, 144, "channel", bias=True),
    "few-inputs": Case(2, 33, 16, "channel"),
    "blocks": Case(5, 200, 272, "block"),
    "blocks-split": Case(17, 136, 1040, "block", bias=True),
    "prefill": Case(150, 72, 208, "channel", bias=True),
    "prefill-blocks": Case(40, 136, 144, "block"),
    "static": Case(5, 72, 272, "tensor", "static", bias=True),
    "static-split": Case(3, 64, 1168, "channel", "static", bias=True),
    "static-blocks": Case(5, 136, 144, "block", "static"),
    "dynamic": Case(5, 77, 272, "channel", "dynamic", bias=True),
    "dynamic-tensor-split": Case(18, 64, 1168, "tensor", "dynamic"),
    "dynamic-blocks": Case(5, 200, 272, "block", "dynamic", bias=True),
    "dynamic-blocks-split": Case(20, 136, 1168, "block", "dynamic"),
    "dynamic-prefill": Case(70, 72, 208, "channel", "dynamic", bias=True),
    "dynamic-prefill-blocks": Case(66, 72, 272, "block", "dynamic"),
}


def exact_inputs(case: Case, dtype: npt.DTypeLike, e4m3: npt.DTypeLike) -> dict[str, Array]:
    """Inputs by name whose products and sums are exact in float32 in any order: every right implementation
    gives the same bits. `e4m3` is numpy's type for it."""
    rng = np.random.default_rng(case.num_tokens + case.out_features + case.in_features)
    x = rng.integers(-8, 9, (case.num_tokens, case.in_features)).astype(np.float32)
    # A power of two is the scale of every token and every block of it.
    x[:, ::SCALE_BLOCK] = E4M3_MAX / 2 * rng.choice([-1, 1], x[:, ::SCALE_BLOCK].shape)
    scale = 2.0 ** rng.integers(-4, 1, scale_shape(case.scales, case.out_features, case.in_features))
    weight = rng.integers(-4, 5, (case.out_features, case.in_features))
    return _inputs(case, rng, x.astype(dtype), weight.astype(e4m3), scale, 0.5)


def random_inputs(case: Case, dtype: npt.DTypeLike, e4m3: npt.DTypeLike) -> dict[str, Array]:
    """Inputs by name of the size that they have in a model, a few of them zero or large."""
    rng = np.random.default_rng(case.num_tokens + case.out_features + case.in_features)
    x = rng.normal(size=(case.num_tokens, case.in_features)) * rng.choice([0, 1, 1, 20], case.in_features)
    x[0] = 0.0 if case.num_tokens > 1 else x[0]
    scale = rng.uniform(0.0002, 0.001, scale_shape(case.scales, case.out_features, case.in_features))
    weight = 60 * rng.normal(size=(case.out_features, case.in_features)).clip(-6, 6)
    return _inputs(case, rng, x.astype(dtype), weight.astype(e4m3), scale, 0.04)


def _inputs(
    case: Case, rng: np.random.Generator, x: Array, weight: Array, scale: Array, x_scale: float
) -> dict[str, Array]:
    inputs = {"x": x, "weight": weight, "scale": scale.astype(np.float32)}
    if case.bias:
        inputs["bias"] = rng.integers(-8, 9, case.out_features).astype(x.dtype)
    if case.activation == "static":
        inputs["x_scale"] = np.array([x_scale], np.float32)
    return inputs
