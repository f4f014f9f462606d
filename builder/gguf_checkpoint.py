"""Opens a GGUF file: the model's configuration, and which of its tensors is which weight.

Names and the order of rows are llama.cpp's. What it changes in a model's weights when it converts them is
undone here; the models for which that is known are listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig

from trtforge.builder.checkpoint import FLOAT_DTYPES, Checkpoint, TensorEntry, read_config
from trtforge.builder.meta_model import build_meta_model
from trtforge.builder.quantization.gguf_blocks import (
    GROUP_SIZE,
    HAS_FLOAT_ZEROS,
    format_of,
    unpack_blocks,
)
from trtforge.builder.quantization.weights import ComputedWeight, QuantizedLinear, QuantizedWeight
from trtforge.builder.tokenizer import alone
from trtforge.errors import ConfigError, ExportError
from trtforge.manifest import DType

_METHOD = "gguf"
# Model types by what llama.cpp does to their weights. In the first, pairs of rows of q and k that are rotated
# together become neighbours; in the second, norms are stored plus one.
_REORDERED = ("llama", "mistral")
_NORM_PLUS_ONE = ("gemma2", "gemma3_text")
_UNCHANGED = ("qwen2", "qwen3", "phi3", "starcoder2")
# Scaled frequencies, which transformers does not read: config.json says how they are computed.
_FREQUENCIES = "rope_f"

Rows = npt.NDArray[np.intp]


def open_gguf(path: Path, file: Path) -> Checkpoint:
    """The checkpoint whose weights are in `file`; `path` is the file itself or its folder.

    A folder's config.json is preferred to what the file says. Raises ConfigError if the package gguf is
    missing or the file is no whole GGUF file, and ExportError for what cannot be imported.
    """
    reader = _open_reader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _read_config(path, file, reader, tensors)
    if config.model_type not in _REORDERED + _NORM_PLUS_ONE + _UNCHANGED:
        known = ", ".join(_REORDERED + _NORM_PLUS_ONE + _UNCHANGED)
        raise ExportError(f"{file}: GGUF files of {config.model_type!r} are not imported; known are {known}")
    names = _names(_field(reader, "general.architecture"), config)
    unknown = [name for name in tensors if name not in names and not name.startswith(_FREQUENCIES)]
    if unknown:
        raise ExportError(f"{file} has the tensor {unknown[0]}, for which {config.model_type} has no place")
    entries: dict[str, TensorEntry] = {}
    computed: dict[str, QuantizedLinear | ComputedWeight] = {}
    for name in names.keys() & tensors.keys():
        weight = _Weight(file, name, tensors[name], config).open()
        if isinstance(weight, TensorEntry):
            entries[names[name]] = weight
        else:
            computed[names[name]] = weight
    is_quantized = any(tensor.tensor_type.name not in FLOAT_DTYPES for tensor in tensors.values())
    dtype: DType = "bfloat16" if is_quantized else _common_dtype(tensors)
    method = _METHOD if is_quantized else None
    return Checkpoint(path, config, entries, dtype, method, computed, file)


def _open_reader(file: Path) -> Any:
    if find_spec("gguf") is None:
        raise ConfigError(f"{file} needs the package gguf: pip install 'trtforge[gguf]'")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise ConfigError(f"{file} is not a complete GGUF file: {error}") from None
    if reader.byte_order == "S":
        raise ExportError(f"{file} has its numbers in the other byte order, which is not imported")
    parts = _field(reader, "split.count") or 1
    if parts > 1:
        raise ExportError(
            f"{file} is one of {parts} parts of a model: merge them with llama-gguf-split --merge"
        )
    return reader


def _names(architecture: str, config: Any) -> dict[str, str]:
    """Hugging Face's name of each tensor that such a file may have."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    name_map = get_tensor_name_map(number, config.num_hidden_layers)
    names = {}
    for name in build_meta_model(config, torch.float32).state_dict():
        module, _, part = name.rpartition(".")
        found = name_map.get_name(module)
        if found is not None:
            names[f"{found}.{part}"] = name
    return names


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _read_config(path: Path, file: Path, reader: Any, tensors: Mapping[str, Any]) -> Any:
    if (path / "config.json").is_file():
        return read_config(path)[0]
    architecture = _field(reader, "general.architecture")
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or any(name.startswith(_FREQUENCIES) for name in tensors):
        raise ExportError(
            f"{file} scales its rotary frequencies, which transformers does not read from such files: put "
            "the model's config.json and tokenizer beside it, and give the folder"
        )
    try:
        with alone(file) as folder:
            config = AutoConfig.from_pretrained(folder, gguf_file=file.name)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ExportError(
            f"transformers cannot read {file} (architecture {architecture!r}): {error}"
        ) from None
    return config


