"""What each weight of a graph becomes: quantized, or left as it is for a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from trtforge.builder.quantization.expert_choice import belongs_to_experts, choose_experts
from trtforge.builder.quantization.experts import QuantizedExperts
from trtforge.builder.quantization.policy import (
    NOT_QUANTIZED,
    Lowering,
    Quantization,
    WeightPolicy,
    find_exclusion,
)
from trtforge.builder.quantization.rounding import round_weight
from trtforge.builder.quantization.slices import take
from trtforge.builder.quantization.units import FP8_COLUMNS, rank_group_size
from trtforge.builder.quantization.weights import ComputedWeight, QuantizedLinear, QuantizedWeight
from trtforge.builder.weights import WeightSource, make_tensor, read_torch
from trtforge.plugins.int4_gemm.op import CHUNK, GROUP_SIZES
from trtforge.plugins.linear.op import LINEAR
from trtforge.plugins.op import DOMAIN, Array

_METHODS = {"int4": "AWQ", "int8": "SmoothQuant"}
_DTYPES = (ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
# What a router's scores may pass on their way to the choice of experts.
_SCORE_OPERATORS = {"Cast", "Softmax", "Sigmoid", "Add", "Reshape", "Squeeze", "Flatten"}


def matrix_names(graph: ir.Graph, sources: Mapping[str, WeightSource]) -> list[str]:
    """The names of weights of two dims or more, of which some may be quantized."""
    return [
        name
        for name, value in graph.initializers.items()
        if name in sources and len(value.shape) > 1 and value.dtype in _DTYPES
    ]


def choose_weight(
    value: ir.Value,
    source: WeightSource,
    policy: WeightPolicy,
    output_embedding: str,
) -> QuantizedLinear | QuantizedExperts | str:
    """The quantized weight, or why there is none."""
    stored, quantization = source.quantized, policy.quantization
    if belongs_to_experts(value):
        return choose_experts(value, source, quantization)
    if (
        not isinstance(stored, QuantizedLinear)
        and value.name == output_embedding
        and quantization is not None
    ):
        return "the output embedding stays as it is by policy"
    reason = _why_no_projection(value)
    if isinstance(stored, QuantizedLinear):
        reason = reason or _why_not_lowered(stored, policy.lowering)
        return f"dequantized: {reason}" if reason else _with_activations(stored, policy)
    if quantization is None:
        return stored.reason if isinstance(stored, ComputedWeight) else NOT_QUANTIZED
    if reason:
        return reason
    pattern = find_exclusion(value.name, quantization.exclude)
    if pattern is not None:
        return f"excluded by {pattern!r}"
    group_size = None
    if quantization.format == "int4":
        group_size = rank_group_size(source, quantization)
        if group_size is None:
            in_features = value.shape[1]
            return f"{in_features} input features are no multiple of {min(GROUP_SIZES)}, the smallest group"
    linear = _round_later(value.dtype, source, quantization, group_size, policy)
    return _why_not_lowered(linear, policy.lowering) or linear


def _with_activations(stored: QuantizedLinear, policy: WeightPolicy) -> QuantizedLinear:
    """What the checkpoint says of activations counts if it is asked for."""
    if stored.activations == policy.activations:
        return stored
    return replace(stored, activations=None, read_x_scale=None)


def _round_later(
    dtype: ir.DataType,
    source: WeightSource,
    quantization: Quantization,
    group_size: int | None,
    policy: WeightPolicy,
) -> QuantizedLinear:
    """A weight is rounded as if one rank had all of it: a row of 8 bits has one scale, so that a rank with
    some of its columns rounds all of them. Groups are rounded alone."""
    input_scale = policy.calibration.input_scales.get(source.name)
    x_scale = policy.calibration.x_scales.get(source.name)
    if input_scale is not None:  # as the graph will have it
        input_scale = input_scale.astype(dtype.numpy()).astype(np.float32)
    columns = source.columns
    if columns is not None and quantization.format != "int4":
        source = replace(source, shape=(source.shape[0], columns.size), columns=None)
    elif columns is not None:
        input_scale = None if input_scale is None else columns.of(input_scale)
        columns = None
    out_features, in_features = source.shape
    linear = QuantizedLinear(
        quantization.format,
        (out_features, in_features),
        "rounded to the nearest"
        + ("" if input_scale is None else f" with {_METHODS[quantization.format]}'s scales"),
        partial(_round, make_tensor(dtype, source), quantization, group_size, input_scale),
        group_size,
        read_input_scale=None if input_scale is None else lambda: input_scale,
        # ModelOpt may have met no such module.
        activations=None if policy.activations == "static" and x_scale is None else policy.activations,
        read_x_scale=None if x_scale is None else lambda: x_scale,
    )
    return linear if columns is None else take(source.name, linear, 1, columns.ranges)


def describe_weight(linear: QuantizedLinear | QuantizedExperts, lowering: Lowering) -> str:
    """Where a quantized weight's numbers are from, and what the runtime does with them, in words."""
    if isinstance(linear, QuantizedExperts):
        return linear.source
    if linear.format == "fp8" and lowering == "native":
        return f"{linear.source}; OpenVINO expands it to 16 bits or more when it loads it"
    if linear.activations is not None:
        return f"{linear.source}; activations are {linear.format} too, with {linear.activations} scales"
    return linear.source


def _round(
    tensor: ir.TensorProtocol, quantization: Quantization, group_size: int | None, input_scale: Array | None
) -> QuantizedWeight:
    weight = read_torch(tensor)
    if input_scale is not None:
        weight = weight.float() / torch.from_numpy(input_scale)
    return round_weight(tensor.name, weight, quantization.format, group_size)


def _why_no_projection(value: ir.Value) -> str | None:
    for use in value.uses():
        node = use.node
        if (node.domain, node.op_type, use.idx) != (DOMAIN, LINEAR.name, 1):
            return f"used by {node.op_type}, which is no projection"
        if _chooses_experts(node):
            return "routers are not quantized by policy"
    return None


def _chooses_experts(node: ir.Node) -> bool:
    """Whether the node's result is scores of which the largest are chosen."""
    for use in node.outputs[0].uses():
        if use.node.op_type == "TopK":
            return True
        if use.node.op_type in _SCORE_OPERATORS and _chooses_experts(use.node):
            return True
    return False


def _why_not_lowered(linear: QuantizedLinear, lowering: Lowering) -> str | None:
    _, in_features = linear.shape
    if lowering != "plugin":
        return None
    if linear.format == "int8":
        return "there is no operator for int8 weights"
    if linear.has_float_zeros:
        return "Int4Gemm has no zero points that are no whole numbers"
    step = CHUNK if linear.format == "int4" else FP8_COLUMNS
    if in_features % step:
        return f"{in_features} input features are no multiple of {step}"
    return None
