"""SiluMul in the Triton language."""

import triton
import triton.language as tl

SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def silu_mul(y, gate_up, INTERMEDIATE: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: tokens, tiles of INTERMEDIATE."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < INTERMEDIATE
    row = gate_up + token * (2 * INTERMEDIATE)
    gate = tl.load(row + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + INTERMEDIATE + place, mask=inside, other=0.0).to(tl.float32)
    # (1 + tanh(z)) / 2 = sigmoid(2 z)
    exponent = SQRT_8_OVER_PI * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    result = gate * tl.sigmoid(exponent) * up
    tl.store(y + token * INTERMEDIATE + place, result.to(y.dtype.element_ty), mask=inside)
