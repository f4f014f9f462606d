"""The one contract between build and serve: `manifest.json` beside a built model.

Everything the runtime knows about a model it reads here; it never looks at the Hugging Face config.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from trtforge.errors import ConfigError

MANIFEST_FILE = "manifest.json"
# Beside the manifest: the bundle of the model's kernels, of engines that have plugins and where
# `trtforge compile-kernels` was told to put it there.
KERNELS_FOLDER = "kernels"
SCHEMA_VERSION: Literal[1] = 1
# slot_mapping holds block * block_size + offset as int32.
MAX_SLOTS = 2**31 - 1

Runtime = Literal["openvino", "tensorrt", "tensorrt-rtx", "reference", "fake"]
DType = Literal["float32", "bfloat16", "float16"]
CacheDType = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]

# Of an int8 cache, as OpenVINO lays it out: a scale and a zero point, in float32, for each channel of the
# keys of a block of 32 tokens, and for the values of each token and head.
_SCALE_BYTES, _TOKENS_OF_A_SCALE = 8, 32


def element_bytes(dtype: CacheDType) -> int:
    """Bytes of one number."""
    return {"float32": 4, "float8_e4m3fn": 1, "int8": 1}.get(dtype, 2)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerCache(_Frozen):
    """What one layer keeps for each token: keys and values of [num_kv_heads, head_dim]."""

    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    window: int = Field(default=0, ge=0)  # tokens that a token sees, itself included; 0: all before it


def cache_bytes_per_token(layers: Sequence[LayerCache], dtype: CacheDType) -> int:
    """Bytes that one token occupies in caches of `layers`, keys and values together."""
    of_keys = sum(layer.num_kv_heads * layer.head_dim for layer in layers)
    num_bytes = 2 * of_keys * element_bytes(dtype)
    if dtype != "int8":
        return num_bytes
    of_values = sum(layer.num_kv_heads for layer in layers)
    return num_bytes + _SCALE_BYTES * (of_keys // _TOKENS_OF_A_SCALE + of_values)


class KVCacheLayout(_Frozen):
    """The paged cache of the whole model: `num_blocks` blocks of `block_size` tokens in every layer."""

    dtype: CacheDType
    block_size: int = Field(gt=0)
    num_blocks: int = Field(gt=0)
    layers: tuple[LayerCache, ...] = Field(min_length=1)

    @property
    def window(self) -> int | None:
        """Tokens that the layer with the longest view sees; None if a layer sees all."""
        windows = [layer.window for layer in self.layers]
        return max(windows) if all(windows) else None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token occupies over all layers, keys and values together."""
        return cache_bytes_per_token(self.layers, self.dtype)


class ModelInfo(_Frozen):
    """What the served model is."""

    name: str
    architecture: str
    vocab_size: int = Field(gt=0)
    num_parameters: int = Field(gt=0)
    eos_token_ids: tuple[int, ...]


class Limits(_Frozen):
    """Bounds of a step and of a sequence; all in tokens but `max_num_seqs`."""

    max_model_len: int = Field(gt=0)
    max_num_seqs: int = Field(gt=0)
    max_num_batched_tokens: int = Field(gt=0)


class DimRange(_Frozen):
    """Sizes that a dim may have, and the one that kernels are chosen for."""

    min: int
    opt: int
    max: int


class Profile(_Frozen):
    """An optimization profile of an engine: a range for each symbolic dim of the graph's inputs."""

    name: str
    dims: dict[str, DimRange]


class EngineInfo(_Frozen):
    """A serialized engine and what it runs on."""

    file: str  # relative to the manifest's folder
    size_bytes: int = Field(gt=0)
    sha256: str
    package: str  # tensorrt or tensorrt_rtx
    version: str  # of the package; no other one loads the engine
    compute_capabilities: tuple[str, ...] = Field(min_length=1)  # such as 8.9
    profiles: tuple[Profile, ...] = Field(min_length=1)


class Rank(_Frozen):
    """One rank's graph, as a file relative to the manifest's folder, and its engine if it has one."""

    onnx: str
    # The caches that the graph has, in its order, each with the KV heads that this rank keeps.
    kv_layers: tuple[LayerCache, ...] = Field(min_length=1)
    # Start and stop of the tokens whose logits the graph computes; none in stages before the last.
    logits_columns: tuple[int, int] = (0, 0)
    engine: EngineInfo | None = None


