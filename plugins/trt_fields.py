"""TensorRT's plugin fields: a node's attributes, as its parser and its engines carry them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from trtforge.errors import PluginError
from trtforge.plugins.op import Array, Attribute, AttributeValue, OpSpec

INPUT_NAMES = "input_names"  # a field of every plugin: which inputs its node has, with commas between them

TensorRT: TypeAlias = Any  # the module `tensorrt`


class Fields:
    """A PluginFieldCollection, and the fields with the memory that it points into but does not keep alive."""

    def __init__(
        self, trt: TensorRT, spec: OpSpec, values: Mapping[str, AttributeValue] | None = None
    ) -> None:
        """`values` of the operator's attributes and INPUT_NAMES; without them, only names and types."""
        types = {
            "int": trt.PluginFieldType.INT32,
            "float": trt.PluginFieldType.FLOAT32,
            "string": trt.PluginFieldType.CHAR,
        }
        attributes = (*spec.attributes, Attribute(INPUT_NAMES, "string"))
        self._fields = [
            trt.PluginField(a.name, _array(a, None if values is None else values[a.name]), types[a.type])
            for a in attributes
        ]
        self.collection = trt.PluginFieldCollection(self._fields)


def read_fields(spec: OpSpec, fields: Iterable[Any]) -> tuple[dict[str, AttributeValue], list[str]]:
    """Attributes, with defaults where there is no field, and the names of the inputs.

    Raises PluginError for a missing field that has no default.
    """
    arrays: dict[str, Array] = {field.name: field.data for field in fields if field.size}
    if INPUT_NAMES not in arrays:
        raise PluginError(f"{spec.name} needs the attribute {INPUT_NAMES}: call name_inputs before parsing")
    given = {a.name: _value(a, arrays[a.name]) for a in spec.attributes if a.name in arrays}
    complete = spec.node_attributes(**given)
    attributes = {a.name: complete[a.name] for a in spec.attributes}
    return attributes, _text(arrays[INPUT_NAMES]).split(",")


def _array(attribute: Attribute, value: AttributeValue | None) -> Array:
    if attribute.type == "string":  # the zero at its end keeps an empty one from being a field without data
        return np.frombuffer(b"" if value is None else str(value).encode() + b"\0", np.int8)
    return np.array([] if value is None else [value], np.int32 if attribute.type == "int" else np.float32)


def _value(attribute: Attribute, array: Array) -> AttributeValue:
    if attribute.type == "string":
        return _text(array)
    return int(array[0]) if attribute.type == "int" else float(array[0])


def _text(array: Array) -> str:
    return array.tobytes().rstrip(b"\0").decode()
