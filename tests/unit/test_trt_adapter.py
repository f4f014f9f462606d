"""Plugins and creators, called as TensorRT calls them, with TensorRT-RTX's classes.

TensorRT itself is not here; both packages have the same plugin classes. Nothing is registered with RTX.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from trtforge.errors import PluginError
from trtforge.plugins.bundle import Bundle, BundleManifest
from trtforge.plugins.launch import Call, Gpu, Kernel, Kernels, Launch, Plan
from trtforge.plugins.op import DOMAIN, FLOATS, INTS, Attribute, OpSpec, Tensor
from trtforge.plugins.trt_adapter import make_creators, name_inputs, register

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
D = tensorrt_rtx.DataType
LINEAR = tensorrt_rtx.TensorFormat.LINEAR
# RTX makes expressions only while it builds a network, and takes no plugins into one.
trt = SimpleNamespace(**vars(tensorrt_rtx) | {"DimsExprs": list})

GATHER = OpSpec(
    name="GatherScaled",
    doc="Scaled rows of a table, which is changed in place.",
    inputs=(
        Tensor("table", "T", ("num_rows", 2, "width")),
        Tensor("rows", "I", ("num_tokens",)),
        Tensor("bias", "B", ("width",), optional=True),
        Tensor("scales", "T", ("num_tokens",), optional=True),
    ),
    outputs=(
        Tensor("out", "T", ("num_tokens", "width", 2)),
        Tensor("table_out", "T", ("num_rows", 2, "width")),
        Tensor("count", "C", ("num_tokens",)),
    ),
    dtypes={"T": (*FLOATS, "tensor(float8e4m3fn)"), "B": FLOATS, "I": INTS, "C": ("tensor(int32)",)},
    attributes=(
        Attribute("factor", "float"),
        Attribute("offset", "int", -3),
        Attribute("mode", "string", "plain"),
    ),
    aliases={"table_out": "table"},
)
KERNEL = Kernel("gather", "gather", (("table", "*bf16"), ("out", "*bf16")), (), 4, 2)


EMPTY = Bundle(Path("nowhere"), BundleManifest(compiler="none", compiler_version="0", cubins=()))


def plan_gather(call: Call, gpu: Gpu) -> Plan:
    if call.dtypes["table"] == "float32":
        raise PluginError("GatherScaled has no kernel for float32")
    launch = Launch(KERNEL, (call.shapes["rows"][0], 1, 1), {"table": "table_out", "out": "out"})
    return Plan((launch,), {"partial": 4 * prod(call.shapes["table"])})


class RecordingLauncher:
    gpu = Gpu(90, 132)

    def __init__(self) -> None:
        self.loaded: list[Plan] = []
        self.launched: list[tuple[Plan, dict[str, int], int, int]] = []

    def load(self, plan: Plan) -> None:
        self.loaded.append(plan)

    def launch(self, plan: Plan, pointers: dict[str, int], workspace_pointer: int, stream: int) -> None:
        assert plan in self.loaded
        self.launched.append((plan, pointers, workspace_pointer, stream))


class Builder:
    def constant(self, value: int) -> str:
        return f"constant {value}"


@pytest.fixture
def launcher() -> RecordingLauncher:
    return RecordingLauncher()


@pytest.fixture
def calls() -> list[Call]:
    """What was planned."""
    return []


@pytest.fixture
def creator(launcher: RecordingLauncher, calls: list[Call]) -> Any:
    def plan(call: Call, gpu: Gpu) -> Plan:
        assert gpu == launcher.gpu
        calls.append(call)
        return plan_gather(call, gpu)

    (creator,) = make_creators(trt, {GATHER: Kernels(plan, lambda call, arch: (KERNEL,))}, lambda: launcher)
    return creator


def parsed_fields(**values: int | float | str) -> Any:
    """Fields as the parser makes them of a node's attributes, and the memory that they point into."""
    arrays = {
        name: np.frombuffer(value.encode(), np.int8)
        if isinstance(value, str)
        else np.array([value], np.int32 if isinstance(value, int) else np.float32)
        for name, value in values.items()
    }
    types = {"int8": "CHAR", "int32": "INT32", "float32": "FLOAT32"}
    fields = [
        trt.PluginField(name, array, getattr(trt.PluginFieldType, types[array.dtype.name]))
        for name, array in arrays.items()
    ]
    return trt.PluginFieldCollection(fields), arrays, fields


