"""Int4Gemm in the Triton language.

How a value becomes a number: `w >> 4i & 0x000F000F` leaves two values of a word in its halves. Added to the
bits of 2^7 (bfloat16) or 2^10 (float16), whose last mantissa bit is worth one, they become numbers at once,
and the row's zero point is added to them in the same integer addition. One subtraction of a constant takes
both powers off. The result, value - zero point, is exact in either type.

Groups of GROUP columns, 32, 64 or 128, share a scale; GROUP is 0 where all columns do.
"""

import triton
import triton.language as tl

from trtforge.plugins.int4_gemm import op

TILE = tl.constexpr(op.TILE)
STEP = tl.constexpr(op.STEP)
WORDS = tl.constexpr(op.WORDS)
CHUNK = tl.constexpr(op.CHUNK)

# Sums of a value and (SHIFT - zero point) are never negative: zero points go up to 16.
SHIFT = tl.constexpr(16)
# The power of two whose last mantissa bit is worth one, and its bits.
HALF_ONE = tl.constexpr(1024.0)
HALF_BITS = tl.constexpr(0x6400)
BF16_ONE = tl.constexpr(128.0)
BF16_BITS = tl.constexpr(0x4300)


@triton.jit
def _scale_and_offset(words, dtype: tl.constexpr):
    """Of each row the scale, and what is added to the bits of two values to center them."""
    scale = (words & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    zero = (words >> 16).to(tl.uint16).to(dtype, bitcast=True)
    one: tl.constexpr = BF16_ONE if dtype == tl.bfloat16 else HALF_ONE
    bits: tl.constexpr = BF16_BITS if dtype == tl.bfloat16 else HALF_BITS
    zero_bits = (zero + one).to(tl.uint16, bitcast=True).to(tl.int32) - bits
    offset = bits + SHIFT - zero_bits
    return scale, offset | (offset << 16)


@triton.jit
def _group(column, in_features, GROUP: tl.constexpr):
    """The group of a column; of one of padding, which multiplies zeros, the last."""
    return tl.minimum(column, in_features - 1) // GROUP if GROUP else 0


@triton.jit
def _centered(words, offset, CHUNK_INDEX: tl.constexpr, dtype: tl.constexpr):
    """value - zero point of one chunk of a block: [TILE, WORDS] -> [TILE, CHUNK]."""
    one: tl.constexpr = BF16_ONE if dtype == tl.bfloat16 else HALF_ONE
    pairs = ((words >> (4 * CHUNK_INDEX)) & 0x000F000F) + offset[:, None]
    low = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.join(low, high).reshape(TILE, CHUNK) - (one + SHIFT)


@triton.jit
def multiply(
    y,  # [num_tokens, out_features], unless SPLIT
    partial_sums,  # float32 [splits, num_tokens, tiles * TILE], if SPLIT
    x,  # [num_tokens, in_features]
    weight,
    scales,
    bias,
    num_tokens,
    out_features,
    in_features,
    steps_per_split,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: token blocks, tiles, splits. Computes y^T, so that the weight stays in registers on its way to
    the tensor cores, and tokens are the side of the product that can be narrow."""
    dtype: tl.constexpr = x.dtype.element_ty
    span: tl.constexpr = GROUP if GROUP else STEP  # columns of a step that share a scale
    in_features = in_features // CHUNK * CHUNK  # says that rows are aligned
    steps = tl.cdiv(in_features, STEP)
    tile = tl.program_id(1)
    row = tl.arange(0, TILE)
    output = tile * TILE + row
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, CHUNK)
    blocks = weight + tile.to(tl.int64) * steps * (TILE * WORDS)
    blocks += row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    # Tokens of padding repeat the last one.
    x += tl.minimum(token, num_tokens - 1).to(tl.int64)[None, :] * in_features + column[:, None]
    scales += output
    first_step = tl.program_id(2) * steps_per_split
    end_step = tl.minimum(first_step + steps_per_split, steps)
    total = tl.zeros([TILE, BLOCK_M], tl.float32)
    # With the number of stages given here, and not to the compiler alone, it prefetches scales, too.
    for step in tl.range(first_step, end_step, num_stages=NUM_STAGES):
        words = tl.load(blocks + step * (TILE * WORDS))
        for i in tl.static_range(STEP // CHUNK):
            first_column = step * STEP + i * CHUNK
            if i * CHUNK % span == 0:
                group = _group(first_column, in_features, GROUP)
                pair = tl.load(scales + group * out_features, mask=output < out_features, other=0)
                scale, offset = _scale_and_offset(pair, dtype)
                span_sum = tl.zeros([TILE, BLOCK_M], tl.float32)
            values = _centered(words, offset, i, dtype)
            if GROUP == STEP:  # no block has columns of padding
                inputs = tl.load(x + first_column)
            else:
                inside = first_column + column < in_features
                inputs = tl.load(x + first_column, mask=inside[:, None], other=0.0)
            span_sum = tl.dot(values, inputs, span_sum)
            if (i + 1) * CHUNK % span == 0:
                total += span_sum * scale[:, None]
    if SPLIT:
        width = tl.num_programs(1) * TILE
        sum_row = (tl.program_id(2) * num_tokens + token).to(tl.int64) * width
        tl.store(partial_sums + sum_row[None, :] + output[:, None], total, mask=(token < num_tokens)[None, :])
    else:
        if HAS_BIAS:
            total += tl.load(bias + output, mask=output < out_features, other=0.0).to(tl.float32)[:, None]
        y += token.to(tl.int64)[None, :] * out_features + output[:, None]
        mask = (output < out_features)[:, None] & (token < num_tokens)[None, :]
        tl.store(y, total.to(dtype), mask=mask)


@triton.jit
def add_splits(
    y,
    partial_sums,  # float32 [splits, num_tokens, tiles * TILE]
    bias,
    num_tokens,
    out_features,
    num_splits,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid: tokens, blocks of outputs. In the order of the splits: the same sum every time."""
    token = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = output < out_features
    width = tl.cdiv(out_features, TILE) * TILE
    partial_sums += token * width + output
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.range(0, num_splits):
        total += tl.load(partial_sums, mask=output < width, other=0.0)
        partial_sums += num_tokens * width
    tl.store(y + token * out_features + output, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gather_columns(sorted_x, x, perm, in_features, BLOCK: tl.constexpr):
    """sorted_x[t, k] = x[t, perm[k]]. Grid: tokens, blocks of columns."""
    start = tl.program_id(0).to(tl.int64) * in_features
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < in_features
    source = tl.load(perm + column, mask=mask, other=0)
    tl.store(sorted_x + start + column, tl.load(x + start + source, mask=mask, other=0.0), mask=mask)


@triton.jit
def dequantize(
    dequantized,  # [tiles of the slice * TILE, steps * STEP]
    weight,
    scales,
    out_features,
    in_features,
    first_tile,
    GROUP: tl.constexpr,
):
    """Grid: steps, tiles of a slice that begins with `first_tile`."""
    dtype: tl.constexpr = dequantized.dtype.element_ty
    step = tl.program_id(0)
    steps = tl.num_programs(0)
    tile = tl.program_id(1)
    row = tl.arange(0, TILE)
    output = (first_tile + tile) * TILE + row
    block = weight + ((first_tile + tile).to(tl.int64) * steps + step) * (TILE * WORDS)
    words = tl.load(block + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    out_row = (tile * TILE + row).to(tl.int64)[:, None] * (steps * STEP)
    for i in tl.static_range(STEP // CHUNK):
        first_column = step * STEP + i * CHUNK
        group = _group(first_column, in_features, GROUP)
        pair = tl.load(scales + group * out_features + output, mask=output < out_features, other=0)
        scale, offset = _scale_and_offset(pair, dtype)
        values = _centered(words, offset, i, dtype).to(tl.float32) * scale[:, None]
        tl.store(dequantized + out_row + first_column + tl.arange(0, CHUNK)[None, :], values.to(dtype))


@triton.jit
def matmul(
    y,
    x,
    dequantized,  # a slice of the weight; its rows are outputs from first_block * BLOCK_N on
    bias,
    num_tokens,
    out_features,
    in_features,
    first_block,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,  # out_features is a multiple of 16
    HAS_BIAS: tl.constexpr,
):
    """y's columns of one slice of the weight. Grid: blocks of tokens, blocks of the slice's outputs."""
    in_features = in_features // CHUNK * CHUNK
    width = tl.cdiv(in_features, STEP) * STEP
    if ALIGNED:
        out_features = out_features // 16 * 16
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    x += tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None] * in_features + column[None, :]
    dequantized += row.to(tl.int64)[None, :] * width + column[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_column in tl.range(0, in_features, BLOCK_K):
        inputs = tl.load(x + first_column, mask=(first_column + column < in_features)[None, :], other=0.0)
        total = tl.dot(inputs, tl.load(dequantized + first_column), total)
    output = first_block * BLOCK_N + row
    if HAS_BIAS:
        total += tl.load(bias + output, mask=output < out_features, other=0.0).to(tl.float32)[None, :]
    mask = (token < num_tokens)[:, None] & (output < out_features)[None, :]
    y += token.to(tl.int64)[:, None] * out_features + output[None, :]
    tl.store(y, total.to(y.dtype.element_ty), mask=mask)
