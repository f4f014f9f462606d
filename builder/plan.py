"""From options and a checkpoint's config to the numbers of a build: limits and the KV cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtforge.builder.engine import EngineTarget, choose_target
from trtforge.builder.options import OPENVINO_BLOCK_SIZE, BuildOptions, KVCacheChoice
from trtforge.builder.quantization.calibration_texts import (
    calibration_texts,
    check_modelopt,
    texts_digest,
)
from trtforge.builder.quantization.policy import (
    Lowering,
    Quantization,
    check_stored_activations,
    choose_lowering,
)
from trtforge.builder.quantization.weights import ActivationScheme, QuantizedLinear
from trtforge.builder.sharding.split import Parallelism, split_heads, split_layers
from trtforge.errors import ConfigError
from trtforge.manifest import MAX_SLOTS, CacheDType, DType, KVCacheLayout, LayerCache, Limits, Runtime
from trtforge.plugins.int4_gemm.op import GROUP_SIZES

DEFAULT_KV_CACHE_BYTES = 2**30
DEFAULT_MAX_MODEL_LEN = 8192

_CACHE_DTYPES: Mapping[KVCacheChoice, CacheDType | None] = {
    "auto": None,
    "fp8": "float8_e4m3fn",
    "int8": "int8",
}


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """The options with every choice made that needs only the checkpoint's config."""

    name: str
    runtime: Runtime
    dtype: DType
    block_size: int  # tokens
    kv_cache_bytes: int | None  # None: DEFAULT_KV_CACHE_BYTES, or one sequence if that is more
    limits: Limits
    parallelism: Parallelism
    target: EngineTarget | None = None  # None: a runtime without engines
    quantization: Quantization | None = None  # None: weights stay as the checkpoint has them
    activations: ActivationScheme | None = None  # None: what is multiplied by weights is not rounded
    kv_cache_dtype: CacheDType | None = None  # None: `dtype`
    lowering: Lowering | None = None  # how the graph has quantized weights; None: there are none

    @property
    def graph_cache_dtype(self) -> CacheDType:
        """Of the graph's caches: OpenVINO has int8 by itself, and a graph as if it was `dtype`."""
        return self.dtype if self.kv_cache_dtype in (None, "int8") else self.kv_cache_dtype


def make_plan(
    options: BuildOptions,
    config: Any,
    checkpoint_dtype: DType,
    quant_method: str | None = None,
    stored: Collection[QuantizedLinear] = (),
) -> BuildPlan:
    """Fill what `options` leave open from the Hugging Face `config` and the dtype of the weights.

    `quant_method` is how weights are quantized already, if they are, and `stored` what they are.

    Raises ConfigError if the model cannot have sequences of --max-model-len tokens, for a dtype or format
    of weights that the runtime cannot compute in, for weights that would be quantized twice, for activations
    that cannot be rounded as --activations says, and if TensorRT is wanted and not there.
    """
    runtime = options.chosen_runtime
    quantization = _plan_quantization(options, quant_method)
    if quantization is None:
        _check_stored_activations(options, quant_method, stored)
    wanted = None if quantization is None else quantization.format
    is_quantized = wanted is not None or quant_method is not None
    return BuildPlan(
        name=options.name,
        runtime=runtime,
        dtype=_choose_dtype(options, checkpoint_dtype),
        block_size=options.block_size or OPENVINO_BLOCK_SIZE,
        kv_cache_bytes=options.kv_cache_bytes,
        limits=Limits(
            max_model_len=choose_max_model_len(options.max_model_len, config, options.model),
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
        ),
        parallelism=choose_parallelism(options.tp, options.pp, config),
        target=choose_engine_target(options),
        quantization=quantization,
        activations=options.activations,
        kv_cache_dtype=_CACHE_DTYPES[options.kv_cache_dtype],
        lowering=choose_lowering(runtime, wanted) if is_quantized else None,
    )


def choose_parallelism(tp: int, pp: int, config: Any) -> Parallelism:
    """The ranks that a model with the Hugging Face `config` is divided among.

    Raises ConfigError if some would have no attention head or no layer.
    """
    text_config = config.get_text_config(decoder=True)
    if tp > 1:
        split_heads(text_config.num_attention_heads, 1, tp)
    if pp > 1:
        split_layers(text_config.num_hidden_layers, pp)
    return Parallelism(tp, pp)


def choose_engine_target(options: BuildOptions) -> EngineTarget | None:
    """What builds the engine and for which GPUs; None for a runtime without engines.

    Raises ConfigError if TensorRT is wanted and not there, or cannot build for the GPUs.
    """
    if options.runtime not in ("tensorrt", "tensorrt-rtx"):
        return None
    return choose_target(
        options.runtime,
        options.gpus,
        workspace_bytes=options.workspace_bytes,
        weight_streaming=options.weight_streaming,
        fp8_option=_fp8_option(options),
    )


