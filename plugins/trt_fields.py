"""TensorRT's plugin fields: what its parser knows of a node, and what an engine keeps of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from trtforge.errors import PluginError
from trtforge.plugins.op import Array, AttributeValue, OpSpec

INPUT_NAMES = "input_names"  # which inputs a node has, with commas between them
WORKSPACE_BYTES = "workspace_bytes"

TensorRT: TypeAlias = Any  # the module `tensorrt`


@dataclass(frozen=True, slots=True)
class NodeFields:
    """A node as its fields describe it."""

    attributes: Mapping[str, AttributeValue]  # all that the operator has
    input_names: tuple[str, ...]
    workspace_bytes: int  # that an engine gives the node; 0 before it is built

    @classmethod
    def read(cls, spec: OpSpec, fields: Iterable[Any]) -> NodeFields:
        """Fields of a parsed node or of an engine; raises PluginError if one is missing."""
        arrays: dict[str, Array] = {field.name: field.data for field in fields if field.size}
        if INPUT_NAMES not in arrays:
            raise PluginError(f"{spec.name} needs the attribute {INPUT_NAMES}: see name_inputs")
        # A parser leaves out attributes that a node does not have.
        values = {a.name: _value(arrays[a.name]) for a in spec.attributes if a.name in arrays}
        complete = spec.node_attributes(**values)
        return cls(
            attributes={a.name: complete[a.name] for a in spec.attributes},
            input_names=tuple(str(_value(arrays[INPUT_NAMES])).split(",")),
            workspace_bytes=int(_value(arrays[WORKSPACE_BYTES])) if WORKSPACE_BYTES in arrays else 0,
        )

    def for_engine(self, trt: TensorRT) -> Collection:
        """What `read` reads again."""
        values = {
            **self.attributes,
            INPUT_NAMES: ",".join(self.input_names),
            WORKSPACE_BYTES: self.workspace_bytes,
        }
        return Collection(trt, {name: _array(value) for name, value in values.items()})


class Collection:
    """A PluginFieldCollection, `fields`, with all that it points to, which TensorRT does not keep alive."""

    def __init__(self, trt: TensorRT, arrays: Mapping[str, Array]) -> None:
        kinds = trt.PluginFieldType
        types = {"int8": kinds.CHAR, "int32": kinds.INT32, "int64": kinds.INT64, "float32": kinds.FLOAT32}
        self._fields = [
            trt.PluginField(name, array, types[array.dtype.name]) for name, array in arrays.items()
        ]
        self.fields = trt.PluginFieldCollection(self._fields)


def field_names(trt: TensorRT, spec: OpSpec) -> Collection:
    """Names and types of the fields that a parser has to pass on, without values."""
    dtypes = {"int": np.int32, "float": np.float32, "string": np.int8}
    types = {attribute.name: dtypes[attribute.type] for attribute in spec.attributes}
    types[INPUT_NAMES] = np.int8
    return Collection(trt, {name: np.array([], dtype) for name, dtype in types.items()})


def _array(value: AttributeValue) -> Array:
    if isinstance(value, str):  # with an end, so that an empty one is no field without data
        return np.frombuffer(value.encode() + b"\0", np.int8)
    return np.array([value], np.int64 if isinstance(value, int) else np.float32)


def _value(array: Array) -> AttributeValue:
    if array.dtype == np.int8:
        return array.tobytes().rstrip(b"\0").decode()
    value: AttributeValue = array[0].item()
    return value
