"""`trtforge inspect`: facts, findings and pictures of tiny builds, and what is no build."""

from __future__ import annotations

import json
import math
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.builder.engine_facts import EngineFacts, EngineLayers, EngineTensor, write_facts
from trtforge.builder.inspection.layout import lay_out
from trtforge.builder.inspection.report import InspectionReport
from trtforge.manifest import DimRange, DType, EngineInfo, LayerCache, Manifest, Profile

Run = Callable[..., tuple[int, str, str]]
MakeRepository = Callable[[DType], Path]

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def repository(make_repository: MakeRepository) -> Path:
    return make_repository("bfloat16")


@pytest.fixture
def graph_folder(repository: Path) -> Path:
    return repository / "llm" / "1" / "rank0"


def edit(file: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(file, load_external_data=False)
    change(model.graph)
    file.write_bytes(model.SerializeToString())


# --------------------------------------------------------------------------- facts


def test_facts_are_those_of_the_files(
    repository: Path, graph_folder: Path, tmp_path: Path, run_trtforge: Run
) -> None:
    status, output, _ = run_trtforge("inspect", str(repository), "--json", str(tmp_path / "facts.json"))
    assert status == 0
    assert "Complete." in output
    report = InspectionReport.model_validate(json.loads((tmp_path / "facts.json").read_text()))
    assert report.manifest == Manifest.load(repository / "llm" / "1")
    (facts,) = report.graphs
    graph = onnx.load(graph_folder / "model.onnx", load_external_data=False).graph

    assert facts.num_nodes == len(graph.node) == sum(operator.count for operator in facts.operators)
    counts = Counter((node.domain, node.op_type) for node in graph.node)
    assert {(each.domain, each.op_type): each.count for each in facts.operators} == counts
    custom = {nodes.op_type: nodes for nodes in facts.custom_nodes}
    assert (custom["PagedAttention"].count, custom["PagedAttention"].num_inputs) == (2, 8)
    assert custom["PagedAttention"].attributes == {"scale": 0.25, "softcap": 0.0, "window": 0}
    assert "scale=0.25 softcap=0 window=0 (8 inputs)" in output

    assert [tensor.name for tensor in facts.inputs] == [value.name for value in graph.input]
    assert facts.inputs[2].dims == ("B", "max_blocks")
    assert (facts.outputs[0].name, facts.outputs[0].dtype, facts.outputs[0].dims) == (
        "logits",
        "float32",
        ("R", 128),
    )
    assert "in: kv_cache.0 to kv_cache.1" in output
    assert "[num_blocks, 2, block_size, 2, 16]" in output  # rich takes such brackets for markup
    assert facts.opsets == {"ai.onnx": 23, "trtforge": 1}

    header = safetensors_header(graph_folder / "model.safetensors")
    sizes = [end - begin for begin, end in (entry["data_offsets"] for entry in header.values())]
    bfloat16 = next(group for group in facts.weights if group.dtype == "bfloat16")
    assert (bfloat16.count, bfloat16.nbytes, bfloat16.num_elements) == (
        len(header),
        sum(sizes),
        sum(sizes) // 2,
    )
    assert sum(group.count for group in facts.weights) == len(graph.initializer)
    largest = facts.largest_weights[0]
    assert (largest.nbytes, largest.shape) == (2 * 128 * 64, (128, 64))
    gates = next(weight for weight in facts.largest_weights if "gate_proj" in weight.name)
    assert (gates.name, gates.count) == ("model.layers.*.mlp.gate_proj.weight", 2)
    (data,) = facts.data_files
    assert data.size_bytes == data.needed_bytes == (graph_folder / "model.safetensors").stat().st_size


def safetensors_header(file: Path) -> dict[str, dict[str, list[int]]]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_nodes_that_differ_in_an_attribute_are_told_apart(graph_folder: Path, run_trtforge: Run) -> None:
    def give_one_layer_a_window(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "PagedAttention")
        next(attribute for attribute in node.attribute if attribute.name == "window").i = 6

    edit(graph_folder / "model.onnx", give_one_layer_a_window)
    status, output, _ = run_trtforge("inspect", str(graph_folder / "model.onnx"))
    assert status == 0
    assert "window=6" in output
    assert "window=0" in output
    assert "manifest" not in output


# --------------------------------------------------------------------------- findings


def findings(repository: Path) -> list[tuple[str, str]]:
    """File names and problems."""
    return [(Path(found.file).name, found.problem) for found in InspectionReport.of(repository).findings]


def test_weights_that_are_cut_short_or_gone(repository: Path, graph_folder: Path, run_trtforge: Run) -> None:
    weights = graph_folder / "model.safetensors"
    header = safetensors_header(weights)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-2])
    ((name, problem),) = findings(repository)
    assert name == "model.safetensors"
    assert f"it has {len(whole) - 2:,} bytes, the graph needs {len(whole):,}" in problem
    assert f"1 weights are not whole, {last} is the first of them" in problem
    weights.unlink()
    assert findings(repository) == [("model.safetensors", f"missing, with {len(header)} weights")]
    for path in (repository, graph_folder / "model.onnx"):
        status, output, errors = run_trtforge("inspect", str(path))
        assert status == 2
        assert f"{weights}: missing" in output
        assert "not complete" in errors


