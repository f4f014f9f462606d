"""PagedAttention out of standard ONNX operators.

Sequences are padded to the longest of the step, and the blocks they use are gathered, so that plain matrix
products compute the scores. B sequences, Q new tokens of the longest, S = N * block_size cached tokens,
H heads in groups of G that share one of Hkv KV heads. Where a shape is computed, 0 is the size that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from onnxscript import ir

from trtforge.errors import PluginError
from trtforge.plugins.body import Attributes, Body, Inputs

_INT32 = ir.DataType.INT32.value
_INT64 = ir.DataType.INT64.value
_FLOAT32 = ir.DataType.FLOAT.value
_FLOAT16 = ir.DataType.FLOAT16.value
_INT8 = ir.DataType.INT8
_E4M3 = ir.DataType.FLOAT8E4M3FN
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
    tables: ir.Value  # [B, N] int32: the blocks of each sequence, up to the longest one's
    places: ir.Value  # [B, N, block_size] which token of its sequence each element of these blocks is


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that compute (out, kv_cache_out). Raises PluginError if the cache's dtype is not known."""
    q = inputs["q"]
    window = int(attributes["window"])
    sizes = _sizes(op, inputs)
    cache = _append(op, inputs, sizes)
    batch = _batch(op, inputs, sizes)
    keys, values = _gather_blocks(op, cache, inputs, batch, sizes, window)
    places = op("Reshape", batch.places, [0, 1, 1, -1])
    distances = op("Sub", places, _positions(op, batch))  # [B, 1, Q, S], from a token to what it sees
    visible = op("LessOrEqual", distances, 0)
    if window > 0:
        visible = op("And", visible, op("Greater", distances, -window))
    scores = _scores(op, _pad(op, q, batch, sizes), keys, attributes)  # [B, Hkv, G * Q, S]
    if inputs["alibi_slopes"] is not None:
        slopes = op("Reshape", inputs["alibi_slopes"], [1, -1, 1, 1])
        bias = op("Mul", slopes, op("Cast", distances, to=_FLOAT32))  # [B, H, Q, S]
        scores = op("Add", scores, op("Reshape", bias, _shape(op, 0, sizes.num_kv_heads, -1, 0)))
    # The same for each head of a group, which is a part of the rows.
    visible = op("Reshape", op("Expand", visible, _shape(op, 1, sizes.group, 1, 1)), [0, 1, -1, 0])
    scores = op("Where", visible, scores, _HIDDEN)
    out = op("MatMul", op("CastLike", _softmax(op, scores, inputs["sinks"], batch, sizes), q), values)
    return _pack(op, out, q, _tokens(op, inputs), batch, sizes), op("CastLike", cache, inputs["kv_cache"])


def _shape(op: Body, *sizes: ir.Value | int) -> ir.Value:
    parts = [[size] if isinstance(size, int) else size for size in sizes]
    return op("Concat", *parts, axis=0)


