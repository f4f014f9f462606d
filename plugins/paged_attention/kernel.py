"""The kernels of PagedAttention in the Triton language: append, then decode and combine, and prefill.

Shapes and what they stand for are as in `op.py`, tiles as in `kernel_tiles.py`; what is fixed in a model is a
constant. What splits of a long context find is put together as in Flash-Decoding. For sm_80, which has no
float8_e4m3fn, such a cache is given as uint8.
"""

import triton
import triton.language as tl

from trtforge.plugins.paged_attention.kernel_tiles import (
    HIDDEN,
    LOG2_E,
    NOTHING_YET,
    attend,
    element_scale,
    first_position,
    load_queries,
    query_rows,
    start_softmax,
)

E4M3_MAX = tl.constexpr(448.0)
E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)
# Added to a float32 below 2^22, it leaves the nearest integer, ties to even, in the lowest bits.
ROUND = tl.constexpr(1.5 * 2**23)


@triton.jit
def _e4m3_bits(x):
    """float32 -> the bits of the nearest float8_e4m3fn, ties to even, saturating."""
    magnitude = tl.minimum(tl.abs(x), E4M3_MAX)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = (magnitude * 512.0 + ROUND).to(tl.int32, bitcast=True) & 0xF
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(magnitude < E4M3_MIN_NORMAL, subnormal, normal) | sign).to(tl.uint8)


@triton.jit
def _stored(x, scale, HAS_SCALE: tl.constexpr, dtype: tl.constexpr):
    """x as the cache keeps it."""
    x = x.to(tl.float32)
    if HAS_SCALE:
        x = tl.div_rn(x, tl.load(scale))
    if dtype == tl.uint8:
        stored = _e4m3_bits(x)
    elif dtype == tl.int8:
        stored = ((tl.minimum(tl.maximum(x, -128.0), 127.0) + ROUND) - ROUND).to(tl.int8)
    else:
        stored = x.to(dtype)  # saturates if that is float8
    return stored


