"""An exported model's graph tells all that its kernels depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import TensorProto, helper
from onnxscript import ir

from trtforge.errors import PluginError
from trtforge.manifest import DType, Manifest
from trtforge.plugins.graph_calls import calls_of
from trtforge.plugins.launch import Call
from trtforge.plugins.op import DOMAIN


def test_calls_of_a_llama(export_tiny_llama: Callable[[DType], tuple[Path, Manifest]]) -> None:
    folder, manifest = export_tiny_llama("bfloat16")
    calls = calls_of(ir.load(folder / manifest.ranks[0].onnx), {"block_size": 16})
    attention = [call for name, call in calls if name == "PagedAttention"]
    # Both layers are alike. Tokens, sequences and blocks vary from step to step.
    assert attention == [
        Call(
            shapes={
                "q": (-1, 4, 16),
                "k": (-1, 2, 16),
                "v": (-1, 2, 16),
                "kv_cache": (-1, 2, 16, 2, 16),
                "block_tables": (-1, -1),
                "cu_seqlens": (-1,),
                "context_lens": (-1,),
                "slot_mapping": (-1,),
            },
            dtypes=dict.fromkeys(("q", "k", "v", "kv_cache"), "bfloat16")
            | dict.fromkeys(("block_tables", "cu_seqlens", "context_lens", "slot_mapping"), "int32"),
            attributes={"scale": 0.25, "window": 0, "softcap": 0.0},
        )
    ]
    # The graph has [T, 1, 64] for the declared [T, 64].
    assert {call.shapes["x"] for name, call in calls if name == "Linear"} == {(-1, 64), (-1, 96)}
    weights = {call.shapes["weight"] for name, call in calls if name == "Linear"}
    assert weights == {(64, 64), (32, 64), (96, 64), (64, 96), (128, 64)}


@pytest.mark.parametrize(
    ("operator", "shape", "message"),
    [
        ("Linear", None, "does not tell shape and dtype of x"),
        ("Convolution", (1, 2), "trtforge::Convolution, which is not known here"),
    ],
)
def test_graphs_that_are_not_understood(operator: str, shape: tuple[int, ...] | None, message: str) -> None:
    node = helper.make_node(operator, ["x", "weight"], ["y"], domain=DOMAIN)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "weight", "y")]
    graph = helper.make_graph([node], "test", values[:2], values[2:])
    with pytest.raises(PluginError, match=message):
        calls_of(ir.from_proto(helper.make_model(graph)), {})
