"""From the graph of a whole model to those of its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from trtforge import wire
from trtforge.builder.sharding.pipeline import split_stages
from trtforge.builder.sharding.plan import Multiples, make_shard_plan
from trtforge.builder.sharding.rewrite import rewrite
from trtforge.builder.sharding.split import Parallelism, Range
from trtforge.builder.weights import WeightSource
from trtforge.manifest import LayerCache


@dataclass(frozen=True, slots=True)
class RankPart:
    """One rank's graph, and what it has of the model."""

    model: ir.Model
    sources: Mapping[str, WeightSource]  # of the graph's weights, by name
    layers: tuple[LayerCache, ...]
    logits_columns: tuple[int, int]  # (0, 0): a stage that has no logits


def shard(
    model: ir.Model,
    layers: Sequence[LayerCache],
    sources: Mapping[str, WeightSource],
    parallelism: Parallelism,
    multiples: Multiples,
) -> list[RankPart]:
    """The ranks of `model`, whose layers have the caches `layers`, ordered by stage and then within it.

    `model` stays as it is, and no weight is read. Raises ConfigError if there are more ranks than what they
    would share, or weights that share a scale would be parted, and ExportError for a graph that cannot be
    divided correctly.
    """
    stages = [(model.graph, (0, len(layers)))]
    if parallelism.pp > 1:
        stages = split_stages(model.graph, parallelism.pp)
    parts = []
    for graph, (start, stop) in stages:
        for rank in range(parallelism.tp):
            # Each works on a copy of its own; a plan is of the objects of one graph.
            copy = graph.clone()
            used = {name: sources[name] for name in copy.initializers if name in sources}
            columns = _whole_columns(copy)
            if parallelism.tp > 1:
                plan = make_shard_plan(copy, parallelism.tp, multiples)
                used = rewrite(copy, plan, rank, used)
                columns = plan.logits[rank] if plan.logits else columns
            parts.append(RankPart(_model(model, copy), used, _caches(copy, layers[start:stop]), columns))
    return parts


def _whole_columns(graph: ir.Graph) -> Range:
    output = graph.outputs[0]
    return (0, int(output.shape[1])) if output.name == wire.LOGITS else (0, 0)


def _caches(graph: ir.Graph, layers: Sequence[LayerCache]) -> tuple[LayerCache, ...]:
    """`layers` with the KV heads that the graph has."""
    inputs = {value.name: value for value in graph.inputs}
    heads = [inputs[wire.kv_cache_input(index)].shape[-2] for index in range(len(layers))]
    return tuple(
        layer.model_copy(update={"num_kv_heads": count}) for layer, count in zip(layers, heads, strict=True)
    )


def _model(model: ir.Model, graph: ir.Graph) -> ir.Model:
    """`graph` in place of the model's own."""
    return ir.Model(
        graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
    )
