"""QkNorm in the Triton language."""

import triton
import triton.language as tl


@triton.jit
def qk_norm(
    q_out,
    k_out,
    q,
    k,
    q_weight,
    k_weight,
    num_tokens,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """Grid: tiles of ROWS heads; first those of all tokens of q, then those of k."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(num_tokens * HEADS, ROWS)
    if tile < q_tiles:
        _normalize(q_out, q, q_weight, tile, num_tokens * HEADS, eps, DIM, ROWS, UNIT_OFFSET)
    else:
        _normalize(k_out, k, k_weight, tile - q_tiles, num_tokens * KV_HEADS, eps, DIM, ROWS, UNIT_OFFSET)


@triton.jit
def _normalize(
    out,
    x,
    weight,
    tile,
    num_rows,
    eps,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """One tile of x [num_rows, DIM]."""
    row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    place = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    inside = (row < num_rows) & (place < DIM)
    offset = row.to(tl.int64) * DIM + place
    wide = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    # In the layout of x: loaded as one row, it would be narrow loads and a detour through shared memory.
    scale = tl.load(weight + tl.broadcast_to(place, inside.shape), mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        scale += 1.0
    normalized = wide * tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None] * scale
    tl.store(out + offset, normalized.to(out.dtype.element_ty), mask=inside)
