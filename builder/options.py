"""What `build-engine` is asked for: options, checked before any work is done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from trtforge.builder.engine_cache import default_cache_folder
from trtforge.builder.quantization.policy import check_activations
from trtforge.builder.quantization.weights import ActivationScheme, QuantizedFormat
from trtforge.builder.repository import check_model_name
from trtforge.errors import ConfigError
from trtforge.manifest import Runtime
from trtforge.plugins.int4_gemm.op import GROUP_SIZES

RuntimeChoice = Literal["auto", "openvino", "reference", "tensorrt", "tensorrt-rtx"]
DTypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
CalibrationChoice = Literal["awq"]
KVCacheChoice = Literal["auto", "fp8", "int8"]

# OpenVINO's paged attention on CPU has this block size compiled in.
OPENVINO_BLOCK_SIZE = 32

# Why runtimes have no such KV cache.
_NO_KV_CACHE: Mapping[KVCacheChoice, Mapping[str, str]] = {
    "fp8": {
        "openvino": "OpenVINO has none of 8-bit floats",
        # Only layers that round and widen: each would do so to the whole cache in every step.
        "tensorrt-rtx": "TensorRT-RTX has no layer that reads or writes parts of a tensor of 8-bit floats",
    },
    "int8": dict.fromkeys(("reference", "tensorrt", "tensorrt-rtx"), "it is OpenVINO's own"),
}

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+)\s*([A-Z]*)")
_GPU = re.compile(r"sm_\d+\d")
_NO_CACHE = "none"


def parse_bytes(text: str, option: str) -> int:
    """Bytes of "512MiB", "2GiB" or a plain number. Raises ConfigError that names the option."""
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(
            f"{option} {text!r} is not a size: use a whole number of bytes, or one with KiB, MiB, "
            "GiB or TiB, such as 512MiB"
        )
    return int(match[1]) * _UNITS[match[2]]


def parse_cache_folder(text: str | None) -> Path | None:
    """The folder of --engine-cache: None for "none", the user's own one without the option."""
    if text is None:
        return default_cache_folder()
    return None if text == _NO_CACHE else Path(text).expanduser().resolve()


