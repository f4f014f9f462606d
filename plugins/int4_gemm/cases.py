"""Cases that every implementation of Int4Gemm is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.plugins.int4_gemm.packing import SYMMETRIC_ZERO, Int4Weight, pack
from trtforge.plugins.op import Array


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes of a call, and what it has."""

    num_tokens: int
    out_features: int
    in_features: int
    num_groups: int
    zeros: bool = False
    bias: bool = False
    act_order: bool = False


CASES: Mapping[str, Case] = {
    "group-128": Case(5, 64, 256, 2),
    "group-64": Case(16, 96, 256, 4, zeros=True),
    "group-32": Case(33, 72, 256, 8, zeros=True, bias=True),
    "one-group": Case(5, 64, 256, 1, zeros=True, bias=True),
    "one-token-split": Case(1, 128, 1280, 10, zeros=True, bias=True),
    "several-tokens-split": Case(33, 100, 1152, 18, zeros=True),
    "odd-outputs": Case(5, 97, 256, 2, bias=True),
    "half-a-step-of-inputs": Case(16, 64, 576, 9, zeros=True),
    "a-quarter-of-a-step-of-inputs": Case(1, 65, 160, 5, zeros=True),
    "one-group-of-a-part-of-a-step": Case(1, 64, 96, 1, zeros=True),
    "act-order": Case(20, 64, 256, 4, zeros=True, act_order=True),
    "several-token-blocks": Case(200, 64, 128, 2, zeros=True, bias=True),
    "prefill": Case(300, 160, 320, 10, zeros=True, bias=True, act_order=True),
    "prefill-odd-outputs": Case(300, 67, 256, 1, zeros=True),
}


def exact_inputs(case: Case, dtype: npt.DTypeLike) -> dict[str, Array]:
    """Inputs by name whose products and sums are exact in float32 in any order, and whose dequantized
    weights are exact in `dtype`: every right implementation gives the same bits."""
    rng = np.random.default_rng(case.num_tokens + case.out_features)
    scales = 2.0 ** rng.integers(-4, 1, (case.out_features, case.num_groups))
    return _inputs(case, rng, rng.integers(-4, 5, (case.num_tokens, case.in_features)), scales, dtype)


def random_inputs(case: Case, dtype: npt.DTypeLike) -> dict[str, Array]:
    """Inputs by name of the size that they have in a model."""
    rng = np.random.default_rng(case.num_tokens + case.out_features)
    scales = rng.uniform(0.002, 0.02, (case.out_features, case.num_groups))
    return _inputs(case, rng, rng.normal(size=(case.num_tokens, case.in_features)), scales, dtype)


def _inputs(
    case: Case, rng: np.random.Generator, x: Array, scales: Array, dtype: npt.DTypeLike
) -> dict[str, Array]:
    weight = Int4Weight(
        values=rng.integers(0, 16, (case.out_features, case.in_features), np.uint8),
        scales=scales,
        zeros=rng.integers(0, 17, scales.shape, np.uint8)
        if case.zeros
        else np.full(scales.shape, SYMMETRIC_ZERO, np.uint8),
        perm=rng.permutation(case.in_features).astype(np.int32) if case.act_order else None,
    )
    inputs = {"x": x.astype(dtype)} | pack(weight, dtype)
    if case.bias:
        inputs["bias"] = rng.integers(-8, 9, case.out_features).astype(dtype)
    return inputs
