"""A model whose attention runs by its kernels computes what it computes without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_harness.launcher import InterpreterLauncher

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.export import export_model, write_graph
from trtforge.manifest import KVCacheLayout, Limits, Manifest, ModelInfo, Rank
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.executors.decode_batches import pad_decode
from trtforge.runtime.executors.reference_executor import ReferenceExecutor

VOCAB_SIZE, BLOCK_SIZE, NUM_BLOCKS = 128, 16, 24


@pytest.fixture(scope="module")
def model(make_random_llama: Callable[..., Path]) -> tuple[Path, Manifest]:
    """The folder and manifest of a random llama in bfloat16."""
    folder = make_random_llama(vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=96, head_dim=64)
    exported = export_model(Checkpoint.open(str(folder)), "bfloat16")
    write_graph(exported, folder / "graph")
    manifest = Manifest(
        trtforge_version="0",
        build_key="test",
        runtime="reference",
        dtype="bfloat16",
        model=ModelInfo(
            name="tiny", architecture="Tiny", vocab_size=VOCAB_SIZE, num_parameters=1, eos_token_ids=()
        ),
        kv_cache=KVCacheLayout(
            dtype="bfloat16", block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, layers=exported.layers
        ),
        limits=Limits(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=128),
        ranks=(Rank(onnx="model.onnx", kv_layers=exported.layers, logits_columns=(0, VOCAB_SIZE)),),
        files={},
    )
    return folder / "graph", manifest


def step(new_lens: list[int], context_lens: list[int]) -> ModelInputs:
    """Random tokens; sequence i has blocks 8i to 8i + 7."""
    lens, contexts = np.array(new_lens), np.array(context_lens)
    tables = np.arange(8 * len(lens)).reshape(len(lens), 8)
    rows = np.repeat(np.arange(len(lens)), lens)
    cu_seqlens = np.cumsum([0, *lens])
    positions = np.arange(len(rows)) + (contexts - cu_seqlens[1:])[rows]
    arrays = {
        "input_ids": np.random.default_rng(len(rows)).integers(VOCAB_SIZE, size=len(rows)),
        "position_ids": positions,
        "block_tables": tables,
        "cu_seqlens": cu_seqlens,
        "context_lens": contexts,
        "slot_mapping": tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        "logits_indices": cu_seqlens[1:] - 1,
    }
    return ModelInputs(**{name: array.astype(np.int32) for name, array in arrays.items()})


def test_attention_by_kernels(model: tuple[Path, Manifest]) -> None:
    folder, manifest = model
    cpu = torch.device("cpu")
    by_torch = ReferenceExecutor(folder, manifest, device=cpu)
    by_kernels = ReferenceExecutor(folder, manifest, device=cpu, launcher=InterpreterLauncher())
    decode = step([1, 1, 1], [37, 23, 12])
    for inputs, given in (
        (step([35, 18], [35, 18]), None),  # prefills
        (step([1, 4, 11], [36, 22, 11]), None),  # a decode, a chunk, a prefill
        (decode, pad_decode(decode, num_seqs=8, num_blocks=8)),  # as a CUDA graph gets it
    ):
        expected = by_torch.execute(inputs).logits
        logits = by_kernels.execute(given or inputs).logits[: len(expected)]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=0.04 * np.abs(expected).max())
