"""A tile of queries attends to tiles of the cache: what decode and prefill share, in the Triton language.

A tile of queries is ROWS rows: the query heads of one KV head for ROWS // GROUP tokens that follow each
other; a tile of the cache is TILE tokens of one KV head. Softmax is online (FlashAttention, arXiv
2205.14135), in base 2, with float32 scores and sums.

Caches of 8 bits are widened to float16, which is exact, whatever the queries are: bfloat16 could not hold an
int8. Where the hardware has no float8_e4m3fn (sm_80), the cache is given as uint8: the 7 magnitude bits of an
e4m3 are those of a float16 that is 2^8 times smaller.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(float("-inf"))
NOTHING_YET = tl.constexpr(-1.0e30)  # a maximum from which HIDDEN can be subtracted


@triton.jit
def _widened(x):
    """What was stored, in a type that can be multiplied; of an e4m3 2^-8 of it."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        wide = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    elif x.dtype == tl.int8:
        bits = (x.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16)
        wide = (bits | 0x6400).to(tl.float16, bitcast=True) - 1152.0  # 1024 + 128 + x, less 1152
    elif x.dtype == tl.float8e4nv:
        wide = x.to(tl.float16)
    else:
        wide = x
    return wide


@triton.jit
def element_scale(kv_cache, scale, HAS_SCALE: tl.constexpr):
    """What a widened element has to be multiplied by."""
    factor = 256.0 if kv_cache.dtype.element_ty == tl.uint8 else 1.0
    if HAS_SCALE:
        factor = tl.load(scale) * factor
    return factor


@triton.jit
def first_position(position, WINDOW: tl.constexpr):
    """The first position that a token at `position` sees."""
    return tl.maximum(position - (WINDOW - 1), 0) if WINDOW else 0


@triton.jit
def query_rows(
    tokens, length, start, kv_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """For each row its token in the sequence, query head, row of q and out, and whether it is one at all."""
    rows = tl.arange(0, ROWS)
    token = tokens + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    exists = (rows < (ROWS // GROUP) * GROUP) & (token < length)
    return token, head, (start + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head, exists


@triton.jit
def load_queries(q, kv_cache, row, exists, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
    """[ROWS, DIMS], in a type that goes with the cache's."""
    dims = tl.arange(0, DIMS)
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + row[:, None] * HEAD_DIM + dims[None, :], mask, 0.0)
    if kv_cache.dtype.element_ty.primitive_bitwidth == 8:
        # float16 has all digits of a bfloat16 but not its range.
        queries = tl.minimum(tl.maximum(queries.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return queries


@triton.jit
def start_softmax(
    head, exists, with_sinks, sinks, alibi_slopes,
    HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """(weighted values, maximum, sum) before the first tile, and slopes. A sink is a score seen already."""
    total = tl.zeros([ROWS, DIMS], tl.float32)
    maximum = tl.full([ROWS], NOTHING_YET, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head, exists, 0.0).to(tl.float32) * LOG2_E
        sink = tl.where(with_sinks, sink, HIDDEN)
        maximum = tl.maximum(sink, NOTHING_YET)
        weight = tl.where(sink == HIDDEN, 0.0, 1.0)
    slope = tl.zeros([ROWS], tl.float32)
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + head, exists, 0.0) * LOG2_E
    return total, maximum, weight, slope


@triton.jit
def attend(
    total, maximum, weight, queries, kv_cache, block_table, kv_head, position, slope, score_scale,
    first_seen, end_seen, first_tile, end_tile,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    TILE: tl.constexpr, DIMS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take tiles [first_tile, end_tile) of the cache into (total, maximum, weight).

    Only positions from first_seen to end_seen are read, neither blocks nor their numbers beyond them.
    Without MASKED every row sees every token of every tile.
    """
    dims = tl.arange(0, DIMS)
    for tile in tl.range(first_tile, end_tile):
        seen = tile * TILE + tl.arange(0, TILE)
        if MASKED:
            exists = (seen >= first_seen) & (seen < end_seen)
            block = tl.load(block_table + seen // BLOCK_SIZE, exists, 0)
        else:
            exists = tl.full([TILE], 1, tl.int1)
            block = tl.load(block_table + seen // BLOCK_SIZE)
        row = (block.to(tl.int64) * (2 * BLOCK_SIZE) + seen % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
        source = kv_cache + row[:, None] * HEAD_DIM + dims[None, :]
        inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
        keys = _widened(tl.load(source, inside, 0.0))
        values = _widened(tl.load(source + BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM, inside, 0.0))

        scores = tl.dot(queries, tl.trans(keys)) * score_scale
        if SOFTCAP > 0.0:
            scores = (SOFTCAP * LOG2_E) * (1.0 - 2.0 / (tl.exp2(scores * (2.0 / SOFTCAP)) + 1.0))
        if HAS_ALIBI:
            scores += slope[:, None] * (seen[None, :] - position[:, None]).to(tl.float32)
        if MASKED:
            visible = seen[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (seen[None, :] > position[:, None] - WINDOW)
            scores = tl.where(visible, scores, HIDDEN)

        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        weight = weight * shrink + tl.sum(weights, 1)
        total = tl.dot(weights.to(values.dtype), values, total * shrink[:, None])
        maximum = new_maximum
    return total, maximum, weight
