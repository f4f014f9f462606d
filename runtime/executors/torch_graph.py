"""A graph of ONNX nodes as a list of calls of torch functions."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from torch import Tensor

from trtforge import wire
from trtforge.errors import ConfigError
from trtforge.runtime.executors.graph_file import weight_files
from trtforge.runtime.executors.torch_math_ops import MATH_OPS
from trtforge.runtime.executors.torch_operation import Operation, StandardOp, torch_dtype
from trtforge.runtime.executors.torch_shape_ops import SHAPE_OPS

STANDARD_OPS: Mapping[str, StandardOp] = {**MATH_OPS, **SHAPE_OPS}

_LEFT_OUT = 0  # the value of inputs that a node leaves out: None


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the graph; inputs left out are ""."""

    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


# Makes what runs a node that is not a standard one; raises ConfigError if there is nothing.
MakeOperation = Callable[[Node], Operation]


@dataclass(frozen=True, slots=True)
class _Step:
    """One call. Numbers are places in the list of values; those in `frees` have no use afterwards."""

    operation: Operation
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...]


class Program:
    """A compiled graph. Not thread-safe."""

    def __init__(self, values: list[Any], inputs: Mapping[str, int], steps: list[_Step], output: int) -> None:
        self._values = values  # constants, and places for the rest
        self._inputs = inputs
        self._steps = steps
        self._output = output

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output of a step. `inputs` are the graph's, on its device; caches are written in place."""
        values = self._values.copy()
        for name, place in self._inputs.items():
            values[place] = inputs[name]
        for step in self._steps:
            results = step.operation(*[values[place] for place in step.inputs])
            if type(results) is not tuple:
                results = (results,)
            for place, result in zip(step.outputs, results, strict=True):
                values[place] = result
            for place in step.frees:
                values[place] = None
        output: Tensor = values[self._output]
        return output


def compile_graph(
    graph: onnx.GraphProto,
    folder: Path,
    device: torch.device,
    make_operation: MakeOperation,
    output: str = wire.LOGITS,
) -> Program:
    """Make a program of `graph`, whose weights are in files in `folder`, that computes `output`.

    On a CPU weights are read where they are, mapped into memory; else they are copied to the device once.
    Raises ConfigError, naming it, for an operator that is not known.
    """
    return _Compiler(graph, folder, device, make_operation).compile(output)


class _Form(enum.Enum):
    """How an operation takes an input."""

    TENSOR = enum.auto()  # on the device
    HOST_TENSOR = enum.auto()
    SIZES = enum.auto()  # a list of ints, or a tensor in host memory where they aren't constant
    NUMBER = enum.auto()