class BuildOptions(BaseModel):
    """Everything `build-engine` takes; None means that the builder chooses.

    Raises ConfigError for values that cannot work whatever the model is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str  # local Hugging Face folder, GGUF file or hub id
    output: Path  # the Triton model repository
    name: str = "llm"
    runtime: RuntimeChoice = "auto"
    dtype: DTypeChoice = "auto"
    tp: int = 1
    pp: int = 1
    fp8: bool = False
    int4: bool = False
    int8: bool = False
    group_size: int | None = None  # of int4: input features that share a scale, at most
    exclude: tuple[str, ...] = ()  # patterns of weights that are not quantized
    activations: ActivationScheme | None = None  # None: what is multiplied by weights is not rounded
    calibrate: CalibrationChoice | None = None  # None: int4 is rounded without data
    calibration_text: Path | None = None  # a file, a text a line; None: texts of the builder's own
    max_model_len: int | None = None  # tokens
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int | None = None  # tokens
    kv_cache_bytes: int | None = None
    kv_cache_dtype: KVCacheChoice = "auto"  # auto: the build's dtype
    gpus: tuple[str, ...] = ()  # such as sm_89; none: all that the runtime can build for
    engine_cache: Path | None = Field(default_factory=default_cache_folder)  # None: engines are not kept
    workspace_bytes: int | None = None
    weight_streaming: bool = False
    force: bool = False

    @property
    def weight_format(self) -> QuantizedFormat | None:
        """What weights are rounded to; None: they are not."""
        formats: tuple[QuantizedFormat, ...] = ("int4", "fp8", "int8")
        return next((name for name in formats if getattr(self, name)), None)

    @property
    def chosen_runtime(self) -> Runtime:
        """What executes the model."""
        return "openvino" if self.runtime == "auto" else self.runtime

    @property
    def reads_texts(self) -> bool:
        """Whether scales are looked for by what the model reads."""
        is_static = self.activations == "static" and self.weight_format is not None
        return is_static or self.calibrate is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_model_name(self.name)
        check_positive(_counts(self))
        _check_engine_options(self)
        _check_quantization(self)
        _check_kv_cache(self)
        if self.runtime in ("auto", "openvino") and self.block_size not in (None, OPENVINO_BLOCK_SIZE):
            raise ConfigError(
                f"--block-size {self.block_size} cannot work with openvino, whose paged attention "
                f"has blocks of {OPENVINO_BLOCK_SIZE} tokens: leave the option out"
            )
        return self


def _check_kv_cache(options: BuildOptions) -> None:
    runtime = "openvino" if options.runtime == "auto" else options.runtime
    reasons = _NO_KV_CACHE.get(options.kv_cache_dtype, {})
    if runtime in reasons:
        others = [name for name in get_args(RuntimeChoice) if name != "auto" and name not in reasons]
        raise ConfigError(
            f"--kv-cache-dtype {options.kv_cache_dtype} is no KV cache of --runtime {runtime}: "
            f"{reasons[runtime]}; leave the option out, or use --runtime {' or '.join(others)}"
        )


def check_positive(counts: Mapping[str, int | None]) -> None:
    """Raise ConfigError for an option whose number is given and below one."""
    for option, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{option} {count} is not allowed: it has to be at least 1")


def _counts(options: BuildOptions) -> dict[str, int | None]:
    return {
        "--tp": options.tp,
        "--pp": options.pp,
        "--max-model-len": options.max_model_len,
        "--max-num-seqs": options.max_num_seqs,
        "--max-num-batched-tokens": options.max_num_batched_tokens,
        "--block-size": options.block_size,
        "--kv-cache-bytes": options.kv_cache_bytes,
        "--workspace-bytes": options.workspace_bytes,
    }


def _check_engine_options(options: BuildOptions) -> None:
    for gpu in options.gpus:
        if not _GPU.fullmatch(gpu):
            raise ConfigError(f"--gpu {gpu!r} is not a compute capability: write it as sm_89 or sm_120")
    if options.runtime in ("tensorrt", "tensorrt-rtx"):
        return
    wanted = {
        "--gpu": options.gpus,
        "--workspace-bytes": options.workspace_bytes,
        "--weight-streaming": options.weight_streaming,
    }
    for option, value in wanted.items():
        if value:
            raise ConfigError(f"{option} is for TensorRT's engines: give --runtime tensorrt-rtx or tensorrt")


def _check_quantization(options: BuildOptions) -> None:
    formats = [name for name in ("int4", "fp8", "int8") if getattr(options, name)]
    if len(formats) > 1:
        raise ConfigError(
            f"{' and '.join(f'--{name}' for name in formats)} are formats of the same weights: give "
            "one of them"
        )
    if options.exclude and not formats:
        raise ConfigError("--exclude says what --int4, --fp8 or --int8 leaves as it is: give one of them too")
    if options.calibrate is not None and not options.int4:
        raise ConfigError(f"--calibrate {options.calibrate} makes weights of four bits: give --int4 too")
    if options.activations is not None and options.int4:
        raise ConfigError(
            "--activations rounds to the format of the weights, and nothing multiplies four bits: give --fp8 "
            "or --int8"
        )
    if options.activations is not None and options.weight_format is not None:
        check_activations(options.chosen_runtime, options.weight_format, options.activations)
    if options.calibration_text is not None and not options.reads_texts:
        raise ConfigError(
            "--calibration-text is what --calibrate awq reads, and --activations static with --fp8 or "
            "--int8: give one of them too"
        )
    if options.group_size is None:
        return
    if not options.int4:
        raise ConfigError("--group-size is for the scales of --int4: give that too")
    if options.group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ConfigError(f"--group-size {options.group_size} is not allowed: it is one of {sizes}")