@triton.jit
def append(
    out, k, v, kv_cache, cu_seqlens, slot_mapping, k_scale, v_scale,
    num_seqs,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store the keys and values of one token, grid (T,); zero its row of out if it is in no sequence."""
    WIDTH: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    dtype: tl.constexpr = kv_cache.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        key_row = (slot // BLOCK_SIZE * (2 * BLOCK_SIZE) + slot % BLOCK_SIZE) * WIDTH
        for first in tl.static_range(0, WIDTH, CHUNK):
            index = first + tl.arange(0, CHUNK)
            inside = index < WIDTH
            key = tl.load(k + token * WIDTH + index, inside, 0.0)
            value = tl.load(v + token * WIDTH + index, inside, 0.0)
            target = kv_cache + key_row + index
            tl.store(target, _stored(key, k_scale, HAS_K_SCALE, dtype), inside)
            tl.store(target + BLOCK_SIZE * WIDTH, _stored(value, v_scale, HAS_V_SCALE, dtype), inside)
    if token >= tl.load(cu_seqlens + num_seqs):
        for first in tl.static_range(0, WIDTH * GROUP, CHUNK):
            index = first + tl.arange(0, CHUNK)
            zeros = tl.zeros([CHUNK], out.dtype.element_ty)
            tl.store(out + token * (WIDTH * GROUP) + index, zeros, index < WIDTH * GROUP)


@triton.jit
def _tiles_of_split(first_tile, end_tile, num_splits, MIN_TILES: tl.constexpr):
    """How many tiles each split takes; the last ones may have none left."""
    return tl.maximum(tl.cdiv(end_tile - first_tile, num_splits), MIN_TILES)


@triton.jit
def decode(
    out, partial_out, partial_lse, q, kv_cache, block_tables, cu_seqlens, context_lens, sinks, alibi_slopes,
    k_scale, v_scale,
    scale, max_blocks, max_tokens,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, DIMS: tl.constexpr, MIN_TILES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sequences with up to max_tokens new tokens, grid (B, KV heads, splits); the cache is what is read.

    With SPLIT each split leaves its weighted mean, partial_out [rows, H, splits, D] float32, and the base-2
    logarithm of its sum, partial_lse [rows, H, splits] float32, for `combine`; else there is one split.
    """
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    TOKENS: tl.constexpr = ROWS // GROUP
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    if length > max_tokens:
        return
    past = tl.load(context_lens + sequence) - length
    block_table = block_tables + sequence.to(tl.int64) * max_blocks
    score_scale = scale * element_scale(kv_cache, k_scale, HAS_K_SCALE) * LOG2_E
    value_scale = element_scale(kv_cache, v_scale, HAS_V_SCALE)
    dims = tl.arange(0, DIMS)
    for tokens in tl.range(0, length, TOKENS, num_stages=1):
        token, head, row, exists = query_rows(tokens, length, start, kv_head, NUM_KV_HEADS, GROUP, ROWS)
        first_seen = first_position(past + tokens, WINDOW)
        end_seen = past + tl.minimum(tokens + TOKENS, length)
        first_tile = first_seen // TILE
        end_tile = tl.cdiv(end_seen, TILE)
        if SPLIT:
            num_tiles = _tiles_of_split(first_tile, end_tile, tl.num_programs(2), MIN_TILES)
            first_tile += split * num_tiles
            end_tile = tl.minimum(first_tile + num_tiles, end_tile)
        if first_tile < end_tile:
            queries = load_queries(q, kv_cache, row, exists, HEAD_DIM, DIMS)
            total, maximum, weight, slope = start_softmax(
                head, exists, split == 0, sinks, alibi_slopes, HAS_SINKS, HAS_ALIBI, ROWS, DIMS
            )
            total, maximum, weight = attend(
                total, maximum, weight, queries, kv_cache, block_table, kv_head, past + token, slope,
                score_scale, first_seen, end_seen, first_tile, end_tile,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFTCAP, HAS_ALIBI, TILE, DIMS, True,
            )  # fmt: skip
            mean = total * (value_scale / tl.where(weight > 0.0, weight, 1.0))[:, None]
            inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
            if SPLIT:
                partial = _partial_row(sequence, start, token, max_tokens, TOKENS) * (NUM_KV_HEADS * GROUP)
                partial = (partial + head) * tl.num_programs(2) + split
                tl.store(partial_out + partial[:, None] * HEAD_DIM + dims[None, :], mean, inside)
                tl.store(partial_lse + partial, maximum + tl.log2(weight), exists)
            else:
                target = out + row[:, None] * HEAD_DIM + dims[None, :]
                tl.store(target, mean.to(out.dtype.element_ty), inside)


@triton.jit
def _partial_row(sequence, start, token, max_tokens, TOKENS: tl.constexpr):
    """Where a token's partial results are: of B * TOKENS rows, whichever way the tokens are spread.

    If sequences may have more than one tile of tokens, there are no more tokens than sequences.
    """
    return tl.where(max_tokens > TOKENS, start, sequence * TOKENS).to(tl.int64) + token


@triton.jit
def combine(
    out, partial_out, partial_lse, cu_seqlens, context_lens,
    num_splits, max_tokens,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, TOKENS: tl.constexpr,
    TILE: tl.constexpr, DIMS: tl.constexpr, MIN_TILES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """What the splits of `decode` found as one; grid (B, H), SPLITS at a time."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    if length > max_tokens:
        return
    past = tl.load(context_lens + sequence) - length
    dims = tl.arange(0, DIMS)
    for token in tl.range(0, length):
        tokens = token // TOKENS * TOKENS
        first_tile = first_position(past + tokens, WINDOW) // TILE
        end_tile = tl.cdiv(past + tl.minimum(tokens + TOKENS, length), TILE)
        num_tiles = _tiles_of_split(first_tile, end_tile, num_splits, MIN_TILES)
        used = tl.cdiv(end_tile - first_tile, num_tiles)
        partial = (_partial_row(sequence, start, token, max_tokens, TOKENS) * NUM_HEADS + head) * num_splits
        total = tl.zeros([DIMS], tl.float32)
        maximum = tl.full([1], NOTHING_YET, tl.float32)
        weight = tl.zeros([1], tl.float32)
        for first in tl.range(0, used, SPLITS):
            split = first + tl.arange(0, SPLITS)
            lse = tl.load(partial_lse + partial + split, split < used, HIDDEN)
            mask = (split < used)[:, None] & (dims < HEAD_DIM)[None, :]
            found = tl.load(partial_out + (partial + split)[:, None] * HEAD_DIM + dims[None, :], mask, 0.0)
            new_maximum = tl.maximum(maximum, tl.max(lse, 0))
            weights = tl.exp2(lse - new_maximum)
            shrink = tl.exp2(maximum - new_maximum)
            weight = weight * shrink + tl.sum(weights, 0)
            total = total * shrink + tl.sum(found * weights[:, None], 0)
            maximum = new_maximum
        result = total / tl.where(weight > 0.0, weight, 1.0)
        target = out + ((start + token).to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dims
        tl.store(target, result.to(out.dtype.element_ty), dims < HEAD_DIM)


@triton.jit
def _sequence_of(tile, cu_seqlens, num_seqs, TOKENS: tl.constexpr):
    """The sequence that a tile of queries is of. Sequence s has tiles from cu_seqlens[s] // TOKENS + s on:
    room enough for all of them, known without the others' lengths."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def prefill(
    out, q, kv_cache, block_tables, cu_seqlens, context_lens, sinks, alibi_slopes, k_scale, v_scale,
    scale, num_seqs, max_blocks, min_tokens,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Sequences with min_tokens new tokens or more, grid (T // TOKENS + B, KV heads)."""
    TOKENS: tl.constexpr = ROWS // GROUP
    # The last tiles of a sequence see most: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _sequence_of(tile, cu_seqlens, num_seqs, TOKENS)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    tokens = (tile - (start // TOKENS + sequence)) * TOKENS
    if (tokens >= length) | (length < min_tokens):
        return
    past = tl.load(context_lens + sequence) - length
    block_table = block_tables + sequence.to(tl.int64) * max_blocks
    score_scale = scale * element_scale(kv_cache, k_scale, HAS_K_SCALE) * LOG2_E
    token, head, row, exists = query_rows(tokens, length, start, kv_head, NUM_KV_HEADS, GROUP, ROWS)
    queries = load_queries(q, kv_cache, row, exists, HEAD_DIM, DIMS)
    total, maximum, weight, slope = start_softmax(
        head, exists, True, sinks, alibi_slopes, HAS_SINKS, HAS_ALIBI, ROWS, DIMS
    )
    first_seen = first_position(past + tokens, WINDOW)
    end_seen = past + tl.minimum(tokens + TOKENS, length)
    first_tile = first_seen // TILE
    if not WINDOW:  # tiles that every row sees all of
        end_full = (past + tokens + 1) // TILE
        total, maximum, weight = attend(
            total, maximum, weight, queries, kv_cache, block_table, kv_head, past + token, slope,
            score_scale, first_seen, end_seen, first_tile, end_full,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFTCAP, HAS_ALIBI, TILE, DIMS, False,
        )  # fmt: skip
        first_tile = end_full
    total, maximum, weight = attend(
        total, maximum, weight, queries, kv_cache, block_table, kv_head, past + token, slope,
        score_scale, first_seen, end_seen, first_tile, tl.cdiv(end_seen, TILE),
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFTCAP, HAS_ALIBI, TILE, DIMS, True,
    )  # fmt: skip
    value_scale = element_scale(kv_cache, v_scale, HAS_V_SCALE)
    mean = total * (value_scale / tl.where(weight > 0.0, weight, 1.0))[:, None]
    dims = tl.arange(0, DIMS)
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + row[:, None] * HEAD_DIM + dims[None, :], mean.to(out.dtype.element_ty), inside)
