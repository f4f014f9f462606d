"""An inspection as tables for people."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from rich.console import Group, RenderableType
from rich.table import Table

from trtforge.builder.engine_facts import EngineTensor
from trtforge.builder.inspection.engine import EngineInspection
from trtforge.builder.inspection.graph_facts import CustomNodes, GraphFacts, TensorFacts
from trtforge.builder.inspection.report import InspectionReport
from trtforge.builder.report import format_bytes
from trtforge.manifest import KVCacheLayout, LayerCache, Manifest

_Tensor: TypeAlias = TensorFacts | EngineTensor


def inspection_tables(report: InspectionReport) -> Group:
    """Manifest, graphs and findings, for a terminal."""
    parts: list[RenderableType] = []
    if report.manifest is not None:
        parts.append(_manifest(report.manifest))
    for rank, graph in enumerate(report.graphs):
        title = graph.file if report.manifest is None else f"rank {rank}: {graph.file}"
        parts += [_graph(graph, title), _operators(graph), _tensors(graph)]
        parts += [_weights(graph), _largest_weights(graph)]
    for engine in report.engines:
        parts += [_engine(engine), *_network(engine)]
    parts += [f"{finding.file}: {finding.problem}" for finding in report.findings]
    parts.append(f"{len(report.findings)} problems." if report.findings else "Complete.")
    return Group(*parts)


def _manifest(manifest: Manifest) -> Table:
    model, cache, limits = manifest.model, manifest.kv_cache, manifest.limits
    table = _table(f"{model.name}: {model.architecture} for {manifest.runtime} in {manifest.dtype}")
    table.add_column("manifest")
    table.add_column("value", overflow="fold")
    table.add_row("built by", f"trtforge {manifest.trtforge_version}")
    table.add_row("build key", manifest.build_key)
    table.add_row("parameters", f"{model.num_parameters:,}")
    table.add_row("vocabulary", f"{model.vocab_size:,} tokens, ends at {list(model.eos_token_ids)}")
    table.add_row("ranks", f"{len(manifest.ranks)}, tp {manifest.tp_size}, pp {manifest.pp_size}")
    table.add_row("KV cache", _cache_text(cache))
    table.add_row("KV cache per token", format_bytes(cache.bytes_per_token))
    total_bytes = cache.num_blocks * cache.block_size * cache.bytes_per_token
    blocks = f"{cache.num_blocks:,} blocks of {cache.block_size} tokens"
    table.add_row("KV cache in all", f"{blocks}, {format_bytes(total_bytes)}")
    table.add_row(
        "limits",
        f"{limits.max_model_len:,} tokens a sequence, {limits.max_num_seqs:,} sequences, "
        f"{limits.max_num_batched_tokens:,} tokens a step",
    )
    table.add_row("files", f"{len(manifest.files)}, {format_bytes(sum(manifest.files.values()))}")
    return table


def _cache_text(cache: KVCacheLayout) -> str:
    """Neighbouring layers that are alike counted together."""
    runs = [(layer, len(list(run))) for layer, run in itertools.groupby(cache.layers)]
    return "\n".join(f"{count} layers of {_layer_text(layer)} in {cache.dtype}" for layer, count in runs)


def _layer_text(layer: LayerCache) -> str:
    window = f", window {layer.window}" if layer.window else ""
    return f"{layer.num_kv_heads} heads of {layer.head_dim}{window}"


def _graph(graph: GraphFacts, title: str) -> Table:
    table = _table(title)
    table.add_column("graph")
    table.add_column("value")
    table.add_row("made by", f"{graph.producer or 'unknown'}, ONNX IR version {graph.ir_version}")
    table.add_row("opsets", ", ".join(f"{domain} {version}" for domain, version in graph.opsets.items()))
    if graph.functions:
        table.add_row("functions", ", ".join(graph.functions))
    table.add_row("nodes", f"{graph.num_nodes:,}")
    for data in graph.data_files:
        size = "missing" if data.size_bytes is None else format_bytes(data.size_bytes)
        table.add_row(data.name, f"{size}, {format_bytes(data.needed_bytes)} needed")
    return table


def _engine(engine: EngineInspection) -> Table:
    info = engine.info
    table = _table(engine.file)
    table.add_column("engine")
    table.add_column("value", overflow="fold")
    table.add_row("built by", f"{info.package} {info.version}")
    table.add_row("for", ", ".join(f"sm_{text.replace('.', '')}" for text in info.compute_capabilities))
    table.add_row("size", format_bytes(info.size_bytes))
    table.add_row("sha256", info.sha256)
    for profile in info.profiles:
        ranges = [f"{name} {dim.min} to {dim.max}, at best {dim.opt}" for name, dim in profile.dims.items()]
        table.add_row(f"profile {profile.name}", "\n".join(ranges))
    if engine.network is not None:
        table.add_row("layers before fusing", f"{engine.network.num_layers:,}")
    if engine.loaded is not None:
        table.add_row("layers loaded", f"{len(engine.loaded.get('Layers', ())):,}")
    return table


def _network(engine: EngineInspection) -> Iterator[Table]:
    if engine.network is None:
        return
    table = _table()
    table.add_column("layers", justify="right")
    table.add_column("type")
    table.add_column("dtype")
    for layers in engine.network.layers:
        table.add_row(f"{layers.count:,}", layers.type, layers.dtype)
    yield table
    yield _tensor_table(engine.network.inputs, engine.network.outputs)


def _operators(graph: GraphFacts) -> Table:
    table = _table()
    table.add_column("nodes", justify="right")
    table.add_column("operator")
    table.add_column("attributes")
    for operator in graph.operators:
        groups = [nodes for nodes in graph.custom_nodes if nodes.op_type == operator.op_type]
        name = f"{operator.domain}::{operator.op_type}" if operator.domain else operator.op_type
        if operator.domain and groups:
            for nodes in groups:
                table.add_row(f"{nodes.count:,}", name, _attributes(nodes))
        else:
            table.add_row(f"{operator.count:,}", name, "")
    return table


def _attributes(nodes: CustomNodes) -> str:
    words = [f"{name}={_value(value)}" for name, value in nodes.attributes.items()]
    return " ".join([*words, f"({nodes.num_inputs} inputs)"])


def _value(value: int | float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _weights(graph: GraphFacts) -> Table:
    table = _table()
    table.add_column("weights", justify="right")
    table.add_column("dtype")
    table.add_column("numbers", justify="right")
    table.add_column("size", justify="right")
    for group in graph.weights:
        size = format_bytes(group.nbytes)
        table.add_row(f"{group.count:,}", group.dtype, f"{group.num_elements:,}", size)
    return table


def _largest_weights(graph: GraphFacts) -> Table:
    table = _table()
    table.add_column("largest weights", overflow="fold")
    table.add_column("dtype")
    table.add_column("shape")
    table.add_column("size", justify="right")
    for weight in graph.largest_weights:
        name = weight.name if weight.count == 1 else f"{weight.count} x {weight.name}"
        size = format_bytes(weight.count * weight.nbytes)
        table.add_row(name, weight.dtype, _dims(weight.shape), size)
    return table


def _tensors(graph: GraphFacts) -> Table:
    return _tensor_table(graph.inputs, graph.outputs)


def _tensor_table(inputs: Sequence[_Tensor], outputs: Sequence[_Tensor]) -> Table:
    table = _table()
    table.add_column("tensor")
    table.add_column("dtype")
    table.add_column("shape")
    for kind, tensors in (("in", inputs), ("out", outputs)):
        for name, tensor in _numbered_together(tensors):
            table.add_row(f"{kind}: {name}", tensor.dtype, _dims(tensor.dims))
        table.add_section()
    return table


def _numbered_together(tensors: Iterable[_Tensor]) -> Iterable[tuple[str, _Tensor]]:
    """Neighbours that differ in a number at the end of their names only become one row."""

    def what(tensor: _Tensor) -> tuple[object, ...]:
        return re.sub(r"\d+$", "", tensor.name), tensor.dtype, tensor.dims

    for _, group in itertools.groupby(tensors, what):
        alike = list(group)
        first, last = alike[0], alike[-1]
        yield (first.name if len(alike) == 1 else f"{first.name} to {last.name}"), first


def _dims(dims: Iterable[int | str | None]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in dims)}]"


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left")
