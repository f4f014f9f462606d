"""How standard ONNX operators become calls of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx
import torch
from torch import Tensor

from trtforge.errors import ConfigError

# A node's inputs in order, None for one left out -> its output, or a tuple of several.
Operation: TypeAlias = Callable[..., Any]
Attributes: TypeAlias = Mapping[str, Any]
# Integers that are read on the host: a list if they are constant, else a tensor in host memory.
Sizes: TypeAlias = Sequence[int] | Tensor

TORCH_DTYPES: Mapping[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True, slots=True)
class StandardOp:
    """How nodes of one operator are made; `make` raises ConfigError for attributes that are not known here.

    No operation waits for the device: what it has to know on the host are its `sizes`.
    """

    make: Callable[[Attributes, torch.device], Operation]
    sizes: tuple[int, ...] = ()  # inputs that are integers read on the host
    takes_numbers: bool = False  # constants without dims may come as numbers


def torch_dtype(onnx_dtype: int) -> torch.dtype:
    """Raises ConfigError for a type that torch has no tensors of."""
    if onnx_dtype not in TORCH_DTYPES:
        name = onnx.TensorProto.DataType.Name(onnx_dtype)
        raise ConfigError(f"the graph has tensors of type {name}, which the reference runtime does not know")
    return TORCH_DTYPES[onnx_dtype]


def plain(function: Operation) -> Callable[[Attributes, torch.device], Operation]:
    """Of operators that have no attributes."""
    return lambda attributes, device: function


def ints(values: Sizes) -> list[int]:
    """What `values` are, as a list."""
    return values.flatten().tolist() if isinstance(values, Tensor) else list(values)
