"""What becomes of the weights of experts, and how they are rounded: one expert at a time."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from trtforge.builder.quantization.experts import ExpertWeight, QuantizedExperts, in_axis
from trtforge.builder.quantization.policy import NOT_QUANTIZED, Quantization, find_exclusion
from trtforge.builder.quantization.rounding import round_weight
from trtforge.builder.quantization.slices import take_expert
from trtforge.builder.quantization.units import expert_group_size
from trtforge.builder.sharding.weights import take
from trtforge.builder.weights import WeightSource, make_tensor, read_torch
from trtforge.plugins.int4_gemm.op import GROUP_SIZES
from trtforge.plugins.moe_experts.op import MOE_EXPERTS

_WEIGHTS = ("gate_up", "down")  # inputs of MoeExperts
_IN = 1  # the axis of one expert's weight


def belongs_to_experts(value: ir.Value) -> bool:
    """Whether a MoeExperts node uses the weight."""
    return any(use.node.op_type == MOE_EXPERTS.name for use in value.uses())


def choose_experts(
    value: ir.Value, source: WeightSource, quantization: Quantization | None
) -> QuantizedExperts | str:
    """The quantized weights of what `belongs_to_experts`, or why there are none."""
    uses = list(value.uses())
    if any(MOE_EXPERTS.inputs[use.idx].name not in _WEIGHTS for use in uses):
        return "biases of experts are not quantized by policy"
    stored = source.quantized
    if isinstance(stored, QuantizedExperts):
        return stored
    if quantization is None:
        return NOT_QUANTIZED
    pattern = find_exclusion(value.name, quantization.exclude)
    if pattern is not None:
        return f"excluded by {pattern!r}"
    transposed = bool(uses[0].node.attributes["transposed"].value)
    in_features = source.shape[in_axis(transposed)]
    group_size = in_features
    if quantization.format == "int4":
        found = expert_group_size(source, in_axis(transposed), quantization)
        if found is None:
            return f"{in_features} input features are no multiple of {min(GROUP_SIZES)}, the smallest group"
        group_size = found
    num_experts, rows, columns = source.shape
    return QuantizedExperts(
        format=quantization.format,
        shape=(num_experts, rows, columns),
        transposed=transposed,
        group_size=group_size,
        source="rounded to the nearest",
        read=partial(_round, value.dtype, source, transposed, quantization, group_size),
    )


def _round(
    dtype: ir.DataType,
    source: WeightSource,
    transposed: bool,
    quantization: Quantization,
    group_size: int,
    number: int,
) -> ExpertWeight:
    """As if one rank had all input features: a row of 8 bits has one scale. Groups are rounded alone."""
    division = source.division
    whole = source if division is None else division.whole
    expert = take(whole, 0, ((number, number + 1),))
    has_parts_of_rows = (
        division is not None and division.axis == in_axis(transposed) and quantization.format != "int4"
    )
    if division is not None and not has_parts_of_rows:
        expert = take(expert, division.axis, division.ranges)
    (weight,) = read_torch(make_tensor(dtype, expert))
    if transposed:
        weight = weight.T
    rounded = ExpertWeight.of(round_weight(source.name, weight, quantization.format, group_size))
    if division is None or not has_parts_of_rows:
        return rounded
    return take_expert(rounded, _IN, division.ranges)
