"""PagedAttention out of standard ONNX operators.

Sequences are padded to the longest of the step, and the blocks they use are gathered, so that plain matrix
products compute the scores. B sequences, Q new tokens of the longest, S cached tokens, G = H / Hkv.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from onnxscript import ir

from trtforge.errors import PluginError
from trtforge.plugins.body import Attributes, Body, Inputs

_INT64 = ir.DataType.INT64.value
_FLOAT32 = ir.DataType.FLOAT.value
_FLOAT16 = ir.DataType.FLOAT16.value
_INT8 = ir.DataType.INT8
_E4M3 = ir.DataType.FLOAT8E4M3FN
_MAX_INT64 = 2**63 - 1
_HIDDEN = -30000.0  # a score that exp() makes zero, within the range of float16


class _Sizes(NamedTuple):
    """Sizes that are known at run time only, as int64 of shape [1]."""

    num_heads: ir.Value
    num_kv_heads: ir.Value
    group: ir.Value  # query heads that share a KV head
    head_dim: ir.Value
    block_size: ir.Value
    num_seqs: ir.Value


class _Batch(NamedTuple):
    """Where each sequence's tokens are. All int64."""

    starts: ir.Value  # [B] first row of each sequence
    ends: ir.Value  # [B]
    lens: ir.Value  # [B] new tokens
    context_lens: ir.Value  # [B]
    offsets: ir.Value  # [1, Q] 0, 1, …
    longest: ir.Value  # [1] Q


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that compute (out, kv_cache_out). Raises PluginError if the cache's dtype is not known."""
    q, tables = inputs["q"], inputs["block_tables"]
    window = int(attributes["window"])
    sizes = _sizes(op, inputs)
    cache = _append(op, inputs, sizes)
    batch = _batch(op, inputs)
    keys, values, num_slots = _gather_blocks(op, cache, tables, batch, sizes)
    keys = _restored(op, keys, inputs["k_scale"], q)
    values = _restored(op, values, inputs["v_scale"], q)
    # What nobody sees may be anything: NaN times a weight of zero were NaN.
    slots = op("Range", 0, op("Squeeze", num_slots, [0]), 1)  # [S]
    values = op("Where", _seen_by_any(op, slots, batch, window), values, op("CastLike", 0.0, q))
    scores = _scores(op, _pad(op, q, batch, sizes), keys, attributes)
    scores = op("Reshape", scores, _shape(op, sizes.num_seqs, sizes.num_kv_heads, sizes.group, -1, num_slots))
    distances = op("Sub", slots, _positions(op, batch))  # [B, 1, 1, Q, S], from a token to what it sees
    if inputs["alibi_slopes"] is not None:
        slopes = op("Reshape", inputs["alibi_slopes"], _shape(op, 1, sizes.num_kv_heads, sizes.group, 1, 1))
        scores = op("Add", scores, op("Mul", slopes, op("Cast", distances, to=_FLOAT32)))
    scores = op("Where", _visible(op, distances, window), scores, _HIDDEN)  # [B, Hkv, G, Q, S]
    weights = op("CastLike", _softmax(op, scores, inputs["sinks"], batch, sizes), q)
    weights = op("Reshape", weights, _shape(op, sizes.num_seqs, sizes.num_kv_heads, -1, num_slots))
    out = op("MatMul", weights, values)  # [B, Hkv, G * Q, D]
    return _pack(op, out, q, _tokens(op, inputs), batch, sizes), op("CastLike", cache, inputs["kv_cache"])


def _shape(op: Body, *sizes: ir.Value | int) -> ir.Value:
    parts = [[size] if isinstance(size, int) else size for size in sizes]
    return op("Concat", *parts, axis=0)


def _sizes(op: Body, inputs: Inputs) -> _Sizes:
    heads = op("Shape", inputs["q"], start=1, end=2)
    kv_heads = op("Shape", inputs["kv_cache"], start=3, end=4)
    return _Sizes(
        num_heads=heads,
        num_kv_heads=kv_heads,
        group=op("Div", heads, kv_heads),
        head_dim=op("Shape", inputs["q"], start=2, end=3),
        block_size=op("Shape", inputs["kv_cache"], start=2, end=3),
        num_seqs=op("Shape", inputs["context_lens"]),
    )


