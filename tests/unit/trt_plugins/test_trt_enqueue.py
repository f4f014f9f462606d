"""Plugins in an engine: shapes that change, and launches."""

from __future__ import annotations

from typing import Any

import pytest
from trt_plugins.gather import (
    D,
    RecordingLauncher,
    build,
    desc,
    enqueue,
    inputs_of,
    outputs_of,
)

from trtforge.errors import PluginError
from trtforge.plugins.launch import Call


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
