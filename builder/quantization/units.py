"""Where weights that share scales can be parted, so that ranks have some of their input features each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

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
    if source is None or len(weight.shape) != 2:
        return ()
    in_features = int(weight.shape[1])
    linear = source.quantized
    if isinstance(linear, QuantizedLinear):
        if linear.format == "int4" or linear.group_size is not None:
            return (CHUNK if linear.group_size in (None, in_features) else int(linear.group_size or CHUNK),)
        return (SCALE_BLOCK if linear.scales == "block" else FP8_COLUMNS,)
    if quantization is None or find_exclusion(source.name, quantization.exclude) is not None:
        return ()
    if quantization.format != "int4":
        return (FP8_COLUMNS,) if in_features % FP8_COLUMNS == 0 else ()
    largest = choose_group_size(in_features, quantization.group_size)
    return tuple(size for size in sorted(GROUP_SIZES, reverse=True) if size <= (largest or 0))


def rank_group_size(source: WeightSource, quantization: Quantization) -> int | None:
    """Input features of `source` that share a scale if it is rounded to four bits; None if no size fits.

    Raises ConfigError if one fits the whole weight, but none the part that a rank has.
    """
    if source.columns is None:
        return choose_group_size(source.shape[1], quantization.group_size)
    size = source.columns.size
    largest = choose_group_size(size, quantization.group_size)
    if largest is None:
        return None
    ends = [end for part in source.columns.ranges for end in part]
    for group_size in sorted(GROUP_SIZES, reverse=True):
        if group_size <= largest and all(end % group_size == 0 for end in ends):
            return group_size
    raise ConfigError(
        f"--int4 cannot be applied to {source.name}, of whose {size} input features a rank would have those "
        f"from {ends[0]} to {ends[-1]}: groups have {min(GROUP_SIZES)} at least; use a smaller --tp, or "
        f"--exclude '{source.name}'"
    )
