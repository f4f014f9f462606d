"""A node's inputs and outputs by position, which is how TensorRT asks about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from trtforge.errors import PluginError
from trtforge.plugins.launch import Call
from trtforge.plugins.op import AttributeValue, OpSpec, Tensor

# ONNX's element types by numpy's names.
ONNX_TYPES: Mapping[str, str] = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "float8_e4m3fn": "tensor(float8e4m3fn)",
    "int8": "tensor(int8)",
    "uint8": "tensor(uint8)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}

# A size that is the same in every call, or where to read it: position of the input, axis.
Dim: TypeAlias = int | tuple[int, int]


class Signature:
    """What an operator's declaration says about a node that has certain inputs. Dtypes are numpy's names."""

    def __init__(self, spec: OpSpec, input_names: Sequence[str]) -> None:
        """Raises PluginError for inputs that the operator does not take, and if its outputs do not follow
        from them."""
        self.inputs = tuple(
            tensor for tensor in spec.inputs if tensor.name in input_names or not tensor.optional
        )
        if [tensor.name for tensor in self.inputs] != list(input_names):
            takes = ", ".join(f"[{t.name}]" if t.optional else t.name for t in spec.inputs)
            raise PluginError(f"{spec.name} takes the inputs {takes}, not {', '.join(input_names)}")
        self.spec = spec
        self._input_of_dtype: dict[str, int] = {}
        self._origins: dict[str, tuple[int, int]] = {}  # of named dims: input, axis
        for position, tensor in enumerate(self.inputs):
            self._input_of_dtype.setdefault(tensor.dtype, position)
            for axis, dim in enumerate(tensor.dims):
                if isinstance(dim, str):
                    self._origins.setdefault(dim, (position, axis))
        for output in spec.outputs:
            unknown = [dim for dim in output.dims if isinstance(dim, str) and dim not in self._origins]
            if unknown:
                raise PluginError(f"{spec.name}: no input has the dims {unknown} of {output.name}")
            if output.dtype not in self._input_of_dtype and len(spec.dtypes[output.dtype]) != 1:
                raise PluginError(f"{spec.name}: no input has the dtype {output.dtype} of {output.name}")

    def output_dims(self, input_ranks: Sequence[int]) -> list[list[Dim]]:
        """The dims of every output. Where several dims of an input are the first one that is declared, an
        output that begins with it begins with all of them.

        Raises PluginError for another number of inputs than the node has, and for inputs with too few dims.
        """
        self._check_number(len(input_ranks))
        for tensor, rank in zip(self.inputs, input_ranks, strict=True):
            if rank < len(tensor.dims):
                raise PluginError(f"{self.spec.name}: {tensor.name} has {rank} dims, expected {tensor.dims}")
        return [self._dims(output, input_ranks) for output in self.spec.outputs]

    def _dims(self, output: Tensor, input_ranks: Sequence[int]) -> list[Dim]:
        dims: list[Dim] = []
        for index, dim in enumerate(output.dims):
            if isinstance(dim, int):
                dims.append(dim)
                continue
            position, axis = self._origins[dim]
            extra = input_ranks[position] - len(self.inputs[position].dims)
            if axis > 0:
                dims.append((position, axis + extra))
            elif index == 0:
                dims += [(position, first) for first in range(extra + 1)]
            elif extra == 0:
                dims.append((position, 0))
            else:
                name = self.inputs[position].name
                raise PluginError(f"{self.spec.name}: {name} has {extra} dims too many for {output.name}")
        return dims

    def output_dtypes(self, input_dtypes: Sequence[str]) -> list[str]:
        """Raises PluginError for another number of inputs than the node has."""
        self._check_number(len(input_dtypes))
        dtypes = []
        for output in self.spec.outputs:
            if output.dtype in self._input_of_dtype:
                dtypes.append(input_dtypes[self._input_of_dtype[output.dtype]])
            else:
                (only_type,) = self.spec.dtypes[output.dtype]
                dtypes += [name for name, onnx_type in ONNX_TYPES.items() if onnx_type == only_type]
        return dtypes

    def accepts(self, dtypes: Sequence[str | None]) -> bool:
        """Whether the last of `dtypes` is possible, given those before it; None is a dtype not known here.

        `dtypes` are those of the first inputs and outputs, in order.
        """
        tensors = (*self.inputs, *self.spec.outputs)
        *earlier, dtype = dtypes
        variable = tensors[len(earlier)].dtype
        if dtype is None or ONNX_TYPES[dtype] not in self.spec.dtypes[variable]:
            return False
        pairs = zip(tensors, earlier, strict=False)
        return all(other == dtype for tensor, other in pairs if tensor.dtype == variable)

    def aliased_input(self, output: int) -> int | None:
        """The position of the input whose memory an output shares."""
        name = self.spec.aliases.get(self.spec.outputs[output].name)
        return None if name is None else [tensor.name for tensor in self.inputs].index(name)

    def call(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[str],
        attributes: Mapping[str, AttributeValue],
    ) -> Call:
        """A call with these inputs; raises PluginError for shapes that contradict the declaration."""
        self._check_number(len(shapes))
        given = zip(self.inputs, shapes, strict=True)
        declared = {tensor.name: tensor.declared_shape(shape) for tensor, shape in given}
        self.spec.check_shapes(*(declared.get(tensor.name) for tensor in self.spec.inputs))
        return Call(declared, dict(zip(declared, dtypes, strict=True)), attributes)

    def _check_number(self, number: int) -> None:
        if number != len(self.inputs):
            names = ", ".join(tensor.name for tensor in self.inputs)
            raise PluginError(f"{self.spec.name}: this node has the inputs {names}; {number} were given")