class _Compiler:
    """Gives every constant and every result a place.

    Sizes stay on the host: `Shape` makes them, nodes over sizes and constants compute them, and operations
    read them without waiting for the device.
    """

    def __init__(
        self, graph: onnx.GraphProto, folder: Path, device: torch.device, make_operation: MakeOperation
    ) -> None:
        self._graph = graph
        self._device = device
        self._make_operation = make_operation
        self._constants = _read_constants(graph, folder)
        self._sizes: set[str] = set()  # results that are in host memory
        self._values: list[Any] = [None]
        self._constant_places: dict[tuple[str, _Form], int] = {}
        self._places: dict[str, int] = {}  # of inputs and results

    def compile(self, output_name: str) -> Program:
        inputs = {value.name: self._new_place(value.name) for value in self._graph.input}
        calls: list[tuple[Operation, list[int], list[int]]] = []
        for proto in self._graph.node:
            node = _node(proto)
            operation, places = self._operation(node)
            if self._folds(node):
                self._fold(node, operation, places)
            else:
                calls.append((operation, places, [self._new_place(name) for name in node.outputs]))
        output = self._places[output_name]
        return Program(self._values, inputs, _free_after_last_use(calls, output), output)

    def _new_place(self, name: str) -> int:
        self._values.append(None)
        self._places[name] = len(self._values) - 1
        return self._places[name]

    def _operation(self, node: Node) -> tuple[Operation, list[int]]:
        """What runs the node, and where its inputs are."""
        if node.domain:
            return self._make_operation(node), [self._place(name, _Form.TENSOR) for name in node.inputs]
        standard = STANDARD_OPS.get(node.op_type)
        if standard is None:
            raise ConfigError(
                f"the graph has the operator {node.op_type}, which the reference runtime does not know; it "
                f"knows {', '.join(STANDARD_OPS)}"
            )
        data = [name for index, name in enumerate(node.inputs) if name and index not in standard.sizes]
        on_host = any(name in self._sizes for name in data)
        if on_host and not all(name in self._sizes or name in self._constants for name in data):
            raise ConfigError(f"the graph has a {node.op_type} of sizes and data, {data}: not known here")
        if on_host or node.op_type == "Shape":
            self._sizes.update(node.outputs)
        places = []
        for index, name in enumerate(node.inputs):
            form = _Form.HOST_TENSOR if on_host else _Form.TENSOR
            if index in standard.sizes:
                form = _Form.SIZES
            elif standard.takes_numbers and not self._folds(node) and self._is_number(name):
                form = _Form.NUMBER
            places.append(self._place(name, form))
        return standard.make(node.attributes, self._device), places

    def _is_number(self, name: str) -> bool:
        return name in self._constants and self._constants[name].ndim == 0

    def _place(self, name: str, form: _Form) -> int:
        if not name:
            return _LEFT_OUT
        if name not in self._constants:
            return self._places[name]
        if (name, form) not in self._constant_places:
            constant = self._constants[name]
            match form:
                case _Form.TENSOR:
                    value: Any = constant.to(self._device)
                case _Form.HOST_TENSOR:
                    value = constant
                case _Form.SIZES:
                    value = constant.flatten().tolist()
                case _Form.NUMBER:
                    value = constant.item()
            self._values.append(value)
            self._constant_places[name, form] = len(self._values) - 1
        return self._constant_places[name, form]

    def _folds(self, node: Node) -> bool:
        """Whether the node is computed now: not from matrices of weights, which would be there twice."""
        return not node.domain and all(
            name in self._constants and self._constants[name].ndim <= 1 for name in node.inputs
        )

    def _fold(self, node: Node, operation: Operation, places: list[int]) -> None:
        results = operation(*[self._values[place] for place in places])
        results = results if type(results) is tuple else (results,)
        self._constants.update(zip(node.outputs, results, strict=True))


def _node(proto: onnx.NodeProto) -> Node:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
    return Node(
        proto.op_type,
        proto.domain,
        tuple(proto.input),
        tuple(proto.output),
        {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()},
    )


def _free_after_last_use(calls: list[tuple[Operation, list[int], list[int]]], output: int) -> list[_Step]:
    last_uses: dict[int, int] = {}
    for number, (_, inputs, outputs) in enumerate(calls):
        last_uses.update(dict.fromkeys([*inputs, *outputs], number))
    results = {place for _, _, outputs in calls for place in outputs} - {output}
    frees: list[list[int]] = [[] for _ in calls]
    for place in results:
        frees[last_uses[place]].append(place)
    return [
        _Step(operation, tuple(inputs), tuple(outputs), tuple(freed))
        for (operation, inputs, outputs), freed in zip(calls, frees, strict=True)
    ]


def _read_constants(graph: onnx.GraphProto, folder: Path) -> dict[str, Tensor]:
    """Weights are views of their files, mapped into memory."""
    files = {
        file: torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
        for file in weight_files(folder, graph)
    }
    constants = {}
    for proto in graph.initializer:
        dtype, dims = _stored_as(proto)
        if uses_external_data(proto):
            data = ExternalDataInfo(proto)
            begin, length = data.offset or 0, data.length or 0
            weight = files[folder / data.location][begin : begin + length]
            if begin % dtype.itemsize:
                weight = weight.clone()
            constants[proto.name] = weight.view(dtype).reshape(dims)
        else:
            array = onnx.numpy_helper.to_array(proto)  # bfloat16 and float8 as ml_dtypes, unknown to torch
            data_bytes = torch.from_numpy(array.reshape(-1).view("uint8").copy())
            constants[proto.name] = data_bytes.view(dtype).reshape(dims)
    return constants


def _stored_as(proto: onnx.TensorProto) -> tuple[torch.dtype, tuple[int, ...]]:
    """What a weight is in torch, which has no four bits: half as many bytes along the last axis."""
    *first, last = proto.dims or [1]
    if proto.data_type == onnx.TensorProto.INT4 and uses_external_data(proto) and last % 2 == 0:
        return torch.uint8, (*first, last // 2)
    return torch_dtype(proto.data_type), tuple(proto.dims)
