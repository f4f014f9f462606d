"""Projections of checkpoints that are quantized already, in the layouts in which they are published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from trtforge.builder.quantization import bitsandbytes
from trtforge.builder.quantization.checkpoint_activations import (
    X_SCALE_PARTS,
    of_compressed_tensors,
    of_fp8,
    of_modelopt,
)
from trtforge.builder.quantization.checkpoint_module import Module, Tensors
from trtforge.builder.quantization.weights import (
    ComputedWeight,
    Fp8Weight,
    Int8Weight,
    QuantizedLinear,
    ScaleKind,
)
from trtforge.errors import ExportError, PluginError
from trtforge.plugins.fp8_gemm.op import SCALE_BLOCK
from trtforge.plugins.int4_gemm import formats
from trtforge.plugins.int4_gemm.op import group_size
from trtforge.plugins.int4_gemm.packing import Int4Weight
from trtforge.plugins.op import Array

Config = Mapping[str, Any]

_PARTS_OF_QUANTIZED = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "weight_g_idx",
    "pre_quant_scale",
    *X_SCALE_PARTS,
    *bitsandbytes.PARTS,
)
# Scales of a quantized KV cache.
_CACHE_SCALES = (".k_scale", ".v_scale", ".k_proj.output_scale", ".v_proj.output_scale")


@dataclass(frozen=True, slots=True)
class QuantizedTensors:
    """A quantized checkpoint's tensors: its quantized weights by name, scales of a KV cache of e4m3, and all
    others that are not part of a quantized weight."""

    linears: Mapping[str, QuantizedLinear | ComputedWeight]
    cache_scales: Tensors
    rest: Tensors


def find_quantized(method: str, config: Config, tensors: Tensors) -> QuantizedTensors:
    """Find the weights that are quantized by `method`, as a checkpoint's quantization_config names it.

    No weight is read. Raises ExportError for a method, a variant of it or sizes that cannot be imported.
    """
    reader = _READERS.get(method)
    if reader is None:
        raise ExportError(
            f"the checkpoint is quantized ({method}), which is not supported; supported are "
            f"{', '.join(_READERS)}, and models in float32, bfloat16 or float16"
        )
    linears: dict[str, QuantizedLinear | ComputedWeight] = {}
    for prefix in _prefixes(tensors):
        module = Module(prefix, method, tensors)
        try:
            linear = reader(module, config)
        except PluginError as error:
            raise ExportError(f"{prefix}: {error}") from error
        if linear is not None:
            linears[f"{prefix}.weight"] = linear
    if not linears:
        raise ExportError(f"the checkpoint says that it is quantized ({method}), but has no such weights")
    parts = {f"{name.rpartition('.')[0]}.{part}" for name in linears for part in _PARTS_OF_QUANTIZED}
    others = {name: entry for name, entry in tensors.items() if name not in parts}
    scales = {name: entry for name, entry in others.items() if name.endswith(_CACHE_SCALES)}
    rest = {name: entry for name, entry in others.items() if name not in scales}
    return QuantizedTensors(linears, scales if _has_e4m3_cache(config) else {}, rest)


def _has_e4m3_cache(config: Config) -> bool:
    """Whether scales of the cache are those of e4m3, as far as the checkpoint says what they are of."""
    scheme = config.get("kv_cache_scheme") or {"type": "float", "num_bits": 8}
    is_e4m3 = (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    return is_e4m3 and config.get("kv_cache_quant_algo") in (None, "FP8")


def _prefixes(tensors: Tensors) -> Iterator[str]:
    """Names of modules that have a weight, quantized or not."""
    for name in tensors:
        prefix, _, part = name.rpartition(".")
        if part in ("qweight", "weight", "weight_packed"):
            yield prefix


def _int4(
    module: Module,
    in_features: int,
    out_features: int,
    num_groups: int,
    read: Callable[[], Int4Weight],
    perm: bool,
) -> QuantizedLinear:
    size = group_size(in_features, num_groups)
    source = f"from the checkpoint ({module.method})"
    return QuantizedLinear("int4", (out_features, in_features), source, read, size, has_perm=perm)


# --------------------------------------------------------------------------- GPTQ, AWQ


def _gptq(module: Module, config: Config) -> QuantizedLinear | None:
    if module.get("qweight") is None:
        return None
    if config.get("bits") != 4:
        raise module.refuse(f"with {config.get('bits')} bits")
    version = config.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise module.refuse(f"in the format {version!r}")
    words, out_features = module.need("qweight").shape
    num_groups = module.need("scales").shape[0]

    def read() -> Int4Weight:
        return formats.read_gptq(
            module.read("qweight"),
            module.read("qzeros"),
            module.read("scales"),
            module.read_if_there("g_idx"),
            zeros_minus_one=version == "gptq",
        )

    perm = _is_reordered(module.read_if_there("g_idx"))
    return _int4(module, 8 * words, out_features, num_groups, read, perm)


def _is_reordered(g_idx: Array | None) -> bool:
    return g_idx is not None and bool((np.diff(g_idx) < 0).any())


def _awq(module: Module, config: Config) -> QuantizedLinear | None:
    if module.get("qweight") is None:
        return None
    if config.get("bits") != 4:
        raise module.refuse(f"with {config.get('bits')} bits")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise module.refuse(f"in the version {version!r}")
    in_features, words = module.need("qweight").shape
    num_groups = module.need("scales").shape[0]

    def read() -> Int4Weight:
        return formats.read_awq(module.read("qweight"), module.read("qzeros"), module.read("scales"))

    return _int4(module, in_features, 8 * words, num_groups, read, perm=False)


# --------------------------------------------------------------------------- compressed-tensors, ModelOpt


def _compressed_tensors(module: Module, config: Config) -> QuantizedLinear | None:
    layout = config.get("format")
    if layout not in ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized"):
        raise module.refuse(f"in the format {layout!r}")
    bits = {group["weights"]["num_bits"] for group in (config.get("config_groups") or {}).values()}
    if module.get("weight_packed") is not None:
        if bits != {4}:
            raise module.refuse(f"packed with {', '.join(map(str, sorted(bits)))} bits")
        return _packed(module)
    return of_compressed_tensors(_bytes_with_scale(module, "weight_scale"), module, config)


def _packed(module: Module) -> QuantizedLinear:
    out_features, words = module.need("weight_packed").shape
    scale_shape = module.need("weight_scale").shape

    def read() -> Int4Weight:
        return formats.read_compressed_tensors(
            module.read("weight_packed"),
            module.read("weight_scale"),
            module.read_if_there("weight_zero_point"),
            module.read_if_there("weight_g_idx"),
        )

    perm = _is_reordered(module.read_if_there("weight_g_idx"))
    return _int4(module, 8 * words, out_features, scale_shape[1], read, perm)


def _modelopt(module: Module, config: Config) -> QuantizedLinear | None:
    algorithm = str(config.get("quant_algo"))
    if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W4A16", "W4A16_AWQ"):
        raise module.refuse(f"by {algorithm}")
    weight, scale = module.get("weight"), module.get("weight_scale")
    if weight is None or weight.dtype != "U8" or scale is None:
        return of_modelopt(_bytes_with_scale(module, "weight_scale"), module, config)
    half, in_features = weight.shape

    def read() -> Int4Weight:
        return formats.read_modelopt(module.read("weight"), module.read("weight_scale"))

    linear = _int4(module, in_features, 2 * half, scale.shape[1], read, perm=False)
    if module.get("pre_quant_scale") is None:
        return linear
    return replace(linear, read_input_scale=lambda: module.read("pre_quant_scale").astype(np.float32))


# --------------------------------------------------------------------------- bytes


def _fp8(module: Module, config: Config) -> QuantizedLinear | None:
    """Blocks with `weight_scale_inv` as DeepSeek-V3 (arXiv 2412.19437) has them, or `weight_scale`."""
    if config.get("fmt", "e4m3") != "e4m3":
        raise module.refuse(f"in {config['fmt']}")
    blocks = config.get("weight_block_size")
    if blocks is not None and list(blocks) != [SCALE_BLOCK, SCALE_BLOCK]:
        raise module.refuse(f"in blocks of {blocks}")
    linear = _bytes_with_scale(module, "weight_scale_inv" if blocks else "weight_scale")
    return of_fp8(linear, module, config)


def _bytes_with_scale(module: Module, scale_part: str) -> QuantizedLinear | None:
    """A weight of e4m3 or signed bytes; None for one of another type."""
    weight = module.need("weight")
    if weight.dtype not in ("F8_E4M3", "I8"):
        return None
    if module.get("weight_zero_point") is not None:
        raise module.refuse("with zero points of bytes")
    out_features, in_features = weight.shape
    kind = _scale_kind(module, scale_part, out_features, in_features)
    source = f"from the checkpoint ({module.method})"

    def scale() -> Array:
        values = module.read(scale_part).astype(np.float32)
        return values if kind == "block" else values.reshape(-1, 1)

    if weight.dtype == "F8_E4M3":
        return QuantizedLinear(
            "fp8",
            (out_features, in_features),
            source,
            lambda: Fp8Weight(module.read("weight").view(ml_dtypes.float8_e4m3fn), scale(), kind),
            scales=kind,
        )
    if kind == "block":
        raise module.refuse("with integers in blocks")
    return QuantizedLinear(
        "int8",
        (out_features, in_features),
        source,
        lambda: Int8Weight(
            module.read("weight"), np.ascontiguousarray(np.broadcast_to(scale(), (out_features, 1)))
        ),
    )


def _scale_kind(module: Module, part: str, out_features: int, in_features: int) -> ScaleKind:
    shape = module.need(part).shape
    if int(np.prod(shape)) == 1:
        return "tensor"
    if shape in ((out_features,), (out_features, 1)):
        return "channel"
    if shape == (-(-out_features // SCALE_BLOCK), -(-in_features // SCALE_BLOCK)):
        return "block"
    raise module.refuse(f"with scales of shape {list(shape)} for a weight of [{out_features}, {in_features}]")


_Reader = Callable[[Module, Config], QuantizedLinear | ComputedWeight | None]
_READERS: Mapping[str, _Reader] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "fp8": _fp8,
    "bitsandbytes": bitsandbytes.read_module,
}