def _fp8_option(options: BuildOptions) -> str | None:
    """The option for which an engine has tensors of 8-bit floats that TensorRT itself has to know."""
    if options.kv_cache_dtype == "fp8":
        return "--kv-cache-dtype fp8"
    # Full TensorRT gets this project's operator, for which weights are bytes.
    return "--fp8" if options.fp8 and options.runtime == "tensorrt-rtx" else None


def _plan_quantization(options: BuildOptions, quant_method: str | None) -> Quantization | None:
    wanted = options.weight_format
    if wanted is None:
        return None
    if quant_method is not None:
        raise ConfigError(
            f"{options.model} is quantized already ({quant_method}), and --{wanted} would round its weights "
            "once more: leave the option out, or give the model that it was made from"
        )
    digest = None
    if options.reads_texts:
        check_modelopt()
        digest = texts_digest(calibration_texts(options.calibration_text))
    return Quantization(wanted, options.group_size or max(GROUP_SIZES), options.exclude, digest)


def _check_stored_activations(
    options: BuildOptions, quant_method: str | None, stored: Collection[QuantizedLinear]
) -> None:
    if options.activations is None:
        return
    if quant_method is None:
        raise ConfigError(
            f"--activations {options.activations} rounds to the format of weights, which {options.model} has "
            "in floats: give --fp8 or --int8 too"
        )
    check_stored_activations(options.chosen_runtime, options.activations, stored)


def choose_max_model_len(wanted: int | None, config: Any, model: str) -> int:
    """Tokens of the longest sequence: `wanted`, or what the config of `model` allows, up to a default.

    Raises ConfigError if the model cannot have such sequences.
    """
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        if longest is None:
            raise ConfigError(
                f"the config of {model} has no max_position_embeddings: say the longest sequence "
                "with --max-model-len"
            )
        return min(longest, DEFAULT_MAX_MODEL_LEN)
    if longest is not None and wanted > longest:
        raise ConfigError(
            f"--max-model-len {wanted} is more than {model} was made for: its config's "
            f"max_position_embeddings is {longest}"
        )
    return wanted


def _choose_dtype(options: BuildOptions, checkpoint_dtype: DType) -> DType:
    """OpenVINO's CPU plugin computes wrong results in float16: nothing may end up there."""
    if options.runtime in ("reference", "tensorrt", "tensorrt-rtx"):
        return checkpoint_dtype if options.dtype == "auto" else options.dtype
    if options.dtype == "float16":
        raise ConfigError(
            "--dtype float16 is computed wrongly by openvino on a CPU: use --dtype bfloat16, or float32"
        )
    if options.dtype != "auto":
        return options.dtype
    return "bfloat16" if checkpoint_dtype == "float16" else checkpoint_dtype


def plan_kv_cache(plan: BuildPlan, layers: Sequence[LayerCache]) -> KVCacheLayout:
    """As many blocks as the budget holds.

    Raises ConfigError if they cannot hold one sequence of max_model_len tokens, or if there are more of
    them than slot numbers.
    """
    one_block = KVCacheLayout(
        dtype=plan.kv_cache_dtype or plan.dtype,
        block_size=plan.block_size,
        num_blocks=1,
        layers=tuple(layers),
    )
    block_bytes = one_block.bytes_per_token * plan.block_size
    needed_blocks = blocks_per_sequence(plan.limits.max_model_len, plan.block_size)
    if plan.kv_cache_bytes is None:
        num_blocks = max(needed_blocks, DEFAULT_KV_CACHE_BYTES // block_bytes)
    else:
        num_blocks = plan.kv_cache_bytes // block_bytes
    if num_blocks < needed_blocks:
        raise ConfigError(
            f"--kv-cache-bytes {plan.kv_cache_bytes} cannot hold one sequence of {plan.limits.max_model_len} "
            f"tokens, which needs {needed_blocks * block_bytes} bytes: "
            + (
                f"give that much, or --max-model-len {num_blocks * plan.block_size} at most"
                if num_blocks
                else f"give that much (one block of {plan.block_size} tokens alone is {block_bytes} bytes)"
            )
        )
    if num_blocks * plan.block_size > MAX_SLOTS:
        raise ConfigError(
            f"--kv-cache-bytes {plan.kv_cache_bytes} makes {num_blocks} blocks of {plan.block_size} tokens, "
            "more than slot numbers of 32 bits reach: give at most "
            f"{MAX_SLOTS // plan.block_size * block_bytes}"
        )
    return one_block.model_copy(update={"num_blocks": num_blocks})


def blocks_per_sequence(num_tokens: int, block_size: int) -> int:
    """Blocks that one sequence of `num_tokens` occupies."""
    return -(-num_tokens // block_size)
