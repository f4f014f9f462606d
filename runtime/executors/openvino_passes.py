"""Changes to a model that OpenVINO has read, after which its CPU plugin computes it faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops


def merge_projections(model: ov.Model) -> None:
    """Compute the three projections of a layer, q, k and v, in one matrix product.

    With few tokens a product takes as long as its weights take to be read, and small ones take longer.
    Projections with a bias are left: the plugin adds a bias within the product only if it has one consumer.
    """
    siblings: dict[tuple[str, int], list[Any]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and is_constant(node.input_value(1)):
            source = node.input_value(0)
            key = source.get_node().get_friendly_name(), source.get_index()
            siblings.setdefault(key, []).append(node)
    for nodes in siblings.values():
        if len(nodes) == 3 and not any(_has_bias(node) for node in nodes):
            _merge(nodes)


def is_constant(output: Any) -> bool:
    """Whether a node's output is a constant."""
    return bool(output.get_node().get_type_name() == "Constant")


def _has_bias(node: Any) -> bool:
    return any(
        consumer.get_node().get_type_name() == "Add" for consumer in node.output(0).get_target_inputs()
    )


def _merge(nodes: list[Any]) -> None:
    """Replace products of one input with weights [out, in]."""
    weights = [node.input_value(1).get_node() for node in nodes]
    # bfloat16 has no numpy type: `data` then holds the same bits as float16, which are only moved.
    bits = np.concatenate([weight.data for weight in weights])
    merged = ov.Tensor(bits, ov.Shape(bits.shape), weights[0].get_element_type())
    product = ops.matmul(nodes[0].input_value(0), ops.constant(merged, shared_memory=False), False, True)
    sizes = [weight.data.shape[0] for weight in weights]
    parts = ops.variadic_split(product, ops.constant(np.int64(-1)), ops.constant(np.array(sizes, np.int64)))
    for index, node in enumerate(nodes):
        node.output(0).replace(parts.output(index))


def compute_in_float32(model: ov.Model) -> None:
    """Make a bfloat16 graph one of float32 whose constants are stored as bfloat16.

    The CPU plugin is made for such models: it chooses where to compute in bfloat16, and fuses each norm
    with its weight, which bfloat16 types between them prevent.
    """
    for parameter in model.get_parameters():
        if parameter.get_element_type() == ov.Type.bf16:  # what comes from another pipeline stage
            parameter.set_element_type(ov.Type.f32)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and node.get_output_element_type(0) == ov.Type.bf16:
            node.output(0).replace(node.input_value(0))
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_output_element_type(0) == ov.Type.bf16:
            consumers = list(node.output(0).get_target_inputs())
            widened = ops.convert(node, "f32")
            widened.get_rt_info()["decompression_0"] = ""  # keeps the plugin from folding it to float32
            for consumer in consumers:
                consumer.replace_source_output(widened.output(0))
    model.validate_nodes_and_infer_types()
