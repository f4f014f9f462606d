"""Decode steps that are replayed from CUDA graphs give what they give one by one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from trtforge.manifest import Limits
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.executors.decode_batches import step_arrays
from trtforge.runtime.executors.decode_graphs import DecodeGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU"),
]

LIMITS = Limits(max_model_len=100, max_num_seqs=9, max_num_batched_tokens=64)
BLOCK_SIZE = 16
VOCAB_SIZE = 50


def run_step(inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in which every input has its part."""
    per_token = inputs["input_ids"] + 3 * inputs["position_ids"] + 5 * inputs["slot_mapping"]
    per_sequence = 7 * inputs["context_lens"] + 11 * inputs["block_tables"].sum(1)
    per_token = per_token + per_sequence * inputs["cu_seqlens"].diff()
    vocabulary = torch.arange(1, VOCAB_SIZE + 1, device="cuda")
    logits = torch.sin(per_token[:, None].float() * vocabulary)[inputs["logits_indices"]]
    return logits, logits.argmax(-1).int()


@pytest.fixture(scope="module")
def graphs() -> DecodeGraphs:
    return DecodeGraphs(run_step, torch.device("cuda"), LIMITS, BLOCK_SIZE)


def decode_step(rng: np.random.Generator, num_seqs: int) -> ModelInputs:
    numbers = {
        name: rng.integers(90, size=num_seqs) for name in ("input_ids", "position_ids", "slot_mapping")
    }
    step = numbers | {
        "block_tables": rng.integers(20, size=(num_seqs, 6)),
        "cu_seqlens": np.arange(num_seqs + 1),
        "context_lens": rng.integers(1, 96, size=num_seqs),
        "logits_indices": rng.permutation(num_seqs)[: rng.integers(1, num_seqs + 1)],
    }
    return ModelInputs(**{name: array.astype(np.int32) for name, array in step.items()})


def test_replayed_steps_equal_eager_ones(graphs: DecodeGraphs) -> None:
    rng = np.random.default_rng(0)
    for num_seqs in (9, 1, 4, 3, 7, 9, 2, 1):
        inputs = decode_step(rng, num_seqs)
        outputs = graphs.run(inputs)
        assert outputs is not None
        eager = run_step({k: torch.from_numpy(array).cuda() for k, array in step_arrays(inputs).items()})
        for replayed, expected in zip(outputs, eager, strict=True):
            torch.testing.assert_close(replayed, expected, rtol=0, atol=0)


def test_other_steps_have_no_graph(graphs: DecodeGraphs) -> None:
    rng = np.random.default_rng(1)
    assert graphs.run(decode_step(rng, 10)) is None  # more sequences than max_num_seqs
    prefill = decode_step(rng, 4)
    prefill = ModelInputs(**(step_arrays(prefill) | {"context_lens": np.array([2, 2], np.int32)}))
    assert graphs.run(prefill) is None
