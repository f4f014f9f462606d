"""A Hugging Face checkpoint as one packed, paged ONNX graph with its weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from trtforge.builder.checkpoint import Checkpoint, read_json
from trtforge.builder.checkpoint_weights import locate_weights
from trtforge.builder.experts import is_experts
from trtforge.builder.meta_model import build_meta_model
from trtforge.builder.optimize import optimize
from trtforge.builder.quantization.cache_scales import attach_cache_scales
from trtforge.builder.quantization.experts import in_axis
from trtforge.builder.quantization.lowering import quantize_weights
from trtforge.builder.quantization.policy import (
    Calibration,
    Lowering,
    Quantization,
    WeightChoice,
    WeightPolicy,
    check_exclusions,
    check_projections,
)
from trtforge.builder.quantization.units import feature_multiples
from trtforge.builder.quantization.weights import ActivationScheme
from trtforge.builder.sharding.shard import RankPart, shard
from trtforge.builder.sharding.split import Parallelism
from trtforge.builder.trace import WEIGHT_PREFIX, trace
from trtforge.builder.weights import (
    WeightSource,
    attach_weights,
    detach_weights,
    is_weight,
)
from trtforge.builder.weights_file import write_weights
from trtforge.manifest import CacheDType, DType, LayerCache
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION

ONNX_FILE = "model.onnx"
WEIGHTS_FILE = "model.safetensors"
_EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """The graph of a rank and what a build has to know about it and about the whole model. Weights are read
    from the checkpoint's files."""

    model: ir.Model
    layers: tuple[LayerCache, ...]  # with the KV heads that this rank has
    num_heads: int  # of queries, in the layer with the most of them
    logits_columns: tuple[int, int]  # tokens whose logits the graph computes; (0, 0): it has no logits
    vocab_size: int
    num_parameters: int
    weight_bytes: int
    num_nodes: int
    architecture: str
    eos_token_ids: tuple[int, ...]
    weights: tuple[WeightChoice, ...]  # of two dims or more, if any is quantized


@dataclass(frozen=True, slots=True)
class ExportedRanks:
    """The graphs of all ranks, ordered by stage and then within it, and the caches of the whole model."""

    ranks: tuple[ExportedModel, ...]
    layers: tuple[LayerCache, ...]


