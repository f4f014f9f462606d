"""Quantized checkpoints, made as their formats are published, and what their numbers stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = Mapping[str, torch.Tensor]

GROUP = 32
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Stored:
    """What a layer of a format holds in place of `weight`, and the weight that it stands for."""

    tensors: Tensors
    meaning: torch.Tensor


def pack_words(values: np.ndarray) -> np.ndarray:
    """[rows, 8 * n] of 0 to 15 -> int32 [rows, n], the first value in the lowest bits."""
    nibbles = values.reshape(len(values), -1, 8).astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))
    return nibbles.sum(2).astype(np.uint32).view(np.int32)


def to_codes(weight: np.ndarray, g_idx: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0 to 15 of `weight` [out, in], and scales [out, groups]: any that are not far off will do."""
    num_groups = g_idx.max() + 1
    scales = np.stack([np.abs(weight[:, g_idx == group]).max(1) / 6 for group in range(num_groups)], 1)
    scales = scales.astype(np.float16)
    codes = np.round(weight / scales[:, g_idx]) + zeros[:, g_idx]
    return np.clip(codes, 0, 15).astype(np.uint8), scales


def some_zeros(shape: tuple[int, int]) -> np.ndarray:
    return RNG.integers(6, 10, shape).astype(np.uint8)


def meaning(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, g_idx: np.ndarray) -> torch.Tensor:
    wide = (codes.astype(np.float32) - zeros[:, g_idx]) * scales.astype(np.float32)[:, g_idx]
    return torch.from_numpy(wide)


