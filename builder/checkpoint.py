"""A Hugging Face checkpoint on disk: its configuration, and where each tensor's bytes lie."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import numpy.typing as npt
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from trtforge.builder.quantization.checkpoint_formats import find_quantized
from trtforge.builder.quantization.weights import ComputedWeight, QuantizedLinear
from trtforge.errors import ConfigError, ExportError
from trtforge.manifest import DType

# Files of a hub repository that a build reads.
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
_MODELOPT_FILE = "hf_quant_config.json"  # of NVIDIA ModelOpt
_CONFIG_FILES = ("config.json", "generation_config.json", _MODELOPT_FILE, "*.jinja")
_READ_BYTES = 1 << 24
_GGUF = ".gguf"

FLOAT_DTYPES: Mapping[str, DType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


_NUMPY_DTYPES: Mapping[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a safetensors file: `nbytes` little-endian bytes from `offset`, in C order."""

    file: Path
    dtype: str  # the format's name, such as BF16
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> npt.NDArray[Any]:
        """The whole tensor. Raises ExportError for an unknown dtype, and if the file became shorter."""
        if self.dtype not in _NUMPY_DTYPES:
            raise ExportError(f"{self.file} has a tensor of dtype {self.dtype}, which is not known")
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.nbytes)
        if len(data) != self.nbytes:
            raise ExportError(f"{self.file} became shorter while it was read")
        return np.frombuffer(data, _NUMPY_DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint; no weight has been read."""

    path: Path  # a folder, or a GGUF file that has everything in it
    config: Any  # transformers.PretrainedConfig
    tensors: Mapping[str, TensorEntry]  # but those that quantized weights consist of
    dtype: DType  # that most of the weights have that are not quantized
    quant_method: str | None = None  # None: no weight is quantized
    # By the weight's name; also weights that have to be computed.
    quantized: Mapping[str, QuantizedLinear | ComputedWeight] = field(default_factory=dict)
    gguf: Path | None = None  # the file that the weights are in
    cache_scales: Mapping[str, TensorEntry] = field(default_factory=dict)  # of a KV cache of e4m3

    @classmethod
    def open(cls, model: str) -> Checkpoint:
        """Open a local Hugging Face folder, a GGUF file or, downloading what is missing, a hub id.

        Raises ConfigError if there is no such model or it cannot be reached, and ExportError if its files
        are of a kind that cannot be exported.
        """
        folder = Path(model)
        gguf = find_gguf(folder)
        if gguf is not None:
            # Only now: its package is an extra.
            from trtforge.builder.gguf_checkpoint import open_gguf

            return open_gguf(folder, gguf)
        if not folder.is_dir():
            folder = _download(model)
        config, settings = read_config(folder)
        tensors = _read_index(folder)
        if settings is None:
            return cls(folder, config, tensors, _common_dtype(folder, tensors))
        method = str(settings.get("quant_method"))
        found = find_quantized(method, settings, tensors)
        dtype = _common_dtype(folder, found.rest)
        scales = found.cache_scales
        return cls(folder, config, found.rest, dtype, method, found.linears, cache_scales=scales)

    @property
    def tokenizer(self) -> Path:
        """The folder, or the GGUF file, that has the tokenizer."""
        if self.gguf is not None and not any(self.path.glob("tokenizer*")):
            return self.gguf
        return self.path

    def content_key(self) -> str:
        """SHA-256, in hex, over the names and bytes of configuration, tokenizer and weights."""
        files = {file for pattern in _CONFIG_FILES + _TOKENIZER_FILES for file in self.path.glob(pattern)}
        files |= {entry.file for entry in self.tensors.values()} | ({self.gguf} if self.gguf else set())
        digest = hashlib.sha256()
        for file in sorted(files, key=lambda file: file.name):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(_READ_BYTES):
                    digest.update(block)
        return digest.hexdigest()


def open_config(model: str) -> tuple[Any, DType | None]:
    """The configuration of a local folder or a hub id, and the dtype of the weights if any are there.

    Nothing but the configuration is downloaded. Raises as `Checkpoint.open` does.
    """
    folder = Path(model)
    if find_gguf(folder) is not None:
        raise ExportError(
            f"{model} is a GGUF file, which is not planned yet: give the folder of the Hugging Face model"
        )
    if not folder.is_dir():
        folder = _download(model, ("config.json", _MODELOPT_FILE))
    config, settings = read_config(folder)
    if settings is not None:
        raise ExportError(
            f"the checkpoint is quantized ({settings.get('quant_method')}), which is not planned yet: give "
            "the model in float32, bfloat16 or float16"
        )
    tensors: dict[str, TensorEntry] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(_read_header(file.resolve()))
    return config, _common_dtype(folder, tensors) if tensors else None


def find_gguf(path: Path) -> Path | None:
    """`path` itself if it is a GGUF file, or that of a folder whose weights are in one.

    Raises ConfigError for a folder with several.
    """
    if path.suffix.lower() == _GGUF and path.is_file():
        return path
    found = sorted(path.glob(f"*{_GGUF}")) if path.is_dir() else []
    if not found or any(path.glob("*.safetensors")):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConfigError(f"{path} holds {len(found)} GGUF files, give the path of one: {names}")
    return found[0]


def _download(model: str, patterns: Sequence[str] = _HUB_FILES) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(patterns)))
    except HFValidationError:
        raise ConfigError(f"{model} is neither a folder nor a model id of the Hugging Face hub") from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{model} is not a local folder, and the Hugging Face hub cannot be reached to download it: "
            "give the path of a folder with config.json and *.safetensors"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"{model} cannot be downloaded from the Hugging Face hub: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ConfigError if it holds anything else."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a JSON {type(values).__name__}, expected an object")
    return values


def read_config(folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """The model's configuration without that of its quantization, and the latter if there is one."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {folder} is not a Hugging Face model folder")
    values = read_json(path)
    settings = _quantization_settings(folder, values)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        model_type = values.get("model_type")
        if "auto_map" in values:
            raise ExportError(
                f"model type {model_type!r} brings its own Python code, which is never run; only model types "
                "that transformers implements can be exported"
            ) from None
        raise ExportError(f"transformers cannot read {path} (model type {model_type!r}): {error}") from None
    for scope in (config, config.get_text_config()):
        if hasattr(scope, "quantization_config"):
            del scope.quantization_config
    return config, settings


def _quantization_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the weights are quantized, with `quant_method`. Transformers could load some without their scales
    and without an error."""
    found = [scope.get("quantization_config") for scope in (config, config.get("text_config") or {})]
    found.append(config.get("compression_config"))
    settings: dict[str, Any] | None = next((entry for entry in found if entry), None)
    side_file = folder / _MODELOPT_FILE
    if settings is not None:
        return {"quant_method": "unknown method"} | settings
    if side_file.is_file():
        of_modelopt: dict[str, Any] = read_json(side_file).get("quantization", {})
        return {"quant_method": "modelopt"} | of_modelopt
    return None


def _read_index(folder: Path) -> dict[str, TensorEntry]:
    """Where each tensor is, from the headers of all safetensors files that belong to the model."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ConfigError(f"{index} names {outside[0]!r}, which is not a file beside it")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        other = sorted(path.name for path in folder.glob("*.bin"))
        if other:
            raise ExportError(
                f"{folder} has its weights in {other[0]}, which is not read because it can hold code: "
                "convert it with transformers (from_pretrained, then save_pretrained writes safetensors)"
            )
        raise ConfigError(f"{folder} has no *.safetensors files")
    tensors: dict[str, TensorEntry] = {}
    for name in names:
        tensors.update(_read_header((folder / name).resolve()))  # a hub download consists of links
    return tensors


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """The header of a safetensors file: 8 bytes of length, then JSON with dtypes, shapes and offsets."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"its header should have {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {name: _entry(file, name, fields, 8 + length, size) for name, fields in header.items()}
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist, but the checkpoint's index names it") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"{file} is not a complete safetensors file: {error}") from None


def _entry(file: Path, name: str, fields: Mapping[str, Any], start: int, size: int) -> TensorEntry:
    begin, end = fields["data_offsets"]
    shape = tuple(int(dim) for dim in fields["shape"])
    if not 0 <= begin <= end <= size - start:
        raise ValueError(f"{name} has bytes {begin} to {end} of the data, of which there are {size - start}")
    num_elements = math.prod(shape)
    if min(shape, default=0) < 0 or (num_elements and (end - begin) * 8 % num_elements):
        raise ValueError(f"{name} of shape {list(shape)} cannot have {end - begin} bytes")
    return TensorEntry(file, fields["dtype"], shape, start + begin, end - begin)


def _common_dtype(folder: Path, tensors: Mapping[str, TensorEntry]) -> DType:
    sizes: Counter[str] = Counter()
    for entry in tensors.values():
        sizes[entry.dtype] += entry.nbytes
    name = sizes.most_common(1)[0][0] if sizes else "nothing"
    if name not in FLOAT_DTYPES:
        raise ExportError(
            f"{folder}: most weights are stored as {name}; supported are {', '.join(FLOAT_DTYPES)}"
        )
    return FLOAT_DTYPES[name]