def _common_dtype(tensors: Mapping[str, Any]) -> DType:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return FLOAT_DTYPES[sizes.most_common(1)[0][0]]


@dataclass(frozen=True, slots=True)
class _Weight:
    """One tensor, and what has been done to it."""

    file: Path
    name: str
    tensor: Any  # gguf.ReaderTensor
    config: Any

    @property
    def kind(self) -> str:
        return str(self.tensor.tensor_type.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self.tensor.shape))

    def open(self) -> TensorEntry | QuantizedLinear | ComputedWeight:
        rows = self._rows()
        quantized = format_of(self.kind)
        if quantized is not None and len(self.shape) == 2:
            return QuantizedLinear(
                quantized,
                (self.shape[0], self.shape[1]),
                f"from the checkpoint ({_METHOD}, {self.kind})",
                lambda: self._unpack(rows),
                GROUP_SIZE,
                has_float_zeros=self.kind in HAS_FLOAT_ZEROS,
            )
        if self.kind not in FLOAT_DTYPES:
            return self._computed(f"dequantized: {self.kind} is a format that is not kept", rows)
        is_plus_one = self.config.model_type in _NORM_PLUS_ONE and self.name.endswith("norm.weight")
        if rows is None and not is_plus_one:
            offset, nbytes = int(self.tensor.data_offset), int(self.tensor.n_bytes)
            return TensorEntry(self.file, self.kind, self.shape, offset, nbytes)
        return self._computed("not quantized in the checkpoint", rows, 1.0 if is_plus_one else 0.0)

    def _computed(self, reason: str, rows: Rows | None, less: float = 0.0) -> ComputedWeight:
        def dequantize() -> npt.NDArray[np.float32]:
            from gguf import dequantize

            values: npt.NDArray[np.float32] = dequantize(self._read(rows), self.tensor.tensor_type)
            return values.reshape(self.shape) - np.float32(less)

        return ComputedWeight(self.shape, reason, dequantize)

    def _unpack(self, rows: Rows | None) -> QuantizedWeight:
        return unpack_blocks(self.kind, self._read(rows))

    def _read(self, rows: Rows | None) -> npt.NDArray[np.uint8]:
        """The bytes of all rows, in the order of Hugging Face: [out, bytes]."""
        length = int(self.tensor.n_bytes)
        data = np.fromfile(self.file, np.uint8, length, offset=int(self.tensor.data_offset))
        if len(data) != length:
            raise ExportError(f"{self.file} became shorter while it was read")
        data = data.reshape(self.shape[0], -1)
        return data if rows is None else data[rows]

    def _rows(self) -> Rows | None:
        """Where each row of q and k is in the file; None for rows in their order."""
        if self.config.model_type not in _REORDERED:
            return None
        heads: dict[str, Callable[[], int]] = {
            ".attn_q.": lambda: self.config.num_attention_heads,
            ".attn_k.": lambda: self.config.num_key_value_heads,
        }
        count = next((heads[part]() for part in heads if part in self.name), None)
        if count is None:
            return None
        return np.arange(self.shape[0]).reshape(count, -1, 2).swapaxes(1, 2).reshape(-1)