def _append(op: Body, inputs: Inputs, sizes: _Sizes) -> ir.Value:
    """The cache with the new keys and values of all tokens whose slot is not negative.

    TensorRT-RTX has no Compress and no NonZero: tokens that are not stored repeat the write of one that is,
    or the cache's own values if there is none. Caches of 8 bits are returned in float16, which has all of
    their values: gathering and scattering know no float8.
    """
    slots = op("Cast", inputs["slot_mapping"], to=_INT64)
    tokens = _tokens(op, inputs)
    stored = op("GreaterOrEqual", slots, 0)
    last = op("ReduceMax", op("Where", stored, tokens, -1), keepdims=1)  # [1], -1: none is stored
    source = op("Where", stored, tokens, op("Max", last, 0))
    slots = op("Unsqueeze", op("Max", op("Gather", slots, source), 0), [1])
    blocks = op("Div", slots, sizes.block_size)
    offsets = op("Sub", slots, op("Mul", blocks, sizes.block_size))
    zeros = op("Sub", slots, slots)
    indices = op(
        "Concat",
        op("Concat", blocks, zeros, offsets, axis=1),
        op("Concat", blocks, op("Add", zeros, 1), offsets, axis=1),
        axis=0,
    )  # [2T, 3]: block, key or value, offset
    cache = inputs["kv_cache"]
    dtype = None if cache is None else cache.dtype
    if dtype is None:
        raise PluginError("PagedAttention: the graph does not say which dtype kv_cache has")
    if dtype in (_INT8, _E4M3):
        cache = op("Cast", cache, to=_FLOAT16)
    rows = [
        _stored(op, op("Gather", inputs[name], source, axis=0), inputs[f"{name}_scale"], dtype)
        for name in ("k", "v")
    ]
    rows = op("CastLike", op("Concat", *rows, axis=0), cache)
    rows = op("Where", op("GreaterOrEqual", last, 0), rows, op("GatherND", cache, indices))
    return op("ScatterND", cache, indices, rows)


def _stored(op: Body, rows: ir.Value, scale: ir.Value | None, dtype: ir.DataType) -> ir.Value:
    """Keys or values rounded as the cache keeps them, in a dtype that may be wider."""
    if scale is not None:
        rows = op("Div", op("Cast", rows, to=_FLOAT32), scale)
    if dtype == _INT8:
        rows = op("Clip", op("Round", op("Cast", rows, to=_FLOAT32)), -128.0, 127.0)
    elif dtype == _E4M3:
        rows = op("Cast", op("Cast", rows, to=_E4M3.value), to=_FLOAT16)  # saturates
    return rows


def _restored(op: Body, x: ir.Value, scale: ir.Value | None, q: ir.Value | None) -> ir.Value:
    """Stored keys or values in the queries' dtype."""
    if scale is not None:
        x = op("Mul", op("Cast", x, to=_FLOAT32), scale)
    return op("CastLike", x, q)


def _tokens(op: Body, inputs: Inputs) -> ir.Value:
    """0, 1, … of all tokens, [T]."""
    return op("Range", 0, op("Squeeze", op("Shape", inputs["slot_mapping"]), [0]), 1)


def _batch(op: Body, inputs: Inputs) -> _Batch:
    cu_seqlens = op("Cast", inputs["cu_seqlens"], to=_INT64)
    starts = op("Slice", cu_seqlens, [0], [-1])
    ends = op("Slice", cu_seqlens, [1], [_MAX_INT64])
    lens = op("Sub", ends, starts)
    longest = op("ReduceMax", lens, keepdims=0)
    return _Batch(
        starts=starts,
        ends=ends,
        lens=lens,
        context_lens=op("Cast", inputs["context_lens"], to=_INT64),
        offsets=op("Unsqueeze", op("Range", 0, longest, 1), [0]),
        longest=op("Unsqueeze", longest, [0]),
    )


def _pad(op: Body, q: ir.Value, batch: _Batch, sizes: _Sizes) -> ir.Value:
    """Packed rows [T, H, D] -> [B, Hkv, G * Q, D]; rows past a sequence's end repeat row 0."""
    rows = op("Add", op("Unsqueeze", batch.starts, [1]), batch.offsets)
    inside = op("Less", batch.offsets, op("Unsqueeze", batch.lens, [1]))
    padded = op("Gather", q, op("Where", inside, rows, 0), axis=0)
    shape = (sizes.num_seqs, batch.longest, sizes.num_kv_heads, sizes.group, sizes.head_dim)
    padded = op("Transpose", op("Reshape", padded, _shape(op, *shape)), perm=[0, 2, 3, 1, 4])
    return op("Reshape", padded, _shape(op, sizes.num_seqs, sizes.num_kv_heads, -1, sizes.head_dim))


