"""An operator of the tests, and its plugins, called as TensorRT calls them, with TensorRT-RTX's classes.

TensorRT itself is not here; both packages have the same plugin classes. Nothing is registered with RTX.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trtforge.errors import PluginError
from trtforge.plugins.bundle import Bundle, BundleManifest
from trtforge.plugins.launch import Call, Gpu, Kernel, Kernels, Launch, Plan
from trtforge.plugins.op import FLOATS, INTS, Attribute, OpSpec, Tensor
from trtforge.plugins.trt_adapter import make_creators

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
D = tensorrt_rtx.DataType
LINEAR = tensorrt_rtx.TensorFormat.LINEAR
# RTX makes expressions only while it builds a network, and takes no plugins into one.
trt = SimpleNamespace(**vars(tensorrt_rtx) | {"DimsExprs": list})

GATHER = OpSpec(
    name="GatherScaled",
    doc="Scaled rows of a table, which is changed in place.",
    inputs=(
        Tensor("table", "T", ("num_rows", 2, "width")),
        Tensor("rows", "I", ("num_tokens",)),
        Tensor("bias", "B", ("width",), optional=True),
        Tensor("scales", "T", ("num_tokens",), optional=True),
    ),
    outputs=(
        Tensor("out", "T", ("num_tokens", "width", 2)),
        Tensor("table_out", "T", ("num_rows", 2, "width")),
        Tensor("count", "C", ("num_tokens",)),
    ),
    dtypes={"T": (*FLOATS, "tensor(float8e4m3fn)"), "B": FLOATS, "I": INTS, "C": ("tensor(int32)",)},
    attributes=(
        Attribute("factor", "float"),
        Attribute("offset", "int", -3),
        Attribute("mode", "string", "plain"),
    ),
    aliases={"table_out": "table"},
)

KERNEL = Kernel("gather", "gather", (("table", "*bf16"), ("out", "*bf16")), (), 4, 2)
EMPTY = Bundle(Path("nowhere"), BundleManifest(compiler="none", compiler_version="0", cubins=()))


def plan_gather(call: Call, gpu: Gpu) -> Plan:
    if call.dtypes["table"] == "float32":
        raise PluginError("GatherScaled has no kernel for float32")
    launch = Launch(KERNEL, (call.shapes["rows"][0], 1, 1), {"table": "table_out", "out": "out"})
    return Plan((launch,), {"partial": 4 * prod(call.shapes["table"])})


class RecordingLauncher:
    gpu = Gpu(90, 132)

    def __init__(self) -> None:
        self.loaded: list[Plan] = []
        self.launched: list[tuple[Plan, dict[str, int], int, int]] = []

    def load(self, plan: Plan) -> None:
        self.loaded.append(plan)

    def launch(self, plan: Plan, pointers: dict[str, int], workspace_pointer: int, stream: int) -> None:
        assert plan in self.loaded
        self.launched.append((plan, pointers, workspace_pointer, stream))


def make_creator(launcher: RecordingLauncher, calls: list[Call]) -> Any:
    """Of plugins that put what they plan into `calls`."""

    def plan(call: Call, gpu: Gpu) -> Plan:
        assert gpu == launcher.gpu
        calls.append(call)
        return plan_gather(call, gpu)

    (creator,) = make_creators(trt, {GATHER: Kernels(plan, lambda call, arch: (KERNEL,))}, lambda: launcher)
    return creator


class Builder:
    def constant(self, value: int) -> str:
        return f"constant {value}"


def parsed_fields(**values: int | float | str) -> Any:
    """Fields as the parser makes them of a node's attributes, and the memory that they point into."""
    arrays = {
        name: np.frombuffer(value.encode(), np.int8)
        if isinstance(value, str)
        else np.array([value], np.int32 if isinstance(value, int) else np.float32)
        for name, value in values.items()
    }
    types = {"int8": "CHAR", "int32": "INT32", "float32": "FLOAT32"}
    fields = [
        trt.PluginField(name, array, getattr(trt.PluginFieldType, types[array.dtype.name]))
        for name, array in arrays.items()
    ]
    return trt.PluginFieldCollection(fields), arrays, fields


def create(creator: Any, input_names: str = "table,rows,scales", **values: int | float | str) -> Any:
    fields, *memory = parsed_fields(**{"factor": 0.5, "input_names": input_names} | values)
    plugin = creator.create_plugin("layer.0", fields, trt.TensorRTPhase.BUILD)
    del memory
    return plugin


def desc(dtype: Any, *dims: int, format_: Any = LINEAR) -> Any:
    tensor = trt.PluginTensorDesc()
    tensor.type, tensor.dims, tensor.format = dtype, trt.Dims(dims), format_
    return tensor


def dynamic(tensor: Any, **bounds: tuple[int, ...]) -> Any:
    result = trt.DynamicPluginTensorDesc()
    result.desc = tensor
    for name in ("min", "opt", "max"):
        setattr(result, name, trt.Dims(bounds.get(name, tuple(tensor.dims))))
    return result


def profile(max_tokens: int = 6, max_rows: int = 100) -> list[Any]:
    return [
        dynamic(desc(D.BF16, -1, 2, 8), min=(1, 2, 8), opt=(10, 2, 8), max=(max_rows, 2, 8)),
        dynamic(desc(D.INT32, -1), min=(1,), opt=(2,), max=(max_tokens,)),
        dynamic(desc(D.BF16, -1), min=(1,), opt=(2,), max=(max_tokens,)),
    ]


def build(creator: Any, **values: int | float | str) -> Any:
    """The plugin of an engine that was built for `profile()`."""
    plugin = create(creator, **values)
    clone = plugin.clone()
    clone.get_workspace_size(profile(), [])
    serialized = trt.PluginFieldCollection_(plugin.get_fields_to_serialize())
    return creator.create_plugin("layer.0", serialized, trt.TensorRTPhase.RUNTIME)


def inputs_of(num_tokens: int, dtype: Any = D.BF16) -> list[Any]:
    return [desc(dtype, 100, 2, 8), desc(D.INT32, num_tokens), desc(dtype, num_tokens)]


def outputs_of(num_tokens: int, dtype: Any = D.BF16) -> list[Any]:
    return [desc(dtype, num_tokens, 8, 2), desc(dtype, 100, 2, 8), desc(D.INT32, num_tokens)]


def enqueue(plugin: Any, num_tokens: int, inputs: list[int], outputs: list[int]) -> None:
    plugin.enqueue(inputs_of(num_tokens), outputs_of(num_tokens), inputs, outputs, 0x9000, 0xABC)
