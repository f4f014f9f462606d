"""Fp8Gemm in the Triton language.

The weight is the left operand of the tensor cores and tokens are the narrow side: a step of decode then has
no rows to waste. K = in_features is a multiple of 16, which `K // 16 * 16` tells the compiler.
"""

import triton
import triton.language as tl

from trtforge.plugins.fp8_gemm import op

SCALE_BLOCK = tl.constexpr(op.SCALE_BLOCK)
E4M3_MAX = tl.constexpr(op.E4M3_MAX)


@triton.jit
def quantize_rows(values, scales, x, in_features, BLOCK: tl.constexpr):
    """One scale a token. Grid: tokens."""
    token = tl.program_id(0)
    K = in_features // 16 * 16
    row = token.to(tl.int64) * K
    k = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, K, BLOCK):
        part = tl.load(x + row + start + k, mask=k < K - start, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(part))
    scale = _scale(tl.max(largest, 0))
    tl.store(scales + token, scale)
    for start in tl.range(0, K, BLOCK):
        part = tl.load(x + row + start + k, mask=k < K - start, other=0.0).to(tl.float32)
        quantized = _round_to_e4m3(tl.div_rn(part, tl.zeros([BLOCK], tl.float32) + scale))
        tl.store(values + row + start + k, quantized.to(values.dtype.element_ty), mask=k < K - start)


@triton.jit
def quantize_blocks(
    values, scales, x, x_scale, num_tokens, in_features, DYNAMIC: tl.constexpr, BLOCKS: tl.constexpr
):
    """One scale for SCALE_BLOCK inputs of a token, [blocks, tokens], or with DYNAMIC off the given one for
    everything. Grid: tokens, blocks / BLOCKS."""
    token = tl.program_id(0)
    K = in_features // 16 * 16
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    k = block[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    row = token.to(tl.int64) * K
    part = tl.load(x + row + k, mask=k < K, other=0.0).to(tl.float32)
    if DYNAMIC:
        scale = _scale(tl.max(tl.abs(part), 1))
        tl.store(scales + block * num_tokens + token, scale, mask=block * SCALE_BLOCK < K)
    else:
        scale = tl.zeros([BLOCKS], tl.float32) + tl.load(x_scale)
    part, scale = tl.broadcast(part, scale[:, None])
    quantized = _round_to_e4m3(tl.div_rn(part, scale))
    tl.store(values + row + k, quantized.to(values.dtype.element_ty), mask=k < K)


@triton.jit
def _scale(largest):
    """What makes the largest magnitude the largest of e4m3."""
    return tl.where(largest == 0.0, 1.0, tl.div_rn(largest, largest * 0.0 + E4M3_MAX))


@triton.jit
def _round_to_e4m3(x):
    """The nearest value of e4m3 in float32, ties to even; a cast of it is exact, on GPUs without e4m3 too.

    Added to 1.5 * 2^20 times the power of two below it, but at least e4m3's smallest normal number 2^-6, a
    float32 keeps three bits of its fraction.
    """
    x = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, 0.015625) * 1572864.0
    return (x + shift) - shift


