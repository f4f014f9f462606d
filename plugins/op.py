"""What a custom operator is: one declaration, from which its ONNX schema and its nodes are derived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy.typing as npt
import onnx

from trtforge.errors import PluginError

DOMAIN = "trtforge"
OPSET_VERSION = 1

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
INTS = ("tensor(int32)", "tensor(int64)")

AttributeValue = int | float | str
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output. `dtype` names one of the operator's type variables; equal names in `dims`
    stand for equal sizes in all of its tensors."""

    name: str
    dtype: str
    dims: tuple[str | int, ...]
    optional: bool = False

    def declared_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`shape` with as many dims as are declared: the first ones of a tensor that has more are one.

        [T, 1, H] and [T, H] are the same memory. Sizes of -1 are not known, nor is their product.
        """
        num_first = len(shape) - len(self.dims) + 1
        if num_first <= 1:
            return tuple(shape)
        first = shape[:num_first]
        return (-1 if -1 in first else prod(first), *shape[num_first:])


@dataclass(frozen=True, slots=True)
class Attribute:
    """A number or string fixed when the graph is made; `default` None means that it has to be given."""

    name: str
    type: Literal["int", "float", "string"]
    default: AttributeValue | None = None


@dataclass(frozen=True, slots=True, eq=False)
class OpSpec:
    """A custom operator of domain `trtforge`. There is one object for each, so that identity is equality."""

    name: str
    doc: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    dtypes: Mapping[str, Sequence[str]]  # type variable -> ONNX type strings
    attributes: tuple[Attribute, ...] = ()
    # Output -> the input whose memory it shares where the runtime can: the operator works in place.
    aliases: Mapping[str, str] = field(default_factory=dict)

    def node_attributes(self, **values: AttributeValue) -> dict[str, AttributeValue]:
        """All attributes of a node: `values`, defaults for the rest, and how TensorRT finds the plugin.

        Raises PluginError for an attribute that is unknown or has no value.
        """
        unknown = values.keys() - {attribute.name for attribute in self.attributes}
        if unknown:
            raise PluginError(f"{self.name} has no attribute {sorted(unknown)}")
        result: dict[str, AttributeValue] = {}
        for attribute in self.attributes:
            value = values.get(attribute.name, attribute.default)
            if value is None:
                raise PluginError(f"{self.name} needs the attribute {attribute.name}")
            result[attribute.name] = value
        return result | {"plugin_namespace": DOMAIN, "plugin_version": str(OPSET_VERSION)}

    def schema(self) -> onnx.defs.OpSchema:
        """The operator as ONNX knows it."""
        schema = onnx.defs.OpSchema
        kinds = {
            "int": schema.AttrType.INT,
            "float": schema.AttrType.FLOAT,
            "string": schema.AttrType.STRING,
        }
        attributes = [
            schema.Attribute(a.name, kinds[a.type], required=True)
            if a.default is None
            else schema.Attribute(a.name, onnx.helper.make_attribute(a.name, a.default))
            for a in self.attributes
        ]
        for name in ("plugin_namespace", "plugin_version"):
            attributes.append(schema.Attribute(name, schema.AttrType.STRING, required=False))
        return schema(
            self.name,
            DOMAIN,
            OPSET_VERSION,
            doc=self.doc,
            inputs=[_parameter(tensor) for tensor in self.inputs],
            outputs=[_parameter(tensor) for tensor in self.outputs],
            type_constraints=[(name, list(types), "") for name, types in self.dtypes.items()],
            attributes=attributes,
        )

    def register_schema(self) -> None:
        """Make the operator known to ONNX in this process; calling it again does nothing."""
        if not onnx.defs.has(self.name, DOMAIN):
            onnx.defs.register_schema(self.schema())

    def check_inputs(self, *arrays: Array | None) -> dict[str, int]:
        """Sizes of the named dims; raises PluginError where `arrays` contradict the declaration."""
        return self.check_shapes(*(None if array is None else array.shape for array in arrays))

    def check_shapes(self, *shapes: tuple[int, ...] | None) -> dict[str, int]:
        """`check_inputs` of arrays that have these shapes; None is an input that is left out."""
        if len(shapes) > len(self.inputs):
            raise PluginError(f"{self.name} takes {len(self.inputs)} inputs, not {len(shapes)}")
        sizes: dict[str, int] = {}
        given = [*shapes, *[None] * (len(self.inputs) - len(shapes))]
        for tensor, shape in zip(self.inputs, given, strict=True):
            if shape is None:
                if not tensor.optional:
                    raise PluginError(f"{self.name} needs the input {tensor.name}")
                continue
            if len(shape) != len(tensor.dims):
                raise PluginError(
                    f"{self.name}: {tensor.name} has shape {shape}, expected dims {tensor.dims}"
                )
            for dim, size in zip(tensor.dims, shape, strict=True):
                expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
                if size != expected:
                    raise PluginError(
                        f"{self.name}: {tensor.name} has shape {shape}, expected {dim} = {expected}"
                    )
        return sizes


def _parameter(tensor: Tensor) -> onnx.defs.OpSchema.FormalParameter:
    option = onnx.defs.OpSchema.FormalParameterOption
    return onnx.defs.OpSchema.FormalParameter(
        tensor.name,
        tensor.dtype,
        description=" x ".join(str(dim) for dim in tensor.dims),
        param_option=option.Optional if tensor.optional else option.Single,
    )
