"""Rope in the Triton language."""

import triton
import triton.language as tl


@triton.jit
def rope(
    q_out,
    k_out,
    q,
    k,
    cos,
    sin,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, triton.next_power_of_2(PAIRS))
    c = tl.load(cos + token * PAIRS + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * PAIRS + pair, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    row, kv_row = token * (HEADS * DIM), token * (KV_HEADS * DIM)
    _rotate(q_out + row, q + row, c, s, HEADS, DIM, PAIRS, INTERLEAVED)
    _rotate(k_out + kv_row, k + kv_row, c, s, KV_HEADS, DIM, PAIRS, INTERLEAVED)


@triton.jit
def _rotate(
    out,
    x,
    c,
    s,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """All heads [HEADS, DIM] of one token; c and s are [1, pairs]."""
    ROWS: tl.constexpr = triton.next_power_of_2(HEADS)
    WIDTH: tl.constexpr = triton.next_power_of_2(PAIRS)
    head = tl.arange(0, ROWS)[:, None]
    if INTERLEAVED:
        place = tl.arange(0, 2 * WIDTH)[None, :]
        inside = (head < HEADS) & (place < 2 * PAIRS)
        pairs = tl.load(x + head * DIM + place, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(pairs.reshape(ROWS, WIDTH, 2))
        turned = tl.join(first * c - second * s, second * c + first * s).reshape(ROWS, 2 * WIDTH)
        tl.store(out + head * DIM + place, turned.to(out.dtype.element_ty), mask=inside)
    else:
        place = head * DIM + tl.arange(0, WIDTH)[None, :]
        inside = (head < HEADS) & (tl.arange(0, WIDTH) < PAIRS)[None, :]
        first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + PAIRS + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
        tl.store(out + PAIRS + place, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
    REST: tl.constexpr = DIM - 2 * PAIRS
    if REST > 0:
        rest = tl.arange(0, triton.next_power_of_2(REST))[None, :]
        place = head * DIM + 2 * PAIRS + rest
        inside = (head < HEADS) & (rest < REST)
        tl.store(out + place, tl.load(x + place, mask=inside), mask=inside)