def gptq(weight: np.ndarray, act_order: bool = False) -> Stored:
    out_features, in_features = weight.shape
    g_idx = np.arange(in_features) // GROUP
    if act_order:
        g_idx = RNG.permutation(g_idx)
    zeros = some_zeros((out_features, in_features // GROUP))
    codes, scales = to_codes(weight, g_idx, zeros)
    tensors = {
        "qweight": pack_words(codes).T,  # eight inputs a word
        "qzeros": pack_words(zeros.T - 1),
        "scales": scales.T,
        "g_idx": g_idx.astype(np.int32),
    }
    return Stored(as_torch(tensors), meaning(codes, scales, zeros, g_idx))


def awq(weight: np.ndarray) -> Stored:
    out_features, in_features = weight.shape
    g_idx = np.arange(in_features) // GROUP
    zeros = some_zeros((out_features, in_features // GROUP))
    codes, scales = to_codes(weight, g_idx, zeros)

    def pack(values: np.ndarray) -> np.ndarray:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return pack_words(values.reshape(len(values), -1, 8)[:, :, order].reshape(values.shape))

    tensors = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales.T}
    return Stored(as_torch(tensors), meaning(codes, scales, zeros, g_idx))


def pack_quantized(weight: np.ndarray) -> Stored:
    out_features, in_features = weight.shape
    g_idx = np.arange(in_features) // GROUP
    zeros = np.full((out_features, in_features // GROUP), 8, np.uint8)
    codes, scales = to_codes(weight, g_idx, zeros)
    tensors = {
        "weight_packed": pack_words(codes),
        "weight_scale": scales,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    return Stored(as_torch(tensors), meaning(codes, scales, zeros, g_idx))


def modelopt_awq(weight: np.ndarray) -> Stored:
    out_features, in_features = weight.shape
    input_scale = RNG.uniform(0.5, 2, in_features).astype(np.float32)
    g_idx = np.arange(in_features) // GROUP
    zeros = np.full((out_features, in_features // GROUP), 8, np.uint8)
    codes, scales = to_codes(weight / input_scale, g_idx, zeros)
    signed = codes ^ 8
    tensors = {
        "weight": signed[::2] | (signed[1::2] << 4),
        "weight_scale": scales,
        "pre_quant_scale": input_scale,
    }
    return Stored(as_torch(tensors), meaning(codes, scales, zeros, g_idx) * torch.from_numpy(input_scale))


def as_torch(arrays: Mapping[str, np.ndarray]) -> Tensors:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def fp8(weight: np.ndarray, scale: torch.Tensor, part: str, **others: torch.Tensor) -> Stored:
    """`scale` has dims that broadcast to the weight's, or are those of blocks."""
    wide = torch.from_numpy(weight)
    by_element = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    if by_element.shape[1] > 1:
        by_element = by_element.repeat_interleave(128, 0).repeat_interleave(128, 1)
        by_element = by_element[: weight.shape[0], : weight.shape[1]]
    rounded = (wide / by_element).to(torch.float8_e4m3fn)
    return Stored({"weight": rounded, part: scale, **others}, rounded.float() * by_element)


def fp8_tensor(weight: np.ndarray) -> Stored:
    return fp8(weight, torch.tensor(0.01), "weight_scale", input_scale=torch.tensor(0.5))


def fp8_transformers(weight: np.ndarray) -> Stored:
    return fp8(weight, torch.tensor(0.01), "weight_scale", activation_scale=torch.tensor(0.5))


def fp8_channel(weight: np.ndarray) -> Stored:
    return fp8(weight, torch.rand(len(weight), 1) * 0.01 + 0.005, "weight_scale")


def fp8_block(weight: np.ndarray) -> Stored:
    blocks = [-(-size // 128) for size in weight.shape]
    return fp8(weight, torch.rand(*blocks) * 0.01 + 0.005, "weight_scale_inv")


def int8_channel(weight: np.ndarray) -> Stored:
    scale = torch.rand(len(weight), 1) * 0.01 + 0.01
    rounded = (torch.from_numpy(weight) / scale).round().clamp(-127, 127).to(torch.int8)
    return Stored({"weight": rounded, "weight_scale": scale}, rounded.float() * scale)


def bitsandbytes_int8(weight: np.ndarray) -> Stored:
    largest = np.abs(weight).max(1)
    rounded = np.round(weight / largest[:, None] * 127).astype(np.int8)
    tensors = {"weight": rounded, "SCB": largest, "weight_format": np.array(0, np.uint8)}
    return Stored(as_torch(tensors), torch.from_numpy(rounded * (largest[:, None] / 127)))


def bitsandbytes_nf4(weight: np.ndarray, nested: bool = True) -> Stored:
    """Blocks of 64 over all rows; their largest numbers are stored, or bytes that stand for them."""
    table = np.sort(RNG.uniform(-1, 1, 16)).astype(np.float32)
    largest = np.abs(weight.reshape(-1, 64)).max(1)
    state = {"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape), "dtype": "float32"}
    tensors = {"weight.absmax": largest}
    if nested:
        bytes_table = np.sort(RNG.uniform(-1, 1, 256)).astype(np.float32)
        offset = largest.mean()
        blocks = np.array_split(largest - offset, range(32, len(largest), 32))
        scales = np.array([np.abs(block).max() for block in blocks], np.float32)
        scaled = np.concatenate([block / scale for block, scale in zip(blocks, scales, strict=True)])
        codes = np.abs(scaled[:, None] - bytes_table).argmin(1)
        largest = bytes_table[codes] * np.repeat(scales, 32)[: len(codes)] + offset
        state |= {"nested_blocksize": 32, "nested_offset": float(offset), "nested_dtype": "float32"}
        tensors = {
            "weight.absmax": codes.astype(np.uint8),
            "weight.nested_absmax": scales,
            "weight.nested_quant_map": bytes_table,
        }
    codes = np.abs(weight.reshape(-1, 64)[..., None] / largest[:, None, None] - table).argmin(2)
    meaning = (table[codes] * largest[:, None]).reshape(weight.shape).astype(np.float32)
    flat = codes.reshape(-1).astype(np.uint8)
    tensors |= {
        "weight": (flat[::2] << 4 | flat[1::2])[:, None],
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8).copy(),
    }
    return Stored(as_torch(tensors), torch.from_numpy(meaning))


def compressed(layout: str, **weights: object) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    method = {"quant_method": "compressed-tensors", "format": layout}
    return {**method, "config_groups": groups, "ignore": ["lm_head"]}


# name: (quantization_config, how a projection is stored, what it becomes)
FORMATS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], Stored], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}, gptq, "int4"),
    "gptq-act-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
        lambda weight: gptq(weight, act_order=True),
        "int4",
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq, "int4"),
    "compressed-int4": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
        pack_quantized,
        "int4",
    ),
    "compressed-fp8": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        fp8_channel,
        "fp8",
    ),
    "compressed-int8": (
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        int8_channel,
        "int8",
    ),
    "modelopt-fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor, "fp8"),
    "modelopt-awq": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, modelopt_awq, "int4"),
    "bitsandbytes-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_int8, "int8"),
    "deepseek-fp8": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        fp8_block,
        "fp8",
    ),
}


def quantize(
    model: Path, folder: Path, settings: Mapping[str, Any], store: Callable[[np.ndarray], Stored]
) -> Tensors:
    """Make `folder` the model with all projections of its layers quantized; returns what they stand for."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stored = store(tensors.pop(name).numpy())
        weights[name] = stored.meaning
        prefix = name.removesuffix(".weight")
        tensors |= {f"{prefix}.{part}": tensor for part, tensor in stored.tensors.items()}
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=settings)
    return weights


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
