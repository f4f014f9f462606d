"""From a graph with custom operators to one of standard operators, but for those that have plugins.

The bodies of all attention nodes compute the same positions, masks and indices. Once they are inlined into
one graph and shapes are known, these are common subexpressions: one copy of each remains, in front of the
layers. Layers with a window share those of their own.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer

from trtforge.builder.parser_forms import use_parser_forms
from trtforge.builder.token_rows import drop_unit_axis
from trtforge.builder.views import merge_views
from trtforge.plugins.all_reduce.op import ALL_REDUCE
from trtforge.plugins.function_bodies import add_function_bodies
from trtforge.plugins.op import DOMAIN

_TENSORRT_DOMAIN = "trt"  # of operators that its parser knows and ONNX does not
BLOCK_SIZE_DIM = "block_size"  # of the cache inputs, as the exporter names it


def lower(graph: Path, block_size: int, keep: Collection[str] = (), tp_size: int = 1) -> ir.Model:
    """The graph in the file `graph`, of one of `tp_size` ranks, out of standard operators and those named in
    `keep`, for caches with blocks of `block_size`. Sums over ranks become TensorRT's own operator.

    Weights stay where they are, as external data. Raises PluginError for an unknown custom operator.
    """
    model = ir.load(graph)
    _fix_block_size(model, block_size)
    _use_collectives(model, tp_size)
    add_function_bodies(model, keep)
    merge = passes.CommonSubexpressionEliminationPass()
    ir.passes.Sequential(passes.InlinePass(), merge)(model)
    optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=_should_fold)
    drop_unit_axis(model)
    merge_views(model)
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        # Equal constants have to be one value before what depends on them can be merged.
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        merge,
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
    )(model)
    use_parser_forms(model)
    ir.passes.Sequential(passes.RemoveUnusedNodesPass(), passes.NameFixPass())(model)
    _compute_whole_shapes(model)
    return model


def _fix_block_size(model: ir.Model, block_size: int) -> None:
    for value in model.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(block_size if str(dim) == BLOCK_SIZE_DIM else dim for dim in value.shape)


def _use_collectives(model: ir.Model, tp_size: int) -> None:
    """A rank's engine has a communicator of the `tp_size` ranks of its stage: no groups are needed."""
    for node in list(model.graph):
        if (node.domain, node.op_type) != (DOMAIN, ALL_REDUCE.name):
            continue
        attributes = {
            "collective_operation": "all_reduce",
            "reduce_op": "sum",
            "nb_rank": tp_size,
            "root": -1,
            "group_size": 0,
        }
        collective = ir.node("DistCollective", node.inputs, attributes, domain=_TENSORRT_DOMAIN)
        collective.attributes["groups"] = ir.AttrInt64s("groups", [])
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [collective], node.outputs, collective.outputs
        )
        model.opset_imports[_TENSORRT_DOMAIN] = 1


def _should_fold(node: ir.Node) -> bool | None:
    """What works on weights stays: folding would copy them all, and TensorRT folds it itself, or has kernels
    for weights that are dequantized."""
    return False if node.op_type in ("Transpose", "DequantizeLinear") else None


def _compute_whole_shapes(model: ir.Model) -> None:
    """Say that computed shapes have no zeros that mean "as before", which TensorRT would have to check."""
    for node in model.graph:
        if node.op_type == "Reshape" and node.inputs[1].const_value is None:
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 1)
