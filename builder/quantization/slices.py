"""Rows or columns of a quantized weight, with the scales and zero points that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trtforge.builder.quantization.experts import ExpertWeight, QuantizedExperts
from trtforge.builder.quantization.weights import (
    AffineInt4Weight,
    ComputedWeight,
    Fp8Weight,
    Int8Weight,
    QuantizedLinear,
    QuantizedWeight,
)
from trtforge.errors import ConfigError
from trtforge.plugins.fp8_gemm.op import SCALE_BLOCK
from trtforge.plugins.int4_gemm.packing import Int4Weight
from trtforge.plugins.op import Array

Ranges = Sequence[tuple[int, int]]
_OUT, _IN = 0, 1  # the axes of a weight


def take(name: str, linear: QuantizedLinear, axis: int, ranges: Ranges) -> QuantizedLinear:
    """Of the weight `name` what is in `ranges` along `axis`, of output (0) or input (1) features.

    Its numbers stay what they are. Raises ConfigError if features of different ranges share a scale.
    """
    shape = list(linear.shape)
    shape[axis] = sum(stop - start for start, stop in ranges)
    _check(name, linear, axis, ranges)
    read_input_scale = linear.read_input_scale
    if axis == _IN and read_input_scale is not None:
        whole_scale = read_input_scale

        def read_input_scale() -> Array:
            return _take(whole_scale(), 0, ranges)

    is_one_group = linear.group_size == linear.shape[1]
    return replace(
        linear,
        shape=(shape[0], shape[1]),
        read=lambda: _take_weight(linear.read(), axis, ranges),
        group_size=shape[1] if is_one_group and axis == _IN else linear.group_size,
        read_input_scale=read_input_scale,
    )


def take_experts(name: str, experts: QuantizedExperts, axis: int, ranges: Ranges) -> QuantizedExperts:
    """Of the experts' weights `name` what is in `ranges` along `axis`, 1 or 2, of each.

    Their numbers stay what they are. Raises ConfigError if features of different ranges share a scale.
    """
    of_expert = _IN if axis == experts.in_axis else _OUT
    is_one_group = experts.group_size == experts.in_features
    if of_expert == _IN and not is_one_group:
        _check_ends(name, _IN, experts.in_features, experts.group_size, ranges)
    shape = list(experts.shape)
    shape[axis] = sum(stop - start for start, stop in ranges)
    return replace(
        experts,
        shape=(shape[0], shape[1], shape[2]),
        group_size=shape[axis] if is_one_group and of_expert == _IN else experts.group_size,
        read=lambda number: take_expert(experts.read(number), of_expert, ranges),
    )


def take_expert(weight: ExpertWeight, axis: int, ranges: Ranges) -> ExpertWeight:
    """Of an expert's weight what is in `ranges` along `axis`, of output (0) or input (1) features."""
    unit = weight.values.shape[axis] // weight.scale.shape[axis]
    scale = _take_scales(weight.scale, unit, axis, ranges)
    zero = None if weight.zero is None else _take_scales(weight.zero, unit, axis, ranges)
    return ExpertWeight(_take(weight.values, axis, ranges), scale, zero)


def take_computed(weight: ComputedWeight, axis: int, ranges: Ranges) -> ComputedWeight:
    """Of a weight that is computed what is in `ranges` along `axis`."""
    shape = list(weight.shape)
    shape[axis] = sum(stop - start for start, stop in ranges)
    return replace(weight, shape=tuple(shape), dequantize=lambda: _take(weight.dequantize(), axis, ranges))


def _check(name: str, linear: QuantizedLinear, axis: int, ranges: Ranges) -> None:
    size, unit = linear.shape[axis], 1
    has_groups = linear.format == "int4" or linear.group_size is not None
    if has_groups and axis == _IN:
        if linear.has_perm:
            raise ConfigError(
                f"{name} has its input features in an order of their own (desc_act), and cannot be divided "
                "among ranks along them: use --tp 1, or a checkpoint without that"
            )
        unit = 1 if linear.group_size in (None, size) else int(linear.group_size or size)
    elif linear.format == "fp8" and linear.scales == "block":
        unit = SCALE_BLOCK
    _check_ends(name, axis, size, unit, ranges)


def _check_ends(name: str, axis: int, size: int, unit: int, ranges: Ranges) -> None:
    ends = sorted({end for part in ranges for end in part} - {size})
    wrong = [end for end in ends if end % unit]
    if wrong:
        kind = ("output", "input")[axis]
        raise ConfigError(
            f"--tp would cut {name} at {kind} feature {wrong[0]}, within {unit} that share a scale: use "
            "another --tp, or weights with smaller groups"
        )


def _take(array: Array, axis: int, ranges: Ranges) -> Array:
    return np.concatenate([np.take(array, range(start, stop), axis) for start, stop in ranges], axis)


def _take_scales(array: Array, unit: int, axis: int, ranges: Ranges) -> Array:
    """Of scales that `unit` features have together; where all have one, it is everybody's."""
    if array.shape[axis] == 1:
        return array
    return _take(array, axis, [(start // unit, -(-stop // unit)) for start, stop in ranges])


def _take_weight(weight: QuantizedWeight, axis: int, ranges: Ranges) -> QuantizedWeight:
    values = _take(weight.values, axis, ranges)
    if isinstance(weight, Int4Weight):
        unit = weight.values.shape[axis] // weight.scales.shape[axis]
        scales = _take_scales(weight.scales, unit, axis, ranges)
        return Int4Weight(values, scales, _take_scales(weight.zeros, unit, axis, ranges), weight.perm)
    if isinstance(weight, AffineInt4Weight):
        unit = weight.values.shape[axis] // weight.scale.shape[axis]
        scale, zero = (_take_scales(array, unit, axis, ranges) for array in (weight.scale, weight.zero))
        return AffineInt4Weight(values, scale, zero)
    if isinstance(weight, Fp8Weight):
        unit = SCALE_BLOCK if weight.scales == "block" else 1
        return Fp8Weight(values, _take_scales(weight.scale, unit, axis, ranges), weight.scales)
    unit = weight.values.shape[axis] // weight.scale.shape[axis]
    return Int8Weight(values, _take_scales(weight.scale, unit, axis, ranges))