def _index(op: Body, value: ir.Value | int | list[int]) -> ir.Value:
    """As an index of int32: TensorRT's parser adds a layer for each use of one of int64."""
    return op("Cast", value, to=_INT32)


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
    or the cache's own first values if there is none. Caches of 8 bits are returned in float16, which has all
    of their values: gathering and scattering know no float8.
    """
    cache = inputs["kv_cache"]
    dtype = None if cache is None else cache.dtype
    if dtype is None:
        raise PluginError("PagedAttention: the graph does not say which dtype kv_cache has")
    if dtype in (_INT8, _E4M3):
        cache = op("Cast", cache, to=_FLOAT16)
    slots = op("Cast", inputs["slot_mapping"], to=_INT64)
    tokens = _tokens(op, inputs)
    stored = op("GreaterOrEqual", slots, 0)
    last = op("ReduceMax", op("Where", stored, tokens, -1), keepdims=1)  # [1], -1: none is stored
    source = op("Where", stored, tokens, op("Max", last, 0))
    slots = op("Unsqueeze", op("Max", op("Gather", slots, source), 0), [1, 2, 3])
    blocks = op("Div", slots, sizes.block_size)
    offsets = op("Sub", slots, op("Mul", blocks, sizes.block_size))
    zeros = op("Sub", slots, slots)
    kinds = op("Concat", zeros, op("Add", zeros, 1), axis=1)  # key, value
    blocks, offsets = (op("Concat", x, x, axis=1) for x in (blocks, offsets))
    indices = op("Concat", blocks, kinds, offsets, axis=3)  # [T, 2, 1, 3]
    rows = [
        op("Unsqueeze", _stored(op, inputs[name], inputs[f"{name}_scale"], dtype), [1, 2])
        for name in ("k", "v")
    ]
    rows = op("CastLike", op("Concat", *rows, axis=1), cache)  # [T, 2, 1, Hkv, D]
    rows = op("Gather", rows, _index(op, source), axis=0)
    first = op("Gather", op("Gather", cache, _index(op, [0]), axis=0), _index(op, [0]), axis=2)
    rows = op("Where", op("Reshape", op("GreaterOrEqual", last, 0), [1, 1, 1, 1, 1]), rows, first)
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
    return _count(op, op("Cast", inputs["slot_mapping"], to=_INT64), 0)


def _count(op: Body, like: ir.Value, axis: int) -> ir.Value:
    """0, 1, … along an axis, in the shape of an int64, which a Range would not be known to have."""
    ones = op("Add", op("Sub", like, like), 1)
    return op("CumSum", ones, axis, exclusive=1)


def _batch(op: Body, inputs: Inputs, sizes: _Sizes) -> _Batch:
    context_lens = op("Cast", inputs["context_lens"], to=_INT64)
    cu_seqlens = op("Cast", inputs["cu_seqlens"], to=_INT64)
    sequences = _count(op, context_lens, 0)
    starts = op("Gather", cu_seqlens, sequences)
    ends = op("Gather", cu_seqlens, op("Add", sequences, 1))
    lens = op("Sub", ends, starts)
    longest = op("ReduceMax", lens, keepdims=0)
    rounded = op("Add", op("ReduceMax", context_lens, keepdims=1), op("Sub", sizes.block_size, [1]))
    num_blocks = op("Div", rounded, sizes.block_size)
    tables = op("Slice", inputs["block_tables"], [0], num_blocks, [1])
    blocks = _count(op, op("Cast", tables, to=_INT64), 1)
    firsts = op("Unsqueeze", op("Mul", blocks, sizes.block_size), [2])
    in_block = op("Range", 0, op("Squeeze", sizes.block_size, [0]), 1)
    return _Batch(
        starts=starts,
        ends=ends,
        lens=lens,
        context_lens=context_lens,
        offsets=op("Unsqueeze", op("Range", 0, longest, 1), [0]),
        longest=op("Unsqueeze", longest, [0]),
        tables=tables,
        places=op("Add", firsts, in_block),
    )


def _pad(op: Body, q: ir.Value | None, batch: _Batch, sizes: _Sizes) -> ir.Value:
    """Packed rows [T, H, D] -> [B, Hkv, G * Q, D]; rows past a sequence's end repeat row 0."""
    rows = op("Add", op("Unsqueeze", batch.starts, [1]), batch.offsets)
    inside = op("Less", batch.offsets, op("Unsqueeze", batch.lens, [1]))
    padded = op("Gather", q, _index(op, op("Where", inside, rows, 0)), axis=0)
    padded = op("Transpose", padded, perm=[0, 2, 1, 3])
    return op("Reshape", padded, _shape(op, 0, sizes.num_kv_heads, -1, sizes.head_dim))


def _gather_blocks(
    op: Body, cache: ir.Value, inputs: Inputs, batch: _Batch, sizes: _Sizes, window: int
) -> tuple[ir.Value, ir.Value]:
    """Keys [B, Hkv, D, S] and values [B, Hkv, S, D] of the blocks in use, in the queries' dtype."""
    used = op("Max", batch.tables, _index(op, 0))
    blocks = op("Gather", cache, used, axis=0)  # [B, N, 2, block_size, Hkv, D]
    shape = _shape(op, 0, -1, sizes.num_kv_heads, sizes.head_dim)
    # Apart, so that the keys' memory is free before the values are needed.
    keys, values = (op("Reshape", op("Gather", blocks, _index(op, kind), axis=2), shape) for kind in (0, 1))
    keys = op("Transpose", keys, perm=[0, 2, 3, 1])
    values = op("Transpose", values, perm=[0, 2, 1, 3])
    values = _restored(op, values, inputs["v_scale"], inputs["q"])
    # What nobody sees may be anything: NaN times a weight of zero were NaN.
    seen = op("Reshape", _seen_by_any(op, batch, window), [0, 1, -1, 1])
    values = op("Where", seen, values, op("CastLike", 0.0, inputs["q"]))
    return _restored(op, keys, inputs["k_scale"], inputs["q"]), values