@triton.jit
def gemm(
    y,  # [num_tokens, out_features]
    partial,  # float32 [splits, num_tokens, out_features], where SPLIT
    x,  # [num_tokens, in_features], e4m3 where FP8
    x_scale,  # float32: [1], [tokens] or, with scales of blocks, [in_features / 128, tokens]
    weight,  # [out_features, in_features], e4m3 where FP8, else words of four of them
    scale,  # float32: [1], [out_features] or [out_features / 128, in_features / 128]
    bias,  # [out_features], where BIAS
    num_tokens,
    out_features,
    in_features,
    steps_per_split,
    FP8: tl.constexpr,
    SCALES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x @ weight^T with the scales of both, or SPLIT's part of it. Grid: token tiles, output tiles,
    splits."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t_inside = t < num_tokens
    n_inside = n < out_features
    # Outside is the last row again, so that no mask of a load depends on rows.
    t_row = tl.minimum(t, num_tokens - 1).to(tl.int64)
    n_row = tl.minimum(n, out_features - 1).to(tl.int64)
    K = in_features // 16 * 16
    k = _input_order(FP8, BLOCK_K)
    x_tile = x + t_row[None, :] * K + k[:, None]
    PER_WORD: tl.constexpr = 1 if FP8 else 4
    WORDS: tl.constexpr = BLOCK_K // PER_WORD
    w = tl.arange(0, WORDS)
    w_tile = weight + n_row[:, None] * (K // PER_WORD) + w[None, :]
    if SCALES == "tensor":
        factor = tl.load(scale)
    elif SCALES == "channel":
        factor = tl.load(scale + n, mask=n_inside, other=0.0)[:, None]
    else:
        scale_row = scale + tl.program_id(1) * BLOCK_N // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK)

    first = tl.program_id(2) * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, BLOCK_K))
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for step in tl.range(first, last):
        tokens = tl.load(x_tile + step * BLOCK_K, mask=(k < K - step * BLOCK_K)[:, None], other=0.0)
        w_inside = w < K // PER_WORD - step * WORDS
        weights = tl.load(w_tile + step * WORDS, mask=w_inside[None, :], other=0.0)
        product = tl.dot(_operand(weights, FP8, x.dtype.element_ty, BLOCK_N, BLOCK_K), tokens)
        if SCALES == "block":
            block = step * BLOCK_K // SCALE_BLOCK
            factor = tl.load(scale_row + block)
            if ACTIVATION == "dynamic":
                factor *= tl.load(x_scale + block * num_tokens + t, mask=t_inside, other=0.0)[None, :]
        total += product * factor

    if ACTIVATION == "static":
        total *= tl.load(x_scale)
    elif ACTIVATION == "dynamic" and SCALES != "block":
        total *= tl.load(x_scale + t, mask=t_inside, other=0.0)[None, :]
    inside = n_inside[:, None] & t_inside[None, :]
    places = t.to(tl.int64)[None, :] * out_features + n[:, None]
    if SPLIT:
        size = num_tokens.to(tl.int64) * out_features
        tl.store(partial + tl.program_id(2) * size + places, total, mask=inside)
    else:
        if BIAS:
            total += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
        tl.store(y + places, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _input_order(FP8: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which input is at which place of a step. Words of four weights become two tiles side by side, so that
    no weight leaves its thread: first the inputs 0, 1 of every four, then 2, 3."""
    order = tl.arange(0, BLOCK_K)
    if not FP8:
        half = BLOCK_K // 2
        order = order % half // 2 * 4 + order % 2 + order // half * 2
        order = tl.max_contiguous(tl.multiple_of(order, 2), 2)
    return order


@triton.jit
def _operand(words, FP8: tl.constexpr, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights as tensor cores take them, [BLOCK_N, BLOCK_K] in the order of `_input_order`: e4m3 as it is,
    or of int32 words of four e4m3 numbers of `dtype`. The bits of e4m3, moved, are those of the same number
    times a power of two."""
    if FP8:
        operand = words
    else:
        SIGN: tl.constexpr = -0x7FFF8000  # 0x80008000
        if dtype == tl.bfloat16:
            even = ((words << 8) & SIGN) | ((words << 4) & 0x07F007F0)
            odd = (words & SIGN) | ((words >> 4) & 0x07F007F0)
        else:
            even = ((words << 8) & SIGN) | ((words << 7) & 0x3F803F80)
            odd = (words & SIGN) | ((words >> 1) & 0x3F803F80)
        low = tl.join(_low(even, dtype), _low(odd, dtype)).reshape(BLOCK_N, BLOCK_K // 2)
        high = tl.join(_low(even >> 16, dtype), _low(odd >> 16, dtype)).reshape(BLOCK_N, BLOCK_K // 2)
        operand = tl.join(low, high).permute(0, 2, 1).reshape(BLOCK_N, BLOCK_K)
        operand *= 2.0**120 if dtype == tl.bfloat16 else 2.0**8
    return operand


@triton.jit
def _low(words, dtype: tl.constexpr):
    return (words & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def add_splits(
    y, partial, bias, out_features, splits, BIAS: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds up the parts of a split product, always in the same order. Grid: output tiles, tokens."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < out_features
    split = tl.arange(0, MAX_SPLITS)
    token = tl.program_id(1)
    size = tl.num_programs(1).to(tl.int64) * out_features
    row = token.to(tl.int64) * out_features
    parts = tl.load(
        partial + split[:, None] * size + row + n[None, :],
        mask=(split < splits)[:, None] & inside[None, :],
        other=0.0,
    )
    total = tl.sum(parts, 0)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + n, total.to(y.dtype.element_ty), mask=inside)
