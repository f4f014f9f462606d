"""The weights of a graph in one safetensors file, which ONNX reads as external data."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir
from typing_extensions import Buffer

from trtforge.builder.weights import IR_DTYPES
from trtforge.errors import ExportError

_SAFETENSORS_DTYPES = {dtype: name for name, dtype in IR_DTYPES.items()}
_ALIGNMENT = 1 << 12  # of the first tensor, so that a memory map of the data starts on a page


def write_weights(
    initializers: Sequence[ir.Value], file: Path, on_bytes: Callable[[int, int], None] | None
) -> str:
    """Write the data of `initializers` one after the other, and make the file their external data; returns
    the SHA-256 of the file, in hex.

    `on_bytes(done, total)` is told after each of them.
    """
    tensors = [value.const_value for value in initializers]
    total = sum(tensor.nbytes for tensor in tensors)
    header, start = _header(tensors)
    with file.open("wb") as opened:
        stream = _HashedFile(opened)
        stream.write(header)
        offset = start
        for value, tensor in zip(initializers, tensors, strict=True):
            tensor.tofile(stream)
            if opened.tell() != offset + tensor.nbytes:
                raise ExportError(f"{tensor.name} does not have the {tensor.nbytes} bytes its shape needs")
            value.const_value = ir.ExternalTensor(
                file.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=file.parent,
            )
            offset += tensor.nbytes
            if on_bytes is not None:
                on_bytes(offset - start, total)
    return stream.digest


class _HashedFile:
    """A file that is hashed as it is written. It has no descriptor: all that is written passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Of what was written, in hex."""
        return self._hash.hexdigest()

    def write(self, data: Buffer) -> int:
        """Append bytes."""
        self._hash.update(data)
        return self._file.write(data)


def _header(tensors: Sequence[ir.TensorProtocol]) -> tuple[bytes, int]:
    """The format's header, and where the first tensor begins."""
    fields: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        fields[tensor.name] = {
            **_stored_type(tensor),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, 8 + len(text)


def _stored_type(tensor: ir.TensorProtocol) -> dict[str, Any]:
    """Numbers of four bits, which the format does not have, are told as the bytes that they fill."""
    if tensor.dtype in _SAFETENSORS_DTYPES:
        return {"dtype": _SAFETENSORS_DTYPES[tensor.dtype], "shape": list(tensor.shape.numpy())}
    return {"dtype": "U8", "shape": [tensor.nbytes]}