def create(creator: Any, input_names: str = "table,rows,scales", **values: int | float | str) -> Any:
    fields, *memory = parsed_fields(**{"factor": 0.5, "input_names": input_names} | values)
    plugin = creator.create_plugin("layer.0", fields, trt.TensorRTPhase.BUILD)
    del memory
    return plugin


def desc(dtype: Any, *dims: int, format_: Any = LINEAR) -> Any:
    tensor = trt.PluginTensorDesc()
    tensor.type, tensor.dims, tensor.format = dtype, trt.Dims(dims), format_
    return tensor


def dynamic(tensor: Any, **bounds: tuple[int, ...]) -> Any:
    result = trt.DynamicPluginTensorDesc()
    result.desc = tensor
    for name in ("min", "opt", "max"):
        setattr(result, name, trt.Dims(bounds.get(name, tuple(tensor.dims))))
    return result


def profile(max_tokens: int = 6, max_rows: int = 100) -> list[Any]:
    return [
        dynamic(desc(D.BF16, -1, 2, 8), min=(1, 2, 8), opt=(10, 2, 8), max=(max_rows, 2, 8)),
        dynamic(desc(D.INT32, -1), min=(1,), opt=(2,), max=(max_tokens,)),
        dynamic(desc(D.BF16, -1), min=(1,), opt=(2,), max=(max_tokens,)),
    ]


def build(creator: Any, **values: int | float | str) -> Any:
    """The plugin of an engine that was built for `profile()`."""
    plugin = create(creator, **values)
    clone = plugin.clone()
    clone.get_workspace_size(profile(), [])
    serialized = trt.PluginFieldCollection_(plugin.get_fields_to_serialize())
    return creator.create_plugin("layer.0", serialized, trt.TensorRTPhase.RUNTIME)


def inputs_of(num_tokens: int, dtype: Any = D.BF16) -> list[Any]:
    return [desc(dtype, 100, 2, 8), desc(D.INT32, num_tokens), desc(dtype, num_tokens)]


def outputs_of(num_tokens: int, dtype: Any = D.BF16) -> list[Any]:
    return [desc(dtype, num_tokens, 8, 2), desc(dtype, 100, 2, 8), desc(D.INT32, num_tokens)]


def enqueue(plugin: Any, num_tokens: int, inputs: list[int], outputs: list[int]) -> None:
    plugin.enqueue(inputs_of(num_tokens), outputs_of(num_tokens), inputs, outputs, 0x9000, 0xABC)


def test_a_plugin_has_every_capability_and_the_node_s_name(creator: Any) -> None:
    plugin = create(creator)
    for name in ("CORE", "BUILD", "RUNTIME"):
        found = plugin.get_capability_interface(getattr(trt.PluginCapabilityType, name))
        assert isinstance(found, (trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime))
    for thing in (plugin, creator):
        assert thing.plugin_namespace == DOMAIN
        assert thing.plugin_version == "1"
    assert (creator.name, plugin.plugin_name, plugin.num_outputs) == ("GatherScaled", "GatherScaled", 3)
    assert isinstance(plugin, trt.IPluginV3)
    assert isinstance(creator, trt.IPluginCreatorV3One)


