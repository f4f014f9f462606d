"""Everything `trtforge inspect` knows of what it was given, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
from typing_extensions import Self

from trtforge import wire
from trtforge.builder.inspection.engine import SUFFIXES, EngineInspection, find_engine_info
from trtforge.builder.inspection.graph_facts import Facts, GraphFacts, end_bytes, read_model, weights_of
from trtforge.builder.repository import VERSION_FOLDER
from trtforge.errors import ConfigError
from trtforge.manifest import Manifest, find_manifest_folder

_ANY_SIZE = "any size"  # of a dim that the manifest does not know


class Finding(Facts):
    """What is wrong with one file."""

    file: str
    problem: str


class InspectionReport(Facts):
    """A build, or an ONNX file alone: then `manifest` is None. Without findings it is complete."""

    path: str
    manifest: Manifest | None
    graphs: tuple[GraphFacts, ...]
    engines: tuple[EngineInspection, ...] = ()
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, path: Path) -> Self:
        """Inspect a repository with one model, a model's folder, an ONNX file or an engine of a build.

        Raises ConfigError if `path` is none of them.
        """
        if path.is_file() and path.suffix in SUFFIXES:
            engine = EngineInspection.of(path, find_engine_info(path))
            found = _size_findings(path, engine.info.size_bytes)
            return cls(path=str(path), manifest=None, graphs=(), engines=(engine,), findings=tuple(found))
        if path.is_file():
            graph, findings = _inspect_graph(path)
            return cls(path=str(path), manifest=None, graphs=(graph,), findings=tuple(findings))
        folder = find_manifest_folder(path)
        manifest = Manifest.load(folder)
        graphs: list[GraphFacts] = []
        findings = []
        for number, rank in enumerate(manifest.ranks):
            try:
                graph, of_data = _inspect_graph(folder / rank.onnx)
            except ConfigError as error:
                findings.append(Finding(file=str(folder / rank.onnx), problem=str(error)))
                continue
            graphs.append(graph.model_copy(update={"file": rank.onnx}))
            findings += [*of_data, *_contract_findings(graph, folder / rank.onnx, manifest, number)]
        engines = [
            EngineInspection.of(folder / rank.engine.file, rank.engine)
            for rank in manifest.ranks
            if rank.engine is not None
        ]
        explained = {finding.file for finding in findings}
        findings += [found for found in _file_findings(folder, manifest) if found.file not in explained]
        return cls(
            path=str(folder),
            manifest=manifest,
            graphs=tuple(graphs),
            engines=tuple(engines),
            findings=tuple(findings),
        )

    def save(self, file: Path) -> None:
        """Write the report as JSON."""
        file.write_text(self.model_dump_json(indent=2) + "\n")


def first_graph_file(path: Path) -> Path:
    """The ONNX file of the first rank; raises ConfigError if `path` has none."""
    if path.is_file():
        return path
    folder = find_manifest_folder(path)
    ranks = Manifest.load(folder).ranks
    if not ranks:
        raise ConfigError(f"{folder} has no graph")
    return folder / ranks[0].onnx


def _inspect_graph(file: Path) -> tuple[GraphFacts, list[Finding]]:
    model = read_model(file)
    graph = GraphFacts.of(model, file)
    return graph, list(_data_findings(model, graph, file))


def _data_findings(model: ir.Model, graph: GraphFacts, onnx_file: Path) -> Iterator[Finding]:
    folder = onnx_file.parent
    tensors = [tensor for tensor in weights_of(model) if isinstance(tensor, ir.ExternalTensor)]
    for data in graph.data_files:
        file = folder / data.name
        inside = [tensor for tensor in tensors if str(tensor.location) == data.name]
        if not file.resolve().is_relative_to(folder.resolve()):
            problem = "outside of the graph's folder, where runtimes do not read weights"
        elif data.size_bytes is None:
            problem = f"missing, with {len(inside)} weights"
        elif data.size_bytes < data.needed_bytes:
            cut = [tensor for tensor in inside if end_bytes(tensor) > data.size_bytes]
            problem = (
                f"cut short: it has {data.size_bytes:,} bytes, the graph needs {data.needed_bytes:,}; "
                f"{len(cut)} weights are not whole, {cut[0].name} is the first of them"
            )
        else:
            continue
        yield Finding(file=str(file), problem=problem)
    for tensor in tensors:
        if tensor.length is not None and tensor.length != tensor.nbytes:
            problem = (
                f"gives {tensor.name} {tensor.length:,} bytes, its shape and dtype need {tensor.nbytes:,}"
            )
            yield Finding(file=str(onnx_file), problem=problem)


def _file_findings(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    wanted: dict[Path, int | None] = {folder / name: size for name, size in manifest.files.items()}
    if folder.name == VERSION_FOLDER:  # otherwise it is not a model of a repository
        wanted |= {folder.parent / "config.pbtxt": None, folder / "model.py": None}
    for file, size_bytes in wanted.items():
        yield from _size_findings(file, size_bytes)


def _size_findings(file: Path, size_bytes: int | None) -> Iterator[Finding]:
    if not file.is_file():
        yield Finding(file=str(file), problem="missing")
    elif size_bytes is not None and file.stat().st_size != size_bytes:
        problem = f"has {file.stat().st_size:,} bytes, the build wrote {size_bytes:,}"
        yield Finding(file=str(file), problem=problem)


def _contract_findings(graph: GraphFacts, file: Path, manifest: Manifest, number: int) -> Iterator[Finding]:
    """Where the graph is not that of the rank `number` of its manifest."""
    rank, stage = manifest.ranks[number], number // manifest.tp_size
    is_first, is_last = stage == 0, stage == manifest.pp_size - 1
    start, stop = rank.logits_columns
    dims: dict[str, tuple[str | int, ...]] = {tensor.name: tensor.dims for tensor in wire.GRAPH_INPUTS}
    dims |= {
        wire.LOGITS: ("R", stop - start),
        wire.HIDDEN_STATES: ("T", _ANY_SIZE),
        wire.HIDDEN_STATES_OUT: ("T", _ANY_SIZE),
    }
    inputs = {name: dims[name] for name in wire.stage_inputs(is_first=is_first, is_last=is_last)}
    outputs = {name: dims[name] for name in (wire.stage_output(is_last=is_last),)}
    for index, layer in enumerate(rank.kv_layers):
        cache = ("num_blocks", 2, "block_size", layer.num_kv_heads, layer.head_dim)
        inputs[wire.kv_cache_input(index)] = outputs[wire.kv_cache_output(index)] = cache
    for kind, wanted, tensors in (("input", inputs, graph.inputs), ("output", outputs, graph.outputs)):
        found = {tensor.name: tensor.dims for tensor in tensors}
        for name in sorted(wanted.keys() | found.keys()):
            if not _are_alike(wanted.get(name), found.get(name)):
                problem = f"its {kind} {name} is {found.get(name)}, the manifest says {wanted.get(name)}"
                yield Finding(file=str(file), problem=problem)


def _are_alike(wanted: tuple[str | int, ...] | None, found: tuple[int | str | None, ...] | None) -> bool:
    if wanted is None or found is None or len(wanted) != len(found):
        return wanted == found
    return all(dim in (_ANY_SIZE, other) for dim, other in zip(wanted, found, strict=True))
