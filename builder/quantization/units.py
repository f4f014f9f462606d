"""Where weights that share scales can be parted, so that ranks have some of their input features each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from trtforge.builder.columns import Ranges
from trtforge.builder.quantization.experts import QuantizedExperts, in_axis
from trtforge.builder.quantization.policy import Quantization, choose_group_size, find_exclusion
from trtforge.builder.quantization.weights import QuantizedLinear
from trtforge.builder.weights import WeightSource
from trtforge.errors import ConfigError
from trtforge.plugins.fp8_gemm.op import SCALE_BLOCK
from trtforge.plugins.int4_gemm.op import CHUNK, GROUP_SIZES

FP8_COLUMNS = 16  # Fp8Gemm's in_features are a multiple of this


def feature_multiples(
    sources: Mapping[str, WeightSource], quantization: Quantization | None, weight: ir.Value
) -> Sequence[int]:
    """Sizes of which a rank's part of the weight's input features is to be a multiple, the best one first;
    none if any size will do."""
    source = sources.get(weight.name)
    if source is None or len(weight.shape) not in (2, 3):
        return ()
    linear = source.quantized
    if len(weight.shape) == 3:
        return _expert_multiples(source, quantization, _in_features_of_experts(weight))
    in_features = int(weight.shape[1])
    if isinstance(linear, QuantizedLinear):
        if linear.format == "int4" or linear.group_size is not None:
            return (CHUNK if linear.group_size in (None, in_features) else int(linear.group_size or CHUNK),)
        return (SCALE_BLOCK if linear.scales == "block" else FP8_COLUMNS,)
    if quantization is None or find_exclusion(source.name, quantization.exclude) is not None:
        return ()
    if quantization.format != "int4":
        return (FP8_COLUMNS,) if in_features % FP8_COLUMNS == 0 else ()
    return _group_sizes(in_features, quantization)


def _group_sizes(in_features: int, quantization: Quantization) -> tuple[int, ...]:
    largest = choose_group_size(in_features, quantization.group_size)
    return tuple(size for size in sorted(GROUP_SIZES, reverse=True) if size <= (largest or 0))


def _in_features_of_experts(weight: ir.Value) -> int:
    node = next(use.node for use in weight.uses())
    return int(weight.shape[in_axis(bool(node.attributes["transposed"].value))])


def _expert_multiples(
    source: WeightSource, quantization: Quantization | None, in_features: int
) -> Sequence[int]:
    """A row with one scale can be parted anywhere: there are no kernels that want more."""
    stored = source.quantized
    if isinstance(stored, QuantizedExperts):
        return () if stored.group_size == in_features else (stored.group_size,)
    if quantization is None or quantization.format != "int4":
        return ()
    if find_exclusion(source.name, quantization.exclude) is not None:
        return ()
    return _group_sizes(in_features, quantization)


def rank_group_size(source: WeightSource, quantization: Quantization) -> int | None:
    """Input features of `source` that share a scale if it is rounded to four bits; None if no size fits.

    Raises ConfigError if one fits the whole weight, but none the part that a rank has.
    """
    columns = source.columns
    if columns is None:
        return choose_group_size(source.shape[1], quantization.group_size)
    return _group_size_of_part(source.name, columns.size, columns.ranges, quantization)


def expert_group_size(source: WeightSource, axis: int, quantization: Quantization) -> int | None:
    """The same of the weights of experts, whose input features are along `axis`."""
    division = source.division
    if division is None or division.axis != axis:
        return choose_group_size(source.shape[axis], quantization.group_size)
    return _group_size_of_part(source.name, division.whole.shape[axis], division.ranges, quantization)


def _group_size_of_part(name: str, size: int, ranges: Ranges, quantization: Quantization) -> int | None:
    largest = choose_group_size(size, quantization.group_size)
    if largest is None:
        return None
    ends = [end for part in ranges for end in part]
    for group_size in sorted(GROUP_SIZES, reverse=True):
        if group_size <= largest and all(end % group_size == 0 for end in ends):
            return group_size
    raise ConfigError(
        f"--int4 cannot be applied to {name}, of whose {size} input features a rank would have those "
        f"from {ends[0]} to {ends[-1]}: groups have {min(GROUP_SIZES)} at least; use a smaller --tp, or "
        f"--exclude '{name}'"
    )
