"""The facts of one ONNX file, weights counted but not read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import onnx_ir as ir
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict
from typing_extensions import Self

from trtforge.errors import ConfigError

STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
NUM_LARGEST = 10
# How TensorRT finds the plugin: the same for every node.
_NOT_SHOWN = ("plugin_namespace", "plugin_version")

AttributeText: TypeAlias = int | float | str


class Facts(BaseModel):
    """Base of what a report is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorFacts(Facts):
    """An input or output. A dim is a size or the name of one; None: unknown."""

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]


class OperatorCount(Facts):
    """How many nodes there are of one operator."""

    domain: str
    op_type: str
    count: int


class CustomNodes(Facts):
    """Nodes of one operator outside of ONNX's own that have the same attributes and as many inputs."""

    op_type: str
    count: int
    num_inputs: int
    attributes: dict[str, AttributeText]


class WeightGroup(Facts):
    """All initializers of one dtype."""

    dtype: str
    count: int
    num_elements: int
    nbytes: int


class WeightFacts(Facts):
    """Initializers that differ in the numbers in their names alone, such as those of layers: * in `name`."""

    name: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int  # of each


class DataFile(Facts):
    """A file with weights: the bytes that the graph needs of it, and those that it has. None: no file."""

    name: str
    needed_bytes: int
    size_bytes: int | None


class GraphFacts(Facts):
    """What one ONNX file holds. Nodes inside of other nodes are counted too."""

    file: str
    producer: str
    ir_version: int
    opsets: dict[str, int]
    functions: tuple[str, ...]
    num_nodes: int
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    operators: tuple[OperatorCount, ...]  # most frequent first
    custom_nodes: tuple[CustomNodes, ...]
    weights: tuple[WeightGroup, ...]  # most bytes first
    largest_weights: tuple[WeightFacts, ...]  # NUM_LARGEST at most, most bytes first
    data_files: tuple[DataFile, ...]

    @classmethod
    def of(cls, model: ir.Model, file: Path) -> Self:
        """The facts of `model`, which was read from `file`."""
        nodes = list(model.graph.all_nodes())
        operators = Counter((node.domain, node.op_type) for node in nodes)
        tensors = list(weights_of(model))
        return cls(
            file=file.name,
            producer=f"{model.producer_name or ''} {model.producer_version or ''}".strip(),
            ir_version=model.ir_version,
            opsets={domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
            functions=tuple(f"{domain}::{name}" for domain, name, _ in model.functions),
            num_nodes=len(nodes),
            inputs=tuple(_tensor_facts(value) for value in model.graph.inputs),
            outputs=tuple(_tensor_facts(value) for value in model.graph.outputs),
            operators=tuple(
                OperatorCount(domain=domain, op_type=op_type, count=count)
                for (domain, op_type), count in operators.most_common()
            ),
            custom_nodes=_custom_nodes(nodes),
            weights=_weight_groups(tensors),
            largest_weights=_largest_weights(tensors),
            data_files=_data_files(tensors, file.parent),
        )


def read_model(file: Path) -> ir.Model:
    """The model in an ONNX file, whose weights stay in their files. Raises ConfigError if it is none."""
    try:
        model = ir.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist") from None
    except (DecodeError, ir.serde.SerdeError, ValueError, OSError) as error:
        raise ConfigError(f"{file} is not a readable ONNX file: {error}") from None
    if not model.ir_version or not len(model.graph):  # any bytes may happen to be a message without fields
        raise ConfigError(f"{file} is not a readable ONNX file: it has no nodes")
    return model


def weights_of(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    """The initializers of the graph."""
    return (value.const_value for value in model.graph.initializers.values() if value.const_value is not None)


def end_bytes(tensor: ir.ExternalTensor) -> int:
    """Where the tensor's data ends in its file."""
    return int((tensor.offset or 0) + (tensor.length or tensor.nbytes))


def dtype_name(dtype: ir.DataType | None) -> str:
    """As the manifest writes it: float32, not FLOAT."""
    if dtype is None:
        return "unknown"
    name = str(dtype.name)
    others = {"FLOAT": "float32", "DOUBLE": "float64", "FLOAT8E4M3FN": "float8_e4m3fn"}
    return others.get(name, name.lower())


def shown_attributes(node: ir.Node) -> dict[str, AttributeText]:
    """The node's attributes but for those that say how TensorRT finds it; what is no number, as text."""
    return {
        name: attribute.value if isinstance(attribute.value, int | float | str) else _as_text(attribute)
        for name, attribute in sorted(node.attributes.items())
        if name not in _NOT_SHOWN
    }


def _as_text(attribute: ir.Attr) -> str:
    if isinstance(attribute.value, list | tuple):
        return f"[{', '.join(map(str, attribute.value))}]"
    return str(attribute.type.name).lower()  # a tensor or a graph


def _tensor_facts(value: ir.Value) -> TensorFacts:
    dims = () if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return TensorFacts(name=value.name or "", dtype=dtype_name(value.dtype), dims=dims)


def _custom_nodes(nodes: Iterable[ir.Node]) -> tuple[CustomNodes, ...]:
    groups: Counter[tuple[str, int, tuple[tuple[str, AttributeText], ...]]] = Counter()
    for node in nodes:
        if node.domain not in STANDARD_DOMAINS:
            num_inputs = sum(value is not None for value in node.inputs)
            groups[node.op_type, num_inputs, tuple(shown_attributes(node).items())] += 1
    return tuple(
        CustomNodes(op_type=op_type, count=count, num_inputs=num_inputs, attributes=dict(attributes))
        for (op_type, num_inputs, attributes), count in groups.most_common()
    )


def _weight_groups(tensors: Iterable[ir.TensorProtocol]) -> tuple[WeightGroup, ...]:
    groups: dict[str, list[ir.TensorProtocol]] = {}
    for tensor in tensors:
        groups.setdefault(dtype_name(tensor.dtype), []).append(tensor)
    facts = [
        WeightGroup(
            dtype=dtype,
            count=len(group),
            num_elements=sum(math.prod(tensor.shape.numpy()) for tensor in group),
            nbytes=sum(tensor.nbytes for tensor in group),
        )
        for dtype, group in groups.items()
    ]
    return tuple(sorted(facts, key=lambda group: -group.nbytes))


def _largest_weights(tensors: Iterable[ir.TensorProtocol]) -> tuple[WeightFacts, ...]:
    alike = Counter(
        (
            re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name or ""),
            dtype_name(tensor.dtype),
            tuple(tensor.shape.numpy()),
            tensor.nbytes,
        )
        for tensor in tensors
    )
    largest = sorted(alike.items(), key=lambda entry: -entry[0][-1])[:NUM_LARGEST]
    return tuple(
        WeightFacts(name=name, count=count, dtype=dtype, shape=shape, nbytes=nbytes)
        for (name, dtype, shape, nbytes), count in largest
    )


def _data_files(tensors: Iterable[ir.TensorProtocol], folder: Path) -> tuple[DataFile, ...]:
    needed_bytes: dict[str, int] = {}
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            needed_bytes[location] = max(end_bytes(tensor), needed_bytes.get(location, 0))
    return tuple(
        DataFile(name=name, needed_bytes=needed, size_bytes=_size_bytes(folder / name))
        for name, needed in sorted(needed_bytes.items())
    )


def _size_bytes(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
