"""Chains of nodes that only give the same elements another shape become one Reshape."""

from __future__ import annotations

import onnx_ir as ir

from trtforge.builder.graph_edits import append_before

_VIEWS = {"Reshape", "Squeeze", "Unsqueeze"}


def merge_views(model: ir.Model) -> None:
    """Give what each chain ends with the chain's first value. Nodes without a use stay.

    Only shapes that a constant can describe are merged: with one dim at most that is known at run time.
    """
    source: dict[ir.Value, ir.Value] = {}  # of each view, what it is a view of
    for node in list(model.graph):
        if not _is_view(node):
            continue
        value, out = node.inputs[0], node.outputs[0]
        root = source.get(value, value)
        source[out] = root
        sizes = _constant_shape(out.shape)
        if sizes is None or out.is_graph_output():
            continue
        if sizes == _constant_shape(root.shape):
            out.replace_all_uses_with(root)
        elif root is not value or node.op_type == "Transpose":
            merged = append_before(node, "Reshape", [root, sizes])
            merged.dtype, merged.shape = out.dtype, out.shape
            source[merged] = root
            out.replace_all_uses_with(merged)


def _is_view(node: ir.Node) -> bool:
    if node.op_type != "Transpose":
        return node.op_type in _VIEWS
    shape = node.inputs[0].shape
    if shape is None:
        return False
    # The dims that count stay in order.
    moved = [axis for axis in node.attributes.get_ints("perm", []) if shape[axis] != 1]
    return bool(moved) and moved == sorted(moved)


def _constant_shape(shape: ir.Shape | None) -> list[int] | None:
    """As a Reshape takes it, with -1 for the dim that is not known; None if there are several."""
    if shape is None or sum(not isinstance(dim, int) for dim in shape) > 1 or 0 in shape:
        return None
    return [dim if isinstance(dim, int) else -1 for dim in shape]
