"""ScaledAdd in the Triton language."""

import triton
import triton.language as tl


@triton.jit
def scaled_add(total, x, scale, num_elements, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_elements
    result = tl.load(total + index, mask).to(tl.float32) + scale * tl.load(x + index, mask).to(tl.float32)
    tl.store(total + index, result.to(total.dtype.element_ty), mask)
