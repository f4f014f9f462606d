"""Projections as bitsandbytes stores them: four bits by a table (QLoRA, arXiv 2305.14314), or bytes by rows
(LLM.int8, arXiv 2208.07339).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trtforge.builder.quantization.checkpoint_module import Module
from trtforge.builder.quantization.weights import ComputedWeight, Int8Weight, QuantizedLinear
from trtforge.plugins.op import Array

_TABLES = ("nf4", "fp4")
_STATE = "weight.quant_state.bitsandbytes__"
_ROWS = 0  # the one layout of bytes that every GPU's version of the library can store
PARTS = (
    "SCB",
    "weight_format",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(_STATE + table for table in _TABLES),
)

Float32Array = npt.NDArray[np.float32]


def read_module(module: Module, config: Mapping[str, Any]) -> QuantizedLinear | ComputedWeight | None:
    """The module's weight; None if it is not quantized. Raises ExportError for a layout that is not known."""
    weight = module.need("weight")
    if weight.dtype == "I8":
        return _bytes(module)
    if weight.dtype != "U8":
        return None
    for table in _TABLES:
        if module.get(_STATE + table) is not None:
            return _four_bits(module, table)
    raise module.refuse(f"in four bits without {_STATE}nf4 or fp4")


def _bytes(module: Module) -> QuantizedLinear:
    """value * SCB / 127 by rows."""
    layout = module.read_if_there("weight_format")
    if layout is not None and int(layout.reshape(-1)[0]) != _ROWS:
        raise module.refuse(f"with bytes in the layout {int(layout.reshape(-1)[0])}")
    out_features, in_features = module.need("weight").shape
    if module.need("SCB").shape != (out_features,):
        raise module.refuse(f"with SCB of shape {list(module.need('SCB').shape)} for {out_features} rows")

    def read() -> Int8Weight:
        scale = module.read("SCB").astype(np.float32).reshape(-1, 1) / np.float32(127)
        return Int8Weight(module.read("weight"), scale)

    return QuantizedLinear(
        "int8", (out_features, in_features), f"from the checkpoint ({module.method})", read
    )


def _four_bits(module: Module, table: str) -> ComputedWeight:
    """Numbers of a table times the largest of each block, which has no integers to be kept as."""
    state: dict[str, Any] = json.loads(module.read(_STATE + table).tobytes())
    shape = tuple(int(size) for size in state["shape"])
    num_bytes = math.prod(module.need("weight").shape)
    if len(shape) != 2 or math.prod(shape) != 2 * num_bytes:
        raise module.refuse(f"with {num_bytes} bytes for a weight of {list(shape)}")

    def dequantize() -> Float32Array:
        packed = module.read("weight").reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
        values: Float32Array = module.read("weight.quant_map").astype(np.float32)[codes]
        largest = _by_element(_largest(module, state), int(state["blocksize"]), values.size)
        return (values * largest).reshape(shape)

    return ComputedWeight(
        shape, f"dequantized: {table} of {module.method} is a table, not a scale", dequantize
    )


def _largest(module: Module, state: Mapping[str, Any]) -> Float32Array:
    """The largest magnitude of each block, which may be in bytes itself."""
    stored = module.read("weight.absmax")
    if module.get("weight.nested_absmax") is None:
        return stored.astype(np.float32)
    values: Float32Array = module.read("weight.nested_quant_map").astype(np.float32)[stored]
    scales = _by_element(module.read("weight.nested_absmax"), int(state["nested_blocksize"]), values.size)
    return values * scales + np.float32(state["nested_offset"])


def _by_element(of_blocks: Array, block_size: int, num_elements: int) -> Float32Array:
    """The last block may be shorter."""
    return np.repeat(of_blocks.astype(np.float32), block_size)[:num_elements]