def test_creators_name_every_field_so_that_the_parser_passes_it_on(creator: Any) -> None:
    types = {field.name: field.type.name for field in creator.field_names}
    assert types == {"factor": "FLOAT32", "offset": "INT32", "mode": "CHAR", "input_names": "CHAR"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"factor": 0.5, "offset": -3, "mode": "plain"}),
        ({"factor": 2.25, "offset": 7, "mode": "wild"}, {"factor": 2.25, "offset": 7, "mode": "wild"}),
        ({"mode": "wild\0", "offset": 0}, {"factor": 0.5, "offset": 0, "mode": "wild"}),
        ({"mode": "\0"}, {"factor": 0.5, "offset": -3, "mode": ""}),
    ],
)
def test_fields_survive_serialization(creator: Any, calls: list[Call], values: Any, expected: Any) -> None:
    plugin = create(creator, **values)
    serialized = trt.PluginFieldCollection_(plugin.get_fields_to_serialize())
    gc.collect()
    overwriting = [np.full(1, 0x55, dtype) for dtype in (np.int8, np.int32) for _ in range(1000)]
    again = creator.create_plugin("layer.0", serialized, trt.TensorRTPhase.RUNTIME)
    del overwriting
    for made in (plugin, again):
        made.on_shape_change(inputs_of(4), outputs_of(4))
    assert calls[0] == calls[1]
    assert calls[0].attributes == expected
    assert list(calls[0].shapes) == ["table", "rows", "scales"]