class Manifest(_Frozen):
    """A built model. `files` maps every file of the build to its size in bytes, `sha256` those that a runtime
    reads to the hash of their bytes, in hex.

    The layers are divided among `pp_size` pipeline stages, those of a stage among `tp_size` tensor-parallel
    ranks; rank pp_rank * tp_size + tp_rank is at place pp_rank * tp_size + tp_rank of `ranks`. The fake
    runtime has no ranks.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    trtforge_version: str
    build_key: str
    runtime: Runtime
    dtype: DType
    model: ModelInfo
    kv_cache: KVCacheLayout
    limits: Limits
    tp_size: int = Field(default=1, gt=0)
    pp_size: int = Field(default=1, gt=0)
    ranks: tuple[Rank, ...]
    tokenizer: str = "tokenizer"
    files: dict[str, int]
    sha256: dict[str, str] = Field(default_factory=dict)

    @property
    def stages(self) -> tuple[tuple[Rank, ...], ...]:
        """The ranks of each pipeline stage, by their tensor-parallel rank."""
        return tuple(
            self.ranks[start : start + self.tp_size] for start in range(0, len(self.ranks), self.tp_size)
        )

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.ranks or self.runtime != "fake":
            _check_ranks(self)
        return self

    def save(self, folder: Path) -> None:
        """Write `folder`/manifest.json."""
        (folder / MANIFEST_FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder`/manifest.json.

        Raises ConfigError if it is missing or was not written by this version's builder.
        """
        path = folder / MANIFEST_FILE
        try:
            return cls.model_validate_json(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: build the model with build-engine first") from None
        except ValidationError as error:
            raise ConfigError(f"{path} is not a manifest this version reads, rebuild it: {error}") from None


def _check_ranks(manifest: Manifest) -> None:
    tp, pp = manifest.tp_size, manifest.pp_size
    if len(manifest.ranks) != tp * pp:
        raise ValueError(f"{len(manifest.ranks)} ranks are not tp_size {tp} * pp_size {pp}")
    whole = list(manifest.kv_cache.layers)
    for stage in manifest.stages:
        num_layers = len(stage[0].kv_layers)
        layers, whole = whole[:num_layers], whole[num_layers:]
        for rank in stage:
            _check_layers(rank, layers)
        for layer, *parts in zip(layers, *(rank.kv_layers for rank in stage), strict=True):
            if sum(part.num_kv_heads for part in parts) < layer.num_kv_heads:
                raise ValueError(f"ranks of a stage have fewer KV heads than {layer} together")
    if whole:
        raise ValueError(f"{len(whole)} of the layers have no rank")
    *before, last = (tuple(rank.logits_columns for rank in stage) for stage in manifest.stages)
    if any(columns != (0, 0) for stage in before for columns in stage):
        raise ValueError("a stage before the last has columns of logits")
    starts, stops = zip(*last, strict=True)
    if (0, *stops) != (*starts, manifest.model.vocab_size) or list(stops) != sorted(stops):
        raise ValueError(f"columns of logits {last} do not cover {manifest.model.vocab_size} tokens in order")


def _check_layers(rank: Rank, layers: Sequence[LayerCache]) -> None:
    """`rank` keeps some KV heads of each of `layers`, which are its stage's."""
    alike = len(rank.kv_layers) == len(layers) and all(
        part.num_kv_heads <= layer.num_kv_heads
        and part == layer.model_copy(update={"num_kv_heads": part.num_kv_heads})
        for part, layer in zip(rank.kv_layers, layers, strict=True)
    )
    if not alike:
        raise ValueError(f"{rank.onnx} has caches that are not those of its stage")


def find_manifest_folder(path: Path) -> Path:
    """The folder of the one manifest in `path`: a repository, a model's folder in it, or that very folder.

    Raises ConfigError if there is none, and if there are several.
    """
    patterns = (MANIFEST_FILE, f"*/{MANIFEST_FILE}", f"*/*/{MANIFEST_FILE}")
    found = sorted({file.parent for pattern in patterns for file in path.glob(pattern)})
    if not found:
        raise ConfigError(
            f"{path} holds no build: give a repository or a model's folder that build-engine has made"
        )
    if len(found) > 1:
        names = ", ".join(str(folder.parent) for folder in found)
        raise ConfigError(f"{path} holds {len(found)} builds, give the folder of one: {names}")
    return found[0]
