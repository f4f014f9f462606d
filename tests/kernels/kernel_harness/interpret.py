"""An operator's plan, run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
import torch

from kernel_harness import memory
from trtforge.plugins.launch import Call, Gpu, Launch
from trtforge.plugins.op import Array, AttributeValue, OpSpec
from trtforge.plugins.operator import Operator

H100 = Gpu(arch=90, num_sms=132)
# Every byte of memory that a kernel has not written yet: NaN as a float, -1 as an integer.
POISON = 0xFF
# Bytes before and behind every buffer that belong to none, so that what is next to it is not another one.
GUARD_BYTES = 4096

_TORCH_TYPES = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*fp8e4nv": torch.float8_e4m3fn,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*i16": torch.int16,
    "*i8": torch.int8,
    "*u8": torch.uint8,
}
_ONNX_TYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(float8e4m3fn)": np.dtype(ml_dtypes.float8_e4m3fn),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
}


def interpret(
    operator: Operator,
    inputs: Mapping[str, Array],
    attributes: Mapping[str, AttributeValue],
    gpu: Gpu = H100,
) -> tuple[Array, ...]:
    """The operator's outputs, in declared order, as its kernels compute them.

    Outputs and workspaces are POISON before; an output that shares an input's memory begins as a copy of it.
    Raises InterpreterError if a kernel leaves its buffers or fails otherwise, and AssertionError if it writes
    to an input that no output shares.
    """
    spec = operator.spec
    complete = spec.node_attributes(**attributes)
    call = Call(
        shapes={name: array.shape for name, array in inputs.items()},
        dtypes={name: array.dtype.name for name, array in inputs.items()},
        attributes={attribute.name: complete[attribute.name] for attribute in spec.attributes},
    )
    if operator.kernels is None:
        raise ValueError(f"{spec.name} has no kernels")
    plan = operator.kernels.plan(call, gpu)
    buffers = {name: _buffer(array) for name, array in inputs.items()}
    outputs = {tensor.name: _output(spec, tensor.name, inputs) for tensor in spec.outputs}
    for name, (shape, dtype) in outputs.items():
        source = spec.aliases.get(name)
        buffers[name] = _allocate(int(np.prod(shape)) * dtype.itemsize) if source is None else buffers[source]
    for name, num_bytes in plan.workspace.items():
        buffers[name] = _allocate(num_bytes)
    with memory.only(buffers):
        for launch in plan.launches:
            run(launch, buffers)
    for name in inputs.keys() - spec.aliases.values():
        assert torch.equal(buffers[name], _buffer(inputs[name])), f"{spec.name} wrote to its input {name}"
    return tuple(
        np.frombuffer(buffers[name].numpy().tobytes(), dtype).reshape(shape)
        for name, (shape, dtype) in outputs.items()
    )


def run(launch: Launch, buffers: Mapping[str, torch.Tensor]) -> None:
    """Run one launch on `buffers` of bytes, each seen as the type that its parameter declares."""
    kernel = launch.kernel
    arguments: dict[str, Any] = {}
    for name, kind in kernel.parameters:
        value = launch.arguments[name]
        arguments[name] = buffers[value].view(_TORCH_TYPES[kind]) if isinstance(value, str) else value
    function = getattr(import_module(kernel.module), kernel.function)
    function[launch.grid](**arguments, **dict(kernel.constants))


def _buffer(array: Array) -> torch.Tensor:
    # As bytes: torch takes neither bf16 nor e4m3 from numpy.
    buffer = _allocate(array.nbytes)
    buffer.numpy()[:] = np.frombuffer(array.tobytes(), np.uint8)
    return buffer


def _allocate(num_bytes: int) -> torch.Tensor:
    guarded = torch.full((num_bytes + 2 * GUARD_BYTES,), POISON, dtype=torch.uint8)
    return guarded[GUARD_BYTES : GUARD_BYTES + num_bytes]


def _output(spec: OpSpec, name: str, inputs: Mapping[str, Array]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an output, from the inputs that have its dims and its type variable."""
    sizes = spec.check_inputs(*(inputs.get(tensor.name) for tensor in spec.inputs))
    output = next(tensor for tensor in spec.outputs if tensor.name == name)
    shape = tuple(dim if isinstance(dim, int) else sizes[dim] for dim in output.dims)
    for tensor in spec.inputs:
        if tensor.dtype == output.dtype and tensor.name in inputs:
            return shape, inputs[tensor.name].dtype
    (only_type,) = spec.dtypes[output.dtype]
    return shape, _ONNX_TYPES[only_type]
