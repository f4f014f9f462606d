"""The matrix product, in the Triton language."""

import triton
import triton.language as tl


@triton.jit
def small_gemm(
    out, a, b, num_columns, num_steps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[BLOCK_M, K] x [K, num_columns], K = num_steps * BLOCK_K; a program computes BLOCK_N columns."""
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (num_columns // 16) * 16  # a multiple of 16, so that a row of b is aligned
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(num_steps):
        left = tl.load(a + m[:, None] * num_steps * BLOCK_K + step * BLOCK_K + k)
        right = tl.load(b + (step * BLOCK_K + k)[:, None] * columns + n)
        total = tl.dot(left, right, total)
    tl.store(out + m[:, None] * columns + n, total)
