"""From the tensors of a checkpoint to the weights of a graph, without holding them in memory.

Transformers keeps, for each model type, how names and layouts of checkpoint tensors become those of its
modules (one tensor an expert becomes one tensor a layer, for instance). The same rules are followed here,
but on byte ranges: a weight is the concatenation of pieces of files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from trtforge.builder.checkpoint import Checkpoint, TensorEntry
from trtforge.builder.columns import Columns
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
    quantized: QuantizedLinear | ComputedWeight | None = None
    columns: Columns | None = None

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


# --------------------------------------------------------------------------- checkpoint -> sources


def locate_weights(hf: Any, checkpoint: Checkpoint) -> dict[str, WeightSource]:
    """Where each parameter and persistent buffer of the meta model `hf` is, by its name in the model.

    Parameters that the model ties and the checkpoint stores twice, with different values, are untied in
    `hf`, as transformers does when it loads them. Raises ExportError for parameters that the checkpoint
    lacks, has in another shape or in a layout that is not known here.
    """
    sources = _follow_rules(hf, checkpoint)
    _untie(hf, sources)
    aliases = _aliases(hf)
    for name, names in aliases.items():
        found = next((alias for alias in names if alias in sources), None)
        if found is not None:
            sources.setdefault(name, sources[found])
    state = hf.state_dict()
    missing = sorted(aliases.keys() - sources.keys(), key=dot_natural_key)
    if missing:
        raise ExportError(
            f"the checkpoint in {checkpoint.path} lacks {len(missing)} of the model's weights: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    for name, source in sources.items():
        if source.shape != tuple(state[name].shape):
            raise ExportError(
                f"{name} has shape {list(source.shape)} in the checkpoint, but config.json makes it "
                f"{list(state[name].shape)}"
            )
    return sources


def _follow_rules(hf: Any, checkpoint: Checkpoint) -> dict[str, WeightSource]:
    state = hf.state_dict()
    rules = get_model_conversion_mapping(hf)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    plain: dict[str, WeightSource] = {}
    split: dict[str, dict[str, list[TensorEntry]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted([*checkpoint.tensors, *checkpoint.quantized], key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, hf.base_model_prefix, state)
        if target not in state and key in state:
            target, pattern = key, None
        if target not in state:
            continue
        stored = checkpoint.quantized.get(key)
        if stored is not None and pattern is not None:
            raise ExportError(f"{key} is an expert's weight that is quantized, which is not supported yet")
        if stored is not None:
            plain[target] = WeightSource(target, stored.shape, (), stored)
        elif pattern is None:
            entry = checkpoint.tensors[key]
            plain[target] = WeightSource(target, entry.shape, (entry,))
        else:
            split[target][pattern].append(checkpoint.tensors[key])
    for target, groups in split.items():
        rule = by_pattern[next(iter(groups))]
        plain[target] = _merge(hf.config.model_type, target, rule, groups)
    return plain


def _merge(
    model_type: str, target: str, rule: WeightConverter, groups: Mapping[str, list[TensorEntry]]
) -> WeightSource:
    """One weight out of one tensor, or several to be concatenated, an expert."""
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in rule.operations]
    stack = [(MergeModulelist, 0)]
    lists = [groups[pattern] for pattern in rule.source_patterns if pattern in groups]
    if operations not in (stack, [*stack, (Concatenate, 1)]) or len({len(entries) for entries in lists}) != 1:
        raise ExportError(f"{model_type}: the layout of {target} in the checkpoint is not supported")
    experts = list(zip(*lists, strict=True))
    shapes = {tuple(entry.shape for entry in expert) for expert in experts}
    if len(shapes) != 1:
        raise ExportError(f"{target}: the experts in the checkpoint differ in shape: {sorted(shapes)}")
    (parts,) = shapes
    shape = (len(experts), sum(part[0] for part in parts), *parts[0][1:])
    return WeightSource(target, shape, tuple(entry for expert in experts for entry in expert))


def _aliases(hf: Any) -> dict[str, list[str]]:
    """For each parameter's name the names of all parameters tied to it, itself included."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: names for names in groups.values() for name in names}


def _untie(hf: Any, sources: Mapping[str, WeightSource]) -> None:
    for name, names in _aliases(hf).items():
        stored = [alias for alias in names if alias in sources]
        if name in stored[1:] and not _equal(sources[name], sources[stored[0]]):
            module_name, _, attribute = name.rpartition(".")
            module = hf.get_submodule(module_name)
            setattr(module, attribute, torch.nn.Parameter(torch.empty_like(getattr(module, attribute))))


def _equal(one: WeightSource, other: WeightSource) -> bool:
    if one.shape != other.shape or one.quantized or other.quantized:
        return False
    return all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True))


# --------------------------------------------------------------------------- sources -> graph


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
    dtype: ir.DataType, source: WeightSource, stored: QuantizedLinear | ComputedWeight
) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        array = stored.dequantize()
        if source.columns is not None:
            array = source.columns.of(array)
        return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=source.name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(source.shape), name=source.name)