def _scores(op: Body, q: ir.Value, keys: ir.Value, attributes: Attributes) -> ir.Value:
    """Scaled and capped scores in float32, [B, Hkv, G * Q, S]."""
    scores = op("MatMul", q, keys)
    scores = op("Mul", op("Cast", scores, to=_FLOAT32), float(attributes["scale"]))
    softcap = float(attributes["softcap"])
    if softcap == 0.0:
        return scores
    return op("Mul", op("Tanh", op("Div", scores, softcap)), softcap)


def _positions(op: Body, batch: _Batch) -> ir.Value:
    """Of the new tokens in their sequences, [B, 1, Q, 1]."""
    first = op("Sub", batch.context_lens, batch.lens)
    return op("Unsqueeze", op("Add", op("Unsqueeze", first, [1]), batch.offsets), [1, 3])


def _seen_by_any(op: Body, batch: _Batch, window: int) -> ir.Value:
    """Which places any new token of a sequence looks at, bool [B, N, block_size]."""
    seen = op("Less", batch.places, op("Unsqueeze", batch.context_lens, [1, 2]))
    if window == 0:
        return seen
    first = op("Sub", op("Sub", batch.context_lens, batch.lens), window)
    return op("And", seen, op("Greater", batch.places, op("Unsqueeze", first, [1, 2])))


def _softmax(op: Body, scores: ir.Value, sinks: ir.Value | None, batch: _Batch, sizes: _Sizes) -> ir.Value:
    """Softmax over the last dim; a sink is one more score a head, whose weight goes nowhere."""
    if sinks is None:
        return op("Softmax", scores, axis=-1)
    column = op("Reshape", op("Cast", sinks, to=_FLOAT32), [1, -1, 1, 1])
    column = op("Expand", column, _shape(op, sizes.num_seqs, 1, batch.longest, 1))  # [B, H, Q, 1]
    sink_scores = op("Reshape", column, _shape(op, 0, sizes.num_kv_heads, -1, 1))
    weights = op("Softmax", op("Concat", scores, sink_scores, axis=-1), axis=-1)
    return op("Slice", weights, [0], [-1], [-1])


def _pack(
    op: Body, out: ir.Value, q: ir.Value | None, tokens: ir.Value, batch: _Batch, sizes: _Sizes
) -> ir.Value:
    """[B, Hkv, G * Q, D] -> packed rows [T, H, D]. Rows past the last sequence are zero."""
    out = op("Reshape", out, _shape(op, 0, sizes.num_heads, -1, sizes.head_dim))
    out = op("Transpose", out, perm=[0, 2, 1, 3])
    out = op("Reshape", out, _shape(op, -1, op("Mul", sizes.num_heads, sizes.head_dim)))  # [B * Q, H * D]
    ended = op("GreaterOrEqual", op("Unsqueeze", tokens, [1]), batch.ends)
    sequence = op("ReduceSum", op("Cast", ended, to=_INT64), [1], keepdims=0)
    inside = op("Less", sequence, sizes.num_seqs)
    sequence = op("Min", sequence, op("Sub", sizes.num_seqs, 1))
    offset = op("Min", op("Sub", tokens, op("Gather", batch.starts, sequence)), op("Sub", batch.longest, 1))
    index = _index(op, op("Add", op("Mul", sequence, batch.longest), offset))
    rows = op("Gather", out, index, axis=0)
    rows = op("Where", op("Unsqueeze", inside, [1]), rows, op("CastLike", 0.0, q))
    return op("Reshape", rows, _shape(op, -1, sizes.num_heads, sizes.head_dim))