def _gather_blocks(
    op: Body, cache: ir.Value, tables: ir.Value | None, batch: _Batch, sizes: _Sizes
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Keys [B, Hkv, D, S] and values [B, Hkv, S, D] of the blocks in use, and S."""
    longest = op("ReduceMax", batch.context_lens, keepdims=1)
    rounded = op("Add", longest, op("Sub", sizes.block_size, [1]))
    num_blocks = op("Div", rounded, sizes.block_size)
    used = op("Slice", op("Cast", tables, to=_INT64), [0], num_blocks, [1])
    blocks = op("Gather", cache, op("Max", used, 0), axis=0)  # [B, blocks, 2, block_size, Hkv, D]
    shape = _shape(op, sizes.num_seqs, -1, sizes.num_kv_heads, sizes.head_dim)
    keys = op("Reshape", op("Gather", blocks, 0, axis=2), shape)
    values = op("Reshape", op("Gather", blocks, 1, axis=2), shape)
    return (
        op("Transpose", keys, perm=[0, 2, 3, 1]),
        op("Transpose", values, perm=[0, 2, 1, 3]),
        op("Mul", num_blocks, sizes.block_size),
    )


def _scores(op: Body, q: ir.Value, keys: ir.Value, attributes: Attributes) -> ir.Value:
    """Scaled and capped scores in float32, [B, Hkv, G * Q, S]."""
    scores = op("Cast", op("MatMul", q, keys), to=_FLOAT32)
    scores = op("Mul", scores, float(attributes["scale"]))
    softcap = float(attributes["softcap"])
    if softcap == 0.0:
        return scores
    return op("Mul", op("Tanh", op("Div", scores, softcap)), softcap)


def _positions(op: Body, batch: _Batch) -> ir.Value:
    """Of the new tokens in their sequences, [B, 1, 1, Q, 1]."""
    first = op("Sub", batch.context_lens, batch.lens)
    return op("Unsqueeze", op("Add", op("Unsqueeze", first, [1]), batch.offsets), [1, 2, 4])


def _visible(op: Body, distances: ir.Value, window: int) -> ir.Value:
    """Which cached token each new one may look at, bool [B, 1, 1, Q, S]."""
    visible = op("LessOrEqual", distances, 0)
    if window == 0:
        return visible
    return op("And", visible, op("Greater", distances, -window))


def _seen_by_any(op: Body, slots: ir.Value, batch: _Batch, window: int) -> ir.Value:
    """Which slots any new token of a sequence looks at, bool [B, 1, S, 1]."""
    seen = op("Less", slots, op("Unsqueeze", batch.context_lens, [1]))
    if window > 0:
        first = op("Sub", op("Sub", batch.context_lens, batch.lens), window)
        seen = op("And", seen, op("Greater", slots, op("Unsqueeze", first, [1])))
    return op("Unsqueeze", seen, [1, 3])


def _softmax(op: Body, scores: ir.Value, sinks: ir.Value | None, batch: _Batch, sizes: _Sizes) -> ir.Value:
    """Softmax over the last dim; a sink is one more score a head, whose weight goes nowhere."""
    if sinks is None:
        return op("Softmax", scores, axis=-1)
    column = _shape(op, 1, sizes.num_kv_heads, sizes.group, 1, 1)
    shape = _shape(op, sizes.num_seqs, sizes.num_kv_heads, sizes.group, batch.longest, 1)
    sink_scores = op("Expand", op("Reshape", op("Cast", sinks, to=_FLOAT32), column), shape)
    weights = op("Softmax", op("Concat", scores, sink_scores, axis=-1), axis=-1)
    return op("Slice", weights, [0], [-1], [-1])


def _pack(
    op: Body, out: ir.Value, q: ir.Value | None, tokens: ir.Value, batch: _Batch, sizes: _Sizes
) -> ir.Value:
    """[B, Hkv, G * Q, D] -> packed rows [T, H, D]. Rows past the last sequence are zero."""
    shape = (sizes.num_seqs, sizes.num_kv_heads, sizes.group, batch.longest, sizes.head_dim)
    out = op("Transpose", op("Reshape", out, _shape(op, *shape)), perm=[0, 3, 1, 2, 4])
    out = op("Reshape", out, _shape(op, -1, sizes.num_heads, sizes.head_dim))  # [B * Q, H, D]
    ended = op("GreaterOrEqual", op("Unsqueeze", tokens, [1]), batch.ends)
    sequence = op("ReduceSum", op("Cast", ended, to=_INT64), [1], keepdims=0)
    inside = op("Less", sequence, sizes.num_seqs)
    sequence = op("Min", sequence, op("Sub", sizes.num_seqs, 1))
    offset = op("Min", op("Sub", tokens, op("Gather", batch.starts, sequence)), op("Sub", batch.longest, 1))
    rows = op("Gather", out, op("Add", op("Mul", sequence, batch.longest), offset), axis=0)
    return op("Where", op("Unsqueeze", inside, [1, 2]), rows, op("CastLike", 0.0, q))
