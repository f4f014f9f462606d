"""The builder's graphs in `onnx.reference`, with the operators' own references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from trtforge import wire
from trtforge.checking.onnxruntime_model import OnnxRuntimeModel
from trtforge.manifest import DType, Manifest
from trtforge.plugins.onnx_reference import reference_ops
from trtforge.runtime.executor import ModelInputs

LENGTHS = (5, 3)


def test_a_graph_with_custom_nodes_computes_what_its_bodies_do(
    export_tiny_llama: Callable[[DType], tuple[Path, Manifest]],
) -> None:
    folder, manifest = export_tiny_llama("float32")
    model = OnnxRuntimeModel(folder, manifest)
    block_size = model.kv_cache_spec().block_size
    positions = np.concatenate([np.arange(length) for length in LENGTHS])
    inputs = {
        "input_ids": np.arange(8) + 5,
        "position_ids": positions,
        "block_tables": np.array([[1], [3]]),
        "cu_seqlens": np.array([0, 5, 8]),
        "context_lens": np.array(LENGTHS),
        "slot_mapping": positions + block_size * np.array([1] * 5 + [3] * 3),
        "logits_indices": np.array([4, 7]),
    }
    inputs = {name: array.astype(np.int32) for name, array in inputs.items()}
    cache = manifest.kv_cache
    caches = {
        wire.kv_cache_input(index): np.zeros(
            (cache.num_blocks, 2, block_size, layer.num_kv_heads, layer.head_dim), np.float32
        )
        for index, layer in enumerate(cache.layers)
    }
    graph = onnx.load(folder / manifest.ranks[0].onnx)  # with its weights
    evaluator = ReferenceEvaluator(graph, new_ops=list(reference_ops()))
    (logits,) = evaluator.run([wire.LOGITS], inputs | caches)
    expected = model.execute(ModelInputs(**inputs)).logits
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
