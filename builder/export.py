"""A Hugging Face checkpoint as one packed, paged ONNX graph with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from trtforge.builder.checkpoint import Checkpoint, read_json
from trtforge.builder.meta_model import build_meta_model
from trtforge.builder.optimize import optimize
from trtforge.builder.quantization.lowering import quantize_linears
from trtforge.builder.quantization.policy import (
    InputScales,
    Lowering,
    Quantization,
    WeightChoice,
    check_exclusions,
    check_projections,
)
from trtforge.builder.trace import WEIGHT_PREFIX, trace
from trtforge.builder.weights import (
    WeightSource,
    attach_weights,
    detach_weights,
    is_weight,
    locate_weights,
)
from trtforge.builder.weights_file import write_weights
from trtforge.manifest import DType, LayerCache

ONNX_FILE = "model.onnx"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """The graph and what a build has to know about it. Weights are read from the checkpoint's files."""

    model: ir.Model
    layers: tuple[LayerCache, ...]
    vocab_size: int
    num_parameters: int
    weight_bytes: int
    num_nodes: int
    architecture: str
    eos_token_ids: tuple[int, ...]
    weights: tuple[WeightChoice, ...]  # of two dims or more, if any is quantized


def export_model(
    checkpoint: Checkpoint,
    dtype: DType,
    *,
    quantization: Quantization | None = None,
    lowering: Lowering | None = None,
    input_scales: InputScales | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> ExportedModel:
    """Trace the model in `dtype` and attach the checkpoint's weights, rounded as `quantization` says.

    `lowering` is how projections with quantized weights are expressed; None if there are none. `input_scales`
    are of projections that `quantization` rounds. Peak memory
    does not depend on the model's size: tracing happens on the meta device. `on_stage` is told what begins.
    Raises ExportError, naming the reason, for a model that cannot be expressed, and ConfigError for a
    quantization that cannot be applied to it.
    """
    stage = on_stage or (lambda _: None)
    stage("model")
    hf = build_meta_model(checkpoint.config, getattr(torch, dtype))
    sources = locate_weights(hf, checkpoint)
    if quantization is not None:
        # Before the trace, which takes minutes with a large model.
        check_exclusions([source.name for source in sources.values()], quantization.exclude)
        check_projections(_in_features(hf, sources), quantization)
    model, layers = trace(hf, getattr(torch, dtype), stage)
    stage("optimize")
    weights = detach_weights(model.graph)
    optimize(model)
    attach_weights(model.graph, weights, sources, WEIGHT_PREFIX)
    choices: tuple[WeightChoice, ...] = ()
    if lowering is not None:
        by_stored_name = {source.name: source for source in sources.values()}
        output_embedding = _output_embedding(hf, sources)
        choices = quantize_linears(
            model.graph, by_stored_name, lowering, quantization, output_embedding, input_scales or {}
        )
    parameters = {id(parameter): parameter.numel() for parameter in hf.parameters()}
    return ExportedModel(
        model=model,
        layers=layers,
        vocab_size=int(model.graph.outputs[0].shape[1]),
        num_parameters=sum(parameters.values()),
        weight_bytes=sum(value.const_value.nbytes for value in model.graph.initializers.values()),
        num_nodes=len(model.graph),
        architecture=type(hf).__name__,
        eos_token_ids=_eos_token_ids(checkpoint),
        weights=choices,
    )


def _in_features(hf: Any, sources: Mapping[str, WeightSource]) -> dict[str, int]:
    """Columns of each projection's weight, by its stored name; the output embedding is not one."""
    return {
        sources[f"{name}.weight"].name: module.in_features
        for name, module in hf.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not hf.get_output_embeddings()
    }


def _output_embedding(hf: Any, sources: Mapping[str, WeightSource]) -> str:
    """The stored name of the weight that makes logits."""
    embedding = hf.get_output_embeddings()
    (name,) = [name for name, module in hf.named_modules() if module is embedding]
    return sources[f"{name}.weight"].name


def write_graph(
    exported: ExportedModel, folder: Path, *, on_bytes: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write model.onnx and its weights, which it names relative to itself; returns the files.

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
    write_weights(weights, weights_file, on_bytes)
    onnx_file.write_bytes(ir.to_proto(exported.model).SerializeToString())
    return [onnx_file, weights_file]


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
