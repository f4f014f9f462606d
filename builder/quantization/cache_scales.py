"""Scales of keys and values that a checkpoint brings for a cache of e4m3."""

from __future__ import annotations

import math
import re

import numpy as np
import onnx_ir as ir

from trtforge import wire
from trtforge.builder.quantization.checkpoint_module import Tensors
from trtforge.errors import ExportError
from trtforge.plugins.op import DOMAIN, Array
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION

_INPUTS = [tensor.name for tensor in PAGED_ATTENTION.inputs]
# Of vLLM and compressed-tensors, of ModelOpt, which has them below k_proj and v_proj, and of older
# compressed-tensors: model.layers.0.self_attn.k_scale, .k_proj.k_scale and .k_proj.output_scale.
_NAME = re.compile(r"\.(\d+)\.(?:.*\.)?([kv])_(?:scale|proj\.output_scale)$")


def attach_cache_scales(graph: ir.Graph, scales: Tensors) -> None:
    """Give the attention nodes of `graph` the scales of their layers. One of 1 is left out: it changes
    nothing, and kernels without scales have less to do.

    Raises ExportError for one that is not a single positive number.
    """
    nodes = {
        node.inputs[_INPUTS.index("kv_cache")].name: node
        for node in graph
        if (node.domain, node.op_type) == (DOMAIN, PAGED_ATTENTION.name)
    }
    for name, entry in scales.items():
        match = _NAME.search(name)
        # Layers for drafts, which are not built, have numbers too.
        node = None if match is None else nodes.get(wire.kv_cache_input(int(match[1])))
        if match is None or node is None:
            continue
        numbers = entry.read().astype(np.float32).reshape(-1)
        if numbers.size != 1 or not 0 < numbers[0] < math.inf:
            raise ExportError(f"{name} is {numbers.tolist()}: a KV cache has one positive scale a layer")
        if numbers[0] != 1:
            _attach(graph, node, f"{match[2]}_scale", name, numbers)


def _attach(graph: ir.Graph, node: ir.Node, which: str, name: str, numbers: Array) -> None:
    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    index = _INPUTS.index(which)
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, value)
