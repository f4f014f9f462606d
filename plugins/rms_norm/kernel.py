"""AddRmsNorm in the Triton language."""

import triton
import triton.language as tl


@triton.jit
def add_rms_norm(y, h, x, residual, weight, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: tokens."""
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    place = tl.arange(0, BLOCK)
    inside = place < HIDDEN
    total = tl.load(x + row + place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + row + place, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(h.dtype.element_ty)
    tl.store(h + row + place, rounded, mask=inside)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / HIDDEN + eps)
    normalized = total * scale * tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + place, normalized.to(y.dtype.element_ty), mask=inside)