def export_model(
    checkpoint: Checkpoint,
    dtype: DType,
    *,
    cache_dtype: CacheDType | None = None,
    quantization: Quantization | None = None,
    lowering: Lowering | None = None,
    activations: ActivationScheme | None = None,
    calibration: Calibration | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> ExportedModel:
    """The whole model for one rank; see `export_ranks`."""
    exported = export_ranks(
        checkpoint,
        dtype,
        Parallelism(),
        cache_dtype=cache_dtype,
        quantization=quantization,
        lowering=lowering,
        activations=activations,
        calibration=calibration,
        on_stage=on_stage,
    )
    return exported.ranks[0]


def export_ranks(
    checkpoint: Checkpoint,
    dtype: DType,
    parallelism: Parallelism,
    *,
    cache_dtype: CacheDType | None = None,
    quantization: Quantization | None = None,
    lowering: Lowering | None = None,
    activations: ActivationScheme | None = None,
    calibration: Calibration | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> ExportedRanks:
    """Trace the model in `dtype`, divide it, and attach the checkpoint's weights, rounded as `quantization`
    says.

    `cache_dtype` is that of keys and values as they are stored; None: `dtype`. `lowering` is how projections
    with quantized weights are expressed; None if there are none. With `activations` their inputs are rounded
    too. `calibration` is of projections that `quantization` rounds. Peak memory does not depend on the
    model's size: tracing happens on the meta device. `on_stage` is told what begins.

    Raises ExportError, naming the reason, for a model that cannot be expressed or divided, and ConfigError
    for a quantization that cannot be applied to it and for more ranks than it has parts.
    """
    stage = on_stage or (lambda _: None)
    traced = trace_checkpoint(checkpoint, dtype, stage, quantization, cache_dtype)
    stage("divide")
    return divide(traced, parallelism, quantization, lowering, activations, calibration)


@dataclass(frozen=True, slots=True)
class TracedModel:
    """The graph of a whole model as it was traced, whose weights are the checkpoint's."""

    model: ir.Model
    sources: Mapping[str, WeightSource]  # by the name that is stored
    layers: tuple[LayerCache, ...]
    output_embedding: str  # the name of the weight that makes logits
    vocab_size: int
    num_parameters: int
    architecture: str
    eos_token_ids: tuple[int, ...]


def trace_checkpoint(
    checkpoint: Checkpoint,
    dtype: DType,
    on_stage: Callable[[str], None],
    quantization: Quantization | None = None,
    cache_dtype: CacheDType | None = None,
) -> TracedModel:
    """Trace the model in `dtype`, with caches of `cache_dtype` or else of `dtype`.

    Raises ExportError, naming the reason, if it cannot be expressed, and ConfigError for a `quantization`
    that cannot be applied to it.
    """
    on_stage("model")
    hf = build_meta_model(checkpoint.config, getattr(torch, dtype))
    sources = locate_weights(hf, checkpoint)
    if quantization is not None:
        # Before the trace, which takes minutes with a large model.
        check_exclusions([source.name for source in sources.values()], quantization.exclude)
        check_projections(_in_features(hf, sources), quantization)
    model, layers = trace(hf, getattr(torch, cache_dtype or dtype), on_stage)
    on_stage("optimize")
    weights = detach_weights(model.graph)
    optimize(model)
    attach_weights(model.graph, weights, sources, WEIGHT_PREFIX)
    if cache_dtype == "float8_e4m3fn":
        attach_cache_scales(model.graph, checkpoint.cache_scales)
    parameters = {id(parameter): parameter.numel() for parameter in hf.parameters()}
    return TracedModel(
        model=model,
        sources={source.name: source for source in sources.values()},
        layers=layers,
        output_embedding=_output_embedding(hf, sources),
        vocab_size=int(model.graph.outputs[0].shape[1]),
        num_parameters=sum(parameters.values()),
        architecture=type(hf).__name__,
        eos_token_ids=_eos_token_ids(checkpoint),
    )


def divide(
    traced: TracedModel,
    parallelism: Parallelism,
    quantization: Quantization | None = None,
    lowering: Lowering | None = None,
    activations: ActivationScheme | None = None,
    calibration: Calibration | None = None,
) -> ExportedRanks:
    """The graphs of ranks, with quantized weights as `export_ranks` says. `traced` stays as it is.

    Raises as `export_ranks` does.
    """
    multiples = functools.partial(feature_multiples, traced.sources, quantization)
    parts = shard(traced.model, traced.layers, traced.sources, parallelism, multiples)
    finished = (_finish(traced, part, quantization, lowering, activations, calibration) for part in parts)
    return ExportedRanks(tuple(finished), traced.layers)


def _finish(
    traced: TracedModel,
    part: RankPart,
    quantization: Quantization | None,
    lowering: Lowering | None,
    activations: ActivationScheme | None,
    calibration: Calibration | None,
) -> ExportedModel:
    graph = part.model.graph
    choices: tuple[WeightChoice, ...] = ()
    if lowering is not None:
        choices = quantize_weights(
            graph,
            part.sources,
            WeightPolicy(lowering, quantization, activations, calibration or Calibration()),
            traced.output_embedding,
        )
    return ExportedModel(
        model=part.model,
        layers=part.layers,
        num_heads=_num_heads(graph),
        logits_columns=part.logits_columns,
        vocab_size=traced.vocab_size,
        num_parameters=traced.num_parameters,
        weight_bytes=sum(value.const_value.nbytes for value in graph.initializers.values()),
        num_nodes=len(graph),
        architecture=traced.architecture,
        eos_token_ids=traced.eos_token_ids,
        weights=choices,
    )


def _num_heads(graph: ir.Graph) -> int:
    attention = (node for node in graph if node.op_type == PAGED_ATTENTION.name)
    return max(int(node.inputs[0].shape[1]) for node in attention)


def _in_features(hf: Any, sources: Mapping[str, WeightSource]) -> dict[str, int]:
    """Columns of each projection's weight, those of experts too, by its stored name; the output embedding is
    not one."""
    found = {}
    for name, module in hf.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not hf.get_output_embeddings():
            found[sources[f"{name}.weight"].name] = module.in_features
        elif is_experts(module):
            for part, weight in module.named_parameters():
                if part in _EXPERT_WEIGHTS:
                    found[sources[f"{name}.{part}"].name] = weight.shape[in_axis(module.is_transposed)]
    return found


def _output_embedding(hf: Any, sources: Mapping[str, WeightSource]) -> str:
    """The stored name of the weight that makes logits."""
    embedding = hf.get_output_embeddings()
    (name,) = [name for name, module in hf.named_modules() if module is embedding]
    return sources[f"{name}.weight"].name


def write_graph(
    exported: ExportedModel, folder: Path, *, on_bytes: Callable[[int, int], None] | None = None
) -> dict[Path, str]:
    """Write model.onnx and its weights, which it names relative to itself; returns the files with the
    SHA-256 of each, in hex.

    The weights are copied, converted where the checkpoint stores another dtype, so that `folder` needs
    nothing else. `on_bytes` is told how many bytes of weights are written, and of how many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    onnx_file, weights_file = folder / ONNX_FILE, folder / WEIGHTS_FILE
    weights = []
    for value in exported.model.graph.initializers.values():
        if is_weight(value):
            weights.append(value)
        else:  # torch's own tensors cannot be serialized
            value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.dtype, name=value.name)
    weights_digest = write_weights(weights, weights_file, on_bytes)
    serialized = ir.to_proto(exported.model).SerializeToString()
    onnx_file.write_bytes(serialized)
    return {onnx_file: hashlib.sha256(serialized).hexdigest(), weights_file: weights_digest}


def _eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Tokens that end a text, from generation_config.json or else config.json."""
    ids: Any = None
    path = checkpoint.path / "generation_config.json"
    if path.is_file():
        ids = read_json(path).get("eos_token_id")
    if ids is None:
        ids = checkpoint.config.get_text_config(decoder=True).eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)
