"""Reads four-bit weights as checkpoints store them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trtforge.errors import PluginError
from trtforge.plugins.int4_gemm.packing import SYMMETRIC_ZERO, Int4Weight
from trtforge.plugins.op import Array

# In an AWQ word, nibble i is column _AWQ_COLUMNS[i] of its eight.
_AWQ_COLUMNS = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_PLAIN_COLUMNS = np.arange(8)


def read_awq(qweight: Array, qzeros: Array, scales: Array) -> Int4Weight:
    """AutoAWQ's "gemm" version: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales
    [groups, out]. Source: AWQ (arXiv 2306.00978)."""
    return Int4Weight(
        values=_nibbles(qweight, _AWQ_COLUMNS).T, scales=scales.T, zeros=_nibbles(qzeros, _AWQ_COLUMNS).T
    )


def read_gptq(
    qweight: Array, qzeros: Array, scales: Array, g_idx: Array | None = None, *, zeros_minus_one: bool = True
) -> Int4Weight:
    """GPTQ: qweight int32 [in / 8, out], qzeros int32 [groups, out / 8], scales [groups, out].

    g_idx [in] is the group of each input, which for "act-order" is in no order: columns are then sorted by
    group. `zeros_minus_one`: the first version of the format ("gptq") stores zero points less one, the
    second ("gptq_v2") as they are. Raises PluginError for groups of unequal size.
    Source: GPTQ (arXiv 2210.17323).
    """
    values = _nibbles(qweight.T, _PLAIN_COLUMNS)
    # A stored 15 means 16: the sum is not cut to four bits.
    zeros = (_nibbles(qzeros, _PLAIN_COLUMNS) + np.uint8(zeros_minus_one)).T
    perm = None if g_idx is None else _order_by_group(g_idx, scales.shape[0])
    return Int4Weight(
        values=values if perm is None else values[:, perm], scales=scales.T, zeros=zeros, perm=perm
    )


def read_compressed_tensors(
    weight_packed: Array,
    weight_scale: Array,
    weight_zero_point: Array | None = None,
    weight_g_idx: Array | None = None,
) -> Int4Weight:
    """compressed-tensors' "pack-quantized": weight_packed int32 [out, in / 8], weight_scale [out, groups],
    weight_zero_point int32 [out / 8, groups], weight_g_idx [in]. All are stored plus 8, without a sign.

    Raises PluginError for groups of unequal size.
    """
    values = _nibbles(weight_packed, _PLAIN_COLUMNS)
    if weight_zero_point is None:
        zeros = np.full(weight_scale.shape, SYMMETRIC_ZERO, np.uint8)
    else:
        zeros = _nibbles(weight_zero_point.T, _PLAIN_COLUMNS).T[: weight_scale.shape[0]]
    perm = None if weight_g_idx is None else _order_by_group(weight_g_idx, weight_scale.shape[1])
    return Int4Weight(
        values=values if perm is None else values[:, perm], scales=weight_scale, zeros=zeros, perm=perm
    )


def read_modelopt(weight: Array, weight_scale: Array) -> Int4Weight:
    """ModelOpt's W4A16: weight uint8 [out / 2, in] with row 2i in the low and 2i + 1 in the high nibble,
    signed; weight_scale [out, groups]."""
    rows = np.stack([weight & 15, weight >> 4], axis=1).reshape(-1, weight.shape[1])
    zeros = np.full(weight_scale.shape, SYMMETRIC_ZERO, np.uint8)
    return Int4Weight(values=rows ^ 8, scales=weight_scale, zeros=zeros)


def _nibbles(words: Array, columns: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
    """int32 [rows, words] -> [rows, 8 * words]: nibble i of a word is column `columns[i]` of its eight."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    values = np.empty((*unsigned.shape, 8), np.uint8)
    for nibble, column in enumerate(columns):
        values[:, :, column] = (unsigned >> np.uint32(4 * nibble)) & 15
    return values.reshape(unsigned.shape[0], -1)


def _order_by_group(g_idx: Array, num_groups: int) -> npt.NDArray[np.int32] | None:
    """The order that makes each group's columns neighbours; None if they are."""
    sizes = np.bincount(g_idx, minlength=num_groups)
    if len(sizes) != num_groups or len(set(sizes)) != 1:
        raise PluginError(f"Int4Gemm: the groups of g_idx have {sizes.tolist()} columns, not the same number")
    if np.all(np.diff(g_idx) >= 0):
        return None
    return np.argsort(g_idx, kind="stable").astype(np.int32)
