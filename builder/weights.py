"""The weights of a graph as pieces of a checkpoint's files, which are not held in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from trtforge.builder.checkpoint import TensorEntry
from trtforge.builder.columns import Columns, Ranges
from trtforge.builder.quantization.experts import QuantizedExperts
from trtforge.builder.quantization.weights import ComputedWeight, QuantizedLinear
from trtforge.errors import ExportError

_CHUNK_BYTES = 1 << 24

IR_DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}
_TORCH_DTYPES = {
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A weight's name in the model, shape, and the pieces whose elements, one after the other, are its
    elements in C order. Weights that are tied are one, under the name that is stored.

    A weight that is stored quantized, or computed, has no pieces. One of some `columns` has the pieces of all
    of them, or is computed with all.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[TensorEntry, ...]
    quantized: QuantizedLinear | QuantizedExperts | ComputedWeight | None = None
    columns: Columns | None = None
    division: Division | None = None  # None: it is whole

    def chunks(self) -> Iterator[tuple[str, bytes]]:
        """The stored bytes, a few MiB at a time, each with the dtype it is stored in."""
        for piece in self.pieces:
            with piece.file.open("rb") as stream:
                stream.seek(piece.offset)
                left = piece.nbytes
                while left:
                    data = stream.read(min(left, _CHUNK_BYTES))
                    if not data:
                        raise ExportError(f"{piece.file} became shorter while it was read")
                    left -= len(data)
                    yield piece.dtype, data


@dataclass(frozen=True, slots=True)
class Division:
    """What a rank has of the weight `whole`: of one axis the elements in `ranges`."""

    whole: WeightSource
    axis: int
    ranges: Ranges


class CheckpointTensor(ir.LazyTensor):  # type: ignore[misc]
    """A weight that is put together, and converted to another dtype, each time it is read."""

    def __init__(self, dtype: ir.DataType, source: WeightSource) -> None:
        unsupported = {IR_DTYPES.get(piece.dtype) for piece in source.pieces} - _TORCH_DTYPES.keys() - {dtype}
        if unsupported:
            stored = ", ".join(sorted({piece.dtype for piece in source.pieces}))
            raise ExportError(
                f"{source.name} is stored as {stored}, which cannot be converted to {dtype.name}"
            )
        super().__init__(self._read, dtype=dtype, shape=ir.Shape(source.shape), name=source.name)
        self._source = source

    def _read(self) -> ir.TensorProtocol:
        array = np.frombuffer(b"".join(self._chunks()), dtype=self.dtype.numpy())
        return ir.Tensor(array.reshape(self._source.shape), dtype=self.dtype, name=self.name)

    def _chunks(self) -> Iterator[bytes]:
        chunks = (
            data if IR_DTYPES[stored] == self.dtype else self._convert(IR_DTYPES[stored], data)
            for stored, data in self._source.chunks()
        )
        columns = self._source.columns
        return chunks if columns is None else columns.keep(chunks, int(self.dtype.itemsize))

    def _convert(self, stored: ir.DataType, data: bytes) -> bytes:
        values = torch.frombuffer(bytearray(data), dtype=_TORCH_DTYPES[stored])
        result = values.to(_TORCH_DTYPES[self.dtype])
        if self.dtype == ir.DataType.FLOAT16 and not torch.isfinite(result).all():
            raise ExportError(f"{self.name} has values beyond the range of float16: use bfloat16 or float32")
        return result.view(torch.uint8).numpy().tobytes()

    def tofile(self, file: Any) -> None:
        """Write the bytes, a few MiB at a time."""
        for chunk in self._chunks():
            file.write(chunk)


def detach_weights(graph: ir.Graph) -> list[ir.Value]:
    """Turn the initializers that were traced on the meta device into inputs, and return them.

    An optimizer then knows nothing about them: it cannot read, fold or merge weights.
    """
    detached = []
    for initializer in list(graph.initializers.values()):
        raw = getattr(initializer.const_value, "raw", None)
        if isinstance(raw, torch.Tensor) and raw.device.type == "meta":
            del graph.initializers[initializer.name]
            initializer.const_value = None
            graph.inputs.append(initializer)
            detached.append(initializer)
    return detached


def attach_weights(
    graph: ir.Graph, detached: Iterable[ir.Value], sources: Mapping[str, WeightSource], prefix: str
) -> None:
    """Make `detached` initializers again, with data that is read from the checkpoint when needed.

    Their names are `prefix` + the weight's name, and lose the prefix. Raises ExportError for one that the
    graph uses but the checkpoint lacks.
    """
    for value in detached:
        graph.inputs.remove(value)
        if not value.uses():
            continue
        name = value.name.removeprefix(prefix)
        if name not in sources:
            raise ExportError(f"the checkpoint lacks {name}, which the model needs")
        value.name = sources[name].name
        value.const_value = make_tensor(value.dtype, sources[name])
        graph.initializers[value.name] = value


def is_weight(initializer: ir.Value) -> bool:
    """Whether the data is that of a checkpoint, and not a constant of the graph."""
    return isinstance(initializer.const_value, ir.ExternalTensor | ir.LazyTensor)


def make_tensor(dtype: ir.DataType, source: WeightSource) -> ir.TensorProtocol:
    """The weight in `dtype`; nothing is read yet."""
    if source.quantized is not None:
        return _dequantized_tensor(dtype, source, source.quantized)
    first = source.pieces[0]
    if len(source.pieces) > 1 or IR_DTYPES.get(first.dtype) != dtype or source.columns is not None:
        return CheckpointTensor(dtype, source)
    return ir.ExternalTensor(
        first.file.name,
        first.offset,
        first.nbytes,
        dtype,
        shape=ir.Shape(source.shape),
        name=source.name,
        base_dir=first.file.parent,
    )


def _dequantized_tensor(
    dtype: ir.DataType, source: WeightSource, stored: QuantizedLinear | QuantizedExperts | ComputedWeight
) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        array = stored.dequantize()
        if source.columns is not None:
            array = source.columns.of(array)
        return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=source.name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(source.shape), name=source.name)


def read_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """The data of a tensor of floats."""
    data = torch.frombuffer(bytearray(tensor.tobytes()), dtype=_TORCH_DTYPES[tensor.dtype])
    return data.reshape(tuple(tensor.shape.numpy()))
