"""Int4Gemm out of standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from trtforge.plugins.body import Attributes, Body, Inputs
from trtforge.plugins.int4_gemm.op import CHUNK, STEP, WORDS

_UINT32 = ir.DataType.UINT32.value
# Where a word keeps its columns, in their order: those of a shift in its two halves.
_SHIFTS = [4 * shift + half for shift in range(STEP // CHUNK) for half in (0, 16)]


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that compute y from the packed weight.

    TensorRT-RTX refuses shifts in a function's body: there, weights take its own four-bit type instead.
    """
    x, scales = inputs["x"], inputs["scales"]
    if inputs["perm"] is not None:
        x = op("Gather", x, inputs["perm"], axis=-1)
    out_features = op("Shape", scales, start=1, end=2)
    in_features = op("Shape", x, start=-1)
    num_groups = op("Shape", scales, start=0, end=1)

    ends = op("Concat", out_features, in_features, axis=0)
    values = op("Slice", _unpack(op, inputs["weight"]), [0, 0], ends, [0, 1])
    grouped = op("Reshape", values, op("Concat", out_features, num_groups, [-1], axis=0))
    centered = op("Sub", op("CastLike", grouped, scales), _by_group(op, scales, 1))
    weight = op("Reshape", op("Mul", centered, _by_group(op, scales, 0)), ends)

    y = op("MatMul", x, op("Transpose", weight, perm=[1, 0]))
    return (y if inputs["bias"] is None else op("Add", y, inputs["bias"]),)


def _unpack(op: Body, weight: ir.Value | None) -> ir.Value:
    """[tiles, steps, TILE, WORDS] -> [tiles * TILE, steps * STEP], 0 to 15."""
    words = op("Unsqueeze", op("Cast", weight, to=_UINT32), [4])
    shifted = op("BitShift", words, op("Cast", _SHIFTS, to=_UINT32), direction="RIGHT")
    values = op("BitwiseAnd", shifted, op("Cast", 15, to=_UINT32))  # ..., word, (shift, half)
    blocks = op("Reshape", values, [0, 0, 0, WORDS, STEP // CHUNK, 2])
    rows = op("Transpose", blocks, perm=[0, 2, 1, 4, 3, 5])  # tile, row, step, shift, word, half
    num_columns = op("Mul", op("Shape", weight, start=1, end=2), STEP)
    return op("Reshape", rows, op("Concat", [-1], num_columns, axis=0))


def _by_group(op: Body, scales: ir.Value | None, index: int) -> ir.Value:
    """Scales (0) or zero points (1) as [out, groups, 1]."""
    return op("Unsqueeze", op("Transpose", op("Gather", scales, index, axis=2), perm=[1, 0]), [2])