def test_files_that_are_not_what_was_built(repository: Path, graph_folder: Path) -> None:
    (graph_folder.parent / "model.py").unlink()
    with (graph_folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    size = (graph_folder / "model.safetensors").stat().st_size
    assert sorted(findings(repository)) == [
        ("model.py", "missing"),
        ("model.safetensors", f"has {size:,} bytes, the build wrote {size - 4:,}"),
    ]


@pytest.mark.parametrize(
    "content", [b"not a graph", b"", b"\x08\x0a", None], ids=["text", "empty", "no graph", "gone"]
)
def test_a_graph_that_cannot_be_read(
    repository: Path, graph_folder: Path, run_trtforge: Run, content: bytes | None
) -> None:
    """Its build is still described; alone it is an error."""
    graph = graph_folder / "model.onnx"
    graph.unlink() if content is None else graph.write_bytes(content)
    status, output, errors = run_trtforge("inspect", str(repository))
    assert status == 2
    assert "30 layers" not in output
    assert "2 layers of 2 heads of 16 in bfloat16" in output
    assert str(graph) in output
    assert "not complete" in errors
    status, output, errors = run_trtforge("inspect", str(graph))
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert str(graph) in errors


def test_a_graph_that_its_manifest_does_not_describe(repository: Path, graph_folder: Path) -> None:
    manifest = Manifest.load(graph_folder.parent)
    layers = (manifest.kv_cache.layers[0], LayerCache(num_kv_heads=4, head_dim=16))
    cache = manifest.kv_cache.model_copy(update={"layers": layers})
    ranks = (manifest.ranks[0].model_copy(update={"kv_layers": layers}),)
    manifest.model_copy(update={"kv_cache": cache, "ranks": ranks}).save(graph_folder.parent)
    problems = [problem for _, problem in findings(repository)]
    assert len(problems) == 2
    assert all(
        f"kv_cache{kind}.1 is" in problem for kind, problem in zip(("", "_out"), problems, strict=True)
    )


def test_weights_that_do_not_fit_their_tensors(repository: Path, graph_folder: Path) -> None:
    def point_elsewhere(graph: onnx.GraphProto) -> None:
        external = [tensor for tensor in graph.initializer if tensor.external_data]
        for tensor, key, value in ((external[0], "location", "../up.bin"), (external[1], "length", "6")):
            next(entry for entry in tensor.external_data if entry.key == key).value = value

    edit(graph_folder / "model.onnx", point_elsewhere)
    problems = " ".join(problem for _, problem in findings(repository))
    assert "outside of the graph's folder" in problems
    assert "6 bytes, its shape and dtype need" in problems


def test_an_engine_is_told_by_its_manifest_and_by_its_build(
    repository: Path, graph_folder: Path, tmp_path: Path, run_trtforge: Run
) -> None:
    """What was built from which network is in test_build.py; here it is read."""
    engine = graph_folder / "model.engine"
    engine.write_bytes(b"12345")
    tensor = EngineTensor(name="logits", dtype="float32", dims=("R", 128))
    layers = (EngineLayers(type="matrix_multiply", dtype="bfloat16", count=1234),)
    network = EngineFacts(inputs=(), outputs=(tensor,), layers=layers)
    write_facts(network, engine)
    info = EngineInfo(
        file="rank0/model.engine",
        size_bytes=5,
        sha256="abc",
        package="tensorrt_rtx",
        version="9.9",
        compute_capabilities=("8.9", "12.0"),
        profiles=(Profile(name="mixed", dims={"T": DimRange(min=1, opt=8, max=64)}),),
    )
    manifest = Manifest.load(graph_folder.parent)
    (rank,) = manifest.ranks
    ranks = (rank.model_copy(update={"engine": info}),)
    manifest.model_copy(update={"ranks": ranks}).save(graph_folder.parent)
    for path in (engine, repository):
        status, output, _ = run_trtforge("inspect", str(path), "--json", str(tmp_path / "facts.json"))
        assert status == 0
        report = InspectionReport.model_validate_json((tmp_path / "facts.json").read_text())
        assert [(found.info, found.network, found.loaded) for found in report.engines] == [
            (info, network, None)
        ]
        for text in ("tensorrt_rtx 9.9", "sm_89, sm_120", "T 1 to 64, at best 8", "1,234", "matrix_multiply"):
            assert text in output
    engine.write_bytes(b"1234")
    status, output, _ = run_trtforge("inspect", str(engine))
    assert status == 2
    assert "has 4 bytes, the build wrote 5" in output
    (graph_folder / "model.engine.json").write_text("{}")
    status, _, errors = run_trtforge("inspect", str(engine))
    assert (status, "does not hold the facts of an engine" in errors) == (2, True)


def test_what_is_nothing_to_inspect(repository: Path, tmp_path: Path, run_trtforge: Run) -> None:
    engine = tmp_path / "rank0.engine"
    engine.write_bytes(b"")
    two = Path(shutil.copytree(repository, tmp_path / "two"))
    shutil.copytree(two / "llm", two / "other")
    wrong = {
        (str(tmp_path / "nowhere"),): "nowhere holds no build",
        (str(engine),): "is an engine of which no manifest beside it says what it is",
        (str(two),): f"holds 2 builds, give the folder of one: {two / 'llm'}, {two / 'other'}",
        (str(repository), "--layer", "1"): "--layer 1 is drawn into a file",
        (str(repository), "--graph", "layer.png"): "has to end with .svg or .html",
        (str(repository), "--json", str(tmp_path / "no" / "facts.json")): "cannot be written",
    }
    for arguments, message in wrong.items():
        status, _, errors = run_trtforge("inspect", *arguments)
        assert (status, errors.count("\n")) == (2, 1), arguments
        assert message in errors
    assert run_trtforge("inspect", str(two / "other"))[0] == 0


# --------------------------------------------------------------------------- pictures


def boxes(picture: ET.Element) -> Iterator[tuple[str, str]]:
    """Kind and tooltip of each box."""
    for group in picture.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None:
            yield group.get("class", ""), title.text or ""


@pytest.mark.parametrize("layer", [0, 1])
def test_a_picture_has_each_node_of_its_layer_once(
    repository: Path, graph_folder: Path, tmp_path: Path, run_trtforge: Run, layer: int
) -> None:
    file = tmp_path / "layer.svg"
    status, _, _ = run_trtforge("inspect", str(repository), "--layer", str(layer), "--graph", str(file))
    assert status == 0
    picture = ET.parse(file).getroot()
    drawn = list(boxes(picture))
    nodes = [tooltip.splitlines()[1] for kind, tooltip in drawn if kind != "value"]
    assert len(set(nodes)) == len(nodes)

    # A llama's layer begins and ends at sums that its residuals make: two of them in each layer.
    graph = onnx.load(graph_folder / "model.onnx", load_external_data=False).graph
    hidden = [
        number
        for number, node in enumerate(graph.node)
        if node.op_type == "Gather" and "embed_tokens" in node.input[0]
    ]
    attention = [number for number, node in enumerate(graph.node) if node.op_type == "PagedAttention"]
    sums = [
        next(
            number
            for number, node in enumerate(graph.node)
            if number > attention[index]
            and node.op_type == "Add"
            and down_projection(graph, index) in node.input
        )
        for index in range(2)
    ]
    begin = [*hidden, *sums][layer]
    between = [
        node.name
        for number, node in enumerate(graph.node)
        if begin < number <= sums[layer] and not made_of_positions(graph, node)
    ]
    assert sorted(nodes) == sorted(between)

    entering = {tooltip.split()[0] for kind, tooltip in drawn if kind == "value"}
    assert {f"kv_cache.{layer}", f"kv_cache_out.{layer}", "slot_mapping"} <= entering
    text = "".join(picture.itertext())
    assert "self_attn.q_proj.weight [64, 64]" in text
    assert f"weights model.layers.{layer}.*" in text


def down_projection(graph: onnx.GraphProto, layer: int) -> str:
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    return next(node.output[0] for node in graph.node if name in node.input)


def made_of_positions(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Whether a node knows positions and constants only: tables of rotations are for all layers."""
    producer = {name: other for other in graph.node for name in other.output}
    constants = {tensor.name for tensor in graph.initializer} | {"position_ids"}
    return all(
        name in constants or (name in producer and made_of_positions(graph, producer[name]))
        for name in node.input
    )


def test_a_picture_in_a_page(repository: Path, tmp_path: Path, run_trtforge: Run) -> None:
    file = tmp_path / "layer.html"
    assert run_trtforge("inspect", str(repository), "--graph", str(file))[0] == 0
    page = file.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<svg") == page.count("</svg>") == 1
    assert "PagedAttention" in page


def test_layers_that_are_not_there(repository: Path, tmp_path: Path, run_trtforge: Run) -> None:
    arguments = ("--graph", str(tmp_path / "layer.svg"))
    status, _, errors = run_trtforge("inspect", str(repository), "--layer", "2", *arguments)
    assert status == 2
    assert "--layer 2 is not in the graph, which has layers 0 to 1" in errors
    node = ir.node("Relu", [ir.Value(name="x")])
    graph = ir.Graph(node.inputs, node.outputs, nodes=[node], opset_imports={"": 23}, name="other")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "other.onnx")
    status, _, errors = run_trtforge("inspect", str(tmp_path / "other.onnx"), *arguments)
    assert status == 2
    assert "no node PagedAttention" in errors


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_boxes_never_overlap_and_edges_go_down(data: st.DataObject) -> None:
    names = [str(number) for number in range(data.draw(st.integers(1, 12)))]
    side = st.floats(1, 200)
    sizes = {name: (data.draw(side), data.draw(side)) for name in names}
    edges = {
        (names[min(pair)], names[max(pair)])
        for pair in data.draw(st.lists(st.tuples(*[st.integers(0, len(names) - 1)] * 2), max_size=20))
        if pair[0] != pair[1]
    }
    layout = lay_out(sizes, sorted(edges))
    assert layout.centers.keys() == sizes.keys()
    assert layout.routes.keys() == edges
    for name, (x, y) in layout.centers.items():
        width, height = sizes[name]
        assert width / 2 - 1e-6 <= x <= layout.width - width / 2 + 1e-6
        assert height / 2 - 1e-6 <= y <= layout.height - height / 2 + 1e-6
        for other in names[: names.index(name)]:
            apart_x = abs(x - layout.centers[other][0]) - (width + sizes[other][0]) / 2
            apart_y = abs(y - layout.centers[other][1]) - (height + sizes[other][1]) / 2
            assert max(apart_x, apart_y) > -1e-6
    for (source, target), points in layout.routes.items():
        heights = [y for _, y in points]
        assert heights == sorted(heights)
        assert math.isclose(heights[0], layout.centers[source][1] + sizes[source][1] / 2)
        assert math.isclose(heights[-1], layout.centers[target][1] - sizes[target][1] / 2)
