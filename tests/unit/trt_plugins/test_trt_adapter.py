"""Plugins and creators: what they say while an engine is built, and their registration."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from trt_plugins.gather import (
    EMPTY,
    GATHER,
    KERNEL,
    Builder,
    D,
    RecordingLauncher,
    build,
    create,
    desc,
    dynamic,
    inputs_of,
    outputs_of,
    parsed_fields,
    plan_gather,
    profile,
    tensorrt_rtx,
    trt,
)

from trtforge.errors import PluginError
from trtforge.plugins.launch import Call, Kernels
from trtforge.plugins.op import DOMAIN
from trtforge.plugins.trt_adapter import name_inputs, register


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


def test_what_kernels_refuse_is_logged_with_its_reason(
    creator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = [dynamic(tensor) for tensor in inputs_of(4, D.FLOAT)]
    with pytest.raises(PluginError, match="no kernel for float32"):
        create(creator).get_workspace_size(tensors, [])
    expected = "plugin layer.0 (GatherScaled), get_workspace_size: GatherScaled has no kernel for float32"
    assert caplog.messages == [expected]


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
