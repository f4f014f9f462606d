"""PagedAttention in the Triton language: append, then decode and combine, and prefill.

Shapes and what they stand for are as in `op.py`; what is fixed in a model is a constant. A *tile* of queries
is ROWS rows: the query heads of one KV head for ROWS // GROUP tokens that follow each other; a tile of the
cache is TILE tokens of one KV head. Softmax is online (FlashAttention, arXiv 2205.14135), in base 2, with
float32 scores and sums; what a split of a long context finds is put together as in Flash-Decoding.

Caches of 8 bits are widened to float16, which is exact, whatever the queries are: bfloat16 could not hold an
int8. Where the hardware has no float8_e4m3fn (sm_80), the cache is given as uint8: the 7 magnitude bits of an
e4m3 are those of a float16 that is 2^8 times smaller.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
E4M3_MAX = tl.constexpr(448.0)
E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)
# Added to a float32 below 2^22, it leaves the nearest integer, ties to even, in the lowest bits.
ROUND = tl.constexpr(1.5 * 2**23)
HIDDEN = tl.constexpr(float("-inf"))
NOTHING_YET = tl.constexpr(-1.0e30)  # a maximum from which HIDDEN can be subtracted


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
def _scale_of(kv_cache, scale, HAS_SCALE: tl.constexpr):
    """What a widened element has to be multiplied by."""
    factor = 256.0 if kv_cache.dtype.element_ty == tl.uint8 else 1.0
    if HAS_SCALE:
        factor = tl.load(scale) * factor
    return factor


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
def _first_seen(position, WINDOW: tl.constexpr):
    """The first position that a token at `position` sees."""
    return tl.maximum(position - (WINDOW - 1), 0) if WINDOW else 0


@triton.jit
def _tiles_of_split(first_tile, end_tile, num_splits, MIN_TILES: tl.constexpr):
    """How many tiles each split takes; the last ones may have none left."""
    return tl.maximum(tl.cdiv(end_tile - first_tile, num_splits), MIN_TILES)


@triton.jit
def _query_rows(tokens, length, start, kv_head,
                NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """For each row its token in the sequence, query head, row of q and out, and whether it is one at all."""
    rows = tl.arange(0, ROWS)
    token = tokens + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    exists = (rows < (ROWS // GROUP) * GROUP) & (token < length)
    return token, head, (start + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head, exists


@triton.jit
def _load_queries(q, kv_cache, row, exists, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
    dims = tl.arange(0, DIMS)
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + row[:, None] * HEAD_DIM + dims[None, :], mask, 0.0)
    if kv_cache.dtype.element_ty.primitive_bitwidth == 8:
        # float16 has all digits of a bfloat16 but not its range.
        queries = tl.minimum(tl.maximum(queries.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return queries


@triton.jit
def _start(head, exists, with_sinks, sinks, alibi_slopes, HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr,
           ROWS: tl.constexpr, DIMS: tl.constexpr):  # fmt: skip
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
def _attend(
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
    score_scale = scale * _scale_of(kv_cache, k_scale, HAS_K_SCALE) * LOG2_E
    value_scale = _scale_of(kv_cache, v_scale, HAS_V_SCALE)
    dims = tl.arange(0, DIMS)
    for tokens in tl.range(0, length, TOKENS, num_stages=1):
        token, head, row, exists = _query_rows(tokens, length, start, kv_head, NUM_KV_HEADS, GROUP, ROWS)
        first_seen = _first_seen(past + tokens, WINDOW)
        end_seen = past + tl.minimum(tokens + TOKENS, length)
        first_tile = first_seen // TILE
        end_tile = tl.cdiv(end_seen, TILE)
        if SPLIT:
            num_tiles = _tiles_of_split(first_tile, end_tile, tl.num_programs(2), MIN_TILES)
            first_tile += split * num_tiles
            end_tile = tl.minimum(first_tile + num_tiles, end_tile)
        if first_tile < end_tile:
            queries = _load_queries(q, kv_cache, row, exists, HEAD_DIM, DIMS)
            total, maximum, weight, slope = _start(
                head, exists, split == 0, sinks, alibi_slopes, HAS_SINKS, HAS_ALIBI, ROWS, DIMS
            )
            total, maximum, weight = _attend(
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
        first_tile = _first_seen(past + tokens, WINDOW) // TILE
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
    score_scale = scale * _scale_of(kv_cache, k_scale, HAS_K_SCALE) * LOG2_E
    token, head, row, exists = _query_rows(tokens, length, start, kv_head, NUM_KV_HEADS, GROUP, ROWS)
    queries = _load_queries(q, kv_cache, row, exists, HEAD_DIM, DIMS)
    total, maximum, weight, slope = _start(
        head, exists, True, sinks, alibi_slopes, HAS_SINKS, HAS_ALIBI, ROWS, DIMS
    )
    first_seen = _first_seen(past + tokens, WINDOW)
    end_seen = past + tl.minimum(tokens + TOKENS, length)
    first_tile = first_seen // TILE
    if not WINDOW:  # tiles that every row sees all of
        end_full = (past + tokens + 1) // TILE
        total, maximum, weight = _attend(
            total, maximum, weight, queries, kv_cache, block_table, kv_head, past + token, slope,
            score_scale, first_seen, end_seen, first_tile, end_full,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFTCAP, HAS_ALIBI, TILE, DIMS, False,
        )  # fmt: skip
        first_tile = end_full
    total, maximum, weight = _attend(
        total, maximum, weight, queries, kv_cache, block_table, kv_head, past + token, slope,
        score_scale, first_seen, end_seen, first_tile, tl.cdiv(end_seen, TILE),
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, SOFTCAP, HAS_ALIBI, TILE, DIMS, True,
    )  # fmt: skip
    value_scale = _scale_of(kv_cache, v_scale, HAS_V_SCALE)
    mean = total * (value_scale / tl.where(weight > 0.0, weight, 1.0))[:, None]
    dims = tl.arange(0, DIMS)
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + row[:, None] * HEAD_DIM + dims[None, :], mean.to(out.dtype.element_ty), inside)