def test_missing_and_impossible_fields_are_refused_and_logged(
    creator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fields, *_memory = parsed_fields(input_names="table,rows")
    with pytest.raises(PluginError, match="GatherScaled needs the attribute factor"):
        creator.create_plugin("layer.0", fields, trt.TensorRTPhase.BUILD)
    fields, *_memory = parsed_fields(factor=1.0)
    with pytest.raises(PluginError, match="needs the attribute input_names"):
        creator.create_plugin("layer.0", fields, trt.TensorRTPhase.BUILD)
    for names in ("table", "rows,table", "table,rows,weights"):
        with pytest.raises(PluginError, match=r"takes the inputs table, rows, \[bias\], \[scales\], not"):
            create(creator, names)
    assert len(caplog.records) == 5
    assert all(record.levelno == logging.ERROR for record in caplog.records)
    assert "create_plugin: GatherScaled needs the attribute factor" in caplog.messages[0]


def test_output_shapes_and_dtypes_follow_from_the_inputs(creator: Any) -> None:
    plugin = create(creator)
    inputs = [["rows of table", "two", "width"], ["tokens"], ["tokens"]]
    assert plugin.get_output_shapes(inputs, [], Builder()) == [
        ["tokens", "width", "constant 2"],
        ["rows of table", "constant 2", "width"],
        ["tokens"],
    ]
    for dtype in (D.HALF, D.BF16, D.FLOAT, D.FP8):
        assert plugin.get_output_data_types([dtype, D.INT64, dtype]) == [dtype, dtype, D.INT32]
    with pytest.raises(PluginError, match="has the inputs table, rows, scales; 2 were given"):
        plugin.get_output_data_types([D.HALF, D.INT32])
    with pytest.raises(PluginError, match="no operator takes BOOL"):
        plugin.get_output_data_types([D.HALF, D.BOOL, D.HALF])


def test_more_first_dims_than_declared_are_one_to_the_kernels(
    creator: Any, launcher: RecordingLauncher, calls: list[Call]
) -> None:
    plugin = build(creator)
    inputs = [["a", "b", "rows of table", "two", "width"], ["tokens", "one"], ["tokens"]]
    assert plugin.get_output_shapes(inputs, [], Builder()) == [
        ["tokens", "one", "width", "constant 2"],
        ["a", "b", "rows of table", "constant 2", "width"],
        ["tokens", "one"],
    ]
    plugin.on_shape_change([desc(D.BF16, 5, 20, 2, 8), desc(D.INT32, 4, 1), desc(D.BF16, 4)], [])
    assert calls[-1].shapes == {"table": (100, 2, 8), "rows": (4,), "scales": (4,)}
    with pytest.raises(PluginError, match="expected num_tokens = 8"):
        plugin.on_shape_change([desc(D.BF16, 5, 20, 2, 8), desc(D.INT32, 4, 2), desc(D.BF16, 4)], [])
    with pytest.raises(PluginError, match="table has 2 dims, expected"):
        plugin.get_output_shapes([["two", "width"], *inputs[1:]], [], Builder())
    with pytest.raises(PluginError, match="expected dims"):
        plugin.on_shape_change([desc(D.BF16, 2, 8), desc(D.INT32, 4), desc(D.BF16, 4)], [])


def accepted_prefixes(plugin: Any, tensors: list[Any]) -> Iterator[bool]:
    undecided = desc(D.BOOL, 1, format_=trt.TensorFormat.HWC)
    for position in range(len(tensors)):
        shown = [*tensors[: position + 1], *[undecided] * (len(tensors) - position - 1)]
        yield plugin.supports_format_combination(position, [dynamic(tensor) for tensor in shown], 3)


@pytest.mark.parametrize(
    ("position", "change"),
    [
        (None, {}),
        (0, {"type": D.INT8}),
        (0, {"format": trt.TensorFormat.CHW2}),
        (1, {"type": D.FLOAT}),
        (2, {"type": D.HALF}),  # not the table's
        (3, {"type": D.FLOAT}),
        (4, {"format": trt.TensorFormat.HWC8}),
        (5, {"type": D.INT64}),
        (2, {"type": D.BOOL}),
    ],
)
def test_dense_tensors_of_consistent_dtypes_are_supported(creator: Any, position: Any, change: Any) -> None:
    tensors = [*inputs_of(4), *outputs_of(4)]
    for name, value in change.items():
        setattr(tensors[position], name, value)
    accepted = list(accepted_prefixes(create(creator), tensors))
    if position is None:
        assert all(accepted)
    else:
        assert accepted[: position + 1] == [True] * position + [False]


def test_aliased_outputs_name_their_input(creator: Any) -> None:
    assert [create(creator).get_aliased_input(output) for output in range(3)] == [-1, 0, -1]


def test_the_workspace_is_that_of_the_largest_shapes(creator: Any) -> None:
    assert create(creator).get_workspace_size(profile(), []) == 6400  # 4 * 100 * 2 * 8, a multiple of 256


def test_an_engine_s_plugin_refuses_shapes_that_need_more_workspace(
    creator: Any, launcher: RecordingLauncher
) -> None:
    plugin = build(creator)
    larger = [desc(D.BF16, 101, 2, 8), *inputs_of(4)[1:]]
    plugin.on_shape_change(larger, outputs_of(4))
    with pytest.raises(PluginError, match="needs 6656 bytes of workspace for these shapes; 6400 sufficed"):
        enqueue(plugin, 4, [0x100, 0x200, 0x300], [0x400, 0x100, 0x500])
    plugin.on_shape_change(inputs_of(4), outputs_of(4))
    enqueue(plugin, 4, [0x100, 0x200, 0x300], [0x400, 0x100, 0x500])
    assert len(launcher.launched) == 1


def test_what_kernels_refuse_is_logged_with_its_reason(
    creator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = [dynamic(tensor) for tensor in inputs_of(4, D.FLOAT)]
    with pytest.raises(PluginError, match="no kernel for float32"):
        create(creator).get_workspace_size(tensors, [])
    expected = "plugin layer.0 (GatherScaled), get_workspace_size: GatherScaled has no kernel for float32"
    assert caplog.messages == [expected]


def test_enqueue_launches_the_plan_of_the_last_shapes(
    creator: Any, launcher: RecordingLauncher, calls: list[Call]
) -> None:
    plugin = build(creator)
    calls.clear()
    for num_tokens in (3, 4):
        plugin.on_shape_change(inputs_of(num_tokens), outputs_of(num_tokens))
    enqueue(plugin, 4, [0x100, 0x200, 0x300], [0x400, 0x100, 0x500])
    assert calls[1] == Call(
        shapes={"table": (100, 2, 8), "rows": (4,), "scales": (4,)},
        dtypes={"table": "bfloat16", "rows": "int32", "scales": "bfloat16"},
        attributes={"factor": 0.5, "offset": -3, "mode": "plain"},
    )
    ((plan, pointers, workspace, stream),) = launcher.launched
    assert plan.launches[0].grid == (4, 1, 1)
    assert pointers == {
        "table": 0x100,
        "rows": 0x200,
        "scales": 0x300,
        "out": 0x400,
        "table_out": 0x100,
        "count": 0x500,
    }
    assert (workspace, stream) == (0x9000, 0xABC)


def test_enqueue_refuses_what_would_corrupt_memory(creator: Any, launcher: RecordingLauncher) -> None:
    plugin = build(creator)
    with pytest.raises(PluginError, match="before it got shapes"):
        enqueue(plugin, 4, [0x100, 0x200, 0x300], [0x400, 0x100, 0x500])
    plugin.on_shape_change(inputs_of(4), outputs_of(4))
    with pytest.raises(PluginError, match="table_out is at 0x600 and not in the memory of table, at 0x100"):
        enqueue(plugin, 4, [0x100, 0x200, 0x300], [0x400, 0x600, 0x500])
    with pytest.raises(PluginError, match=r"scales has shape \(5,\), expected num_tokens = 4"):
        plugin.on_shape_change([*inputs_of(4)[:2], desc(D.BF16, 5)], outputs_of(4))
    assert launcher.launched == []


def test_clones_share_nothing_that_changes(creator: Any, launcher: RecordingLauncher) -> None:
    plugin = build(creator, factor=0.25)
    plugin.on_shape_change(inputs_of(3), outputs_of(3))
    clones = [plugin.clone(), plugin.attach_to_context(None)]
    for number, clone in enumerate(clones, start=5):
        clone.on_shape_change(inputs_of(number), outputs_of(number))
    for each in (plugin, *clones):
        enqueue(each, 0, [0x100, 0x200, 0x300], [0x400, 0x100, 0x500])
    assert [plan.launches[0].grid[0] for plan, *_ in launcher.launched] == [3, 5, 6]
    serialized = [
        {field.name: field.data.tolist() for field in each.get_fields_to_serialize()}
        for each in (plugin, *clones)
    ]
    assert serialized[0] == serialized[1] == serialized[2]


def node_model(*inputs: str, domain: str = DOMAIN) -> onnx.ModelProto:
    node = onnx.helper.make_node("GatherScaled", inputs, ["out", "table_out"], domain=domain, factor=0.5)
    return onnx.helper.make_model(onnx.helper.make_graph([node], "test", [], []))


@pytest.mark.parametrize(
    ("inputs", "kept", "names"),
    [
        (("a", "b", "", "d"), ["a", "b", "d"], b"table,rows,scales"),
        (("a", "b", "c", ""), ["a", "b", "c"], b"table,rows,bias"),
        (("a", "b"), ["a", "b"], b"table,rows"),
    ],
)
def test_nodes_say_which_inputs_they_have(inputs: Any, kept: list[str], names: bytes) -> None:
    model = node_model(*inputs)
    name_inputs(model, {GATHER: None})
    (node,) = model.graph.node
    assert list(node.input) == kept
    assert [a.s for a in node.attribute if a.name == "input_names"] == [names]


def test_nodes_of_other_domains_stay_as_they_are() -> None:
    model = node_model("a", "b", "", "d", domain="other")
    name_inputs(model, {GATHER: None})
    assert model == node_model("a", "b", "", "d", domain="other")


def test_tensorrt_rtx_is_refused() -> None:
    with pytest.raises(PluginError, match="TensorRT-RTX takes no plugins"):
        register(tensorrt_rtx, {}, EMPTY)


def test_an_operator_is_registered_once() -> None:
    registered: list[tuple[str, str]] = []

    def register_creator(creator: Any, namespace: str) -> bool:
        if (creator.name, namespace) in registered:
            return False
        registered.append((creator.name, namespace))
        return True

    registry = SimpleNamespace(register_creator=register_creator)
    full = SimpleNamespace(**vars(trt) | {"__name__": "tensorrt", "get_plugin_registry": lambda: registry})
    operators = {GATHER: Kernels(plan_gather, lambda call, arch: (KERNEL,))}
    register(full, operators, EMPTY)
    assert registered == [("GatherScaled", DOMAIN)]
    with pytest.raises(PluginError, match="GatherScaled is registered already"):
        register(full, operators, EMPTY)
