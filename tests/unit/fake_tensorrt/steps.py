"""Steps for tests of TensorRTExecutor, and what the fake driver has recorded of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from trtforge.runtime.executor import ModelInputs

INPUT_NAMES = set(ModelInputs.__slots__)


def step(num_seqs: int, num_tokens: int = 1, past: int = 0) -> ModelInputs:
    """`num_tokens` new ones of each sequence, which has `past` others, in blocks of its own; all logits."""
    length = past + num_tokens
    width = -(-length // 32)
    positions = np.tile(np.arange(past, length), num_seqs)
    tables = np.arange(num_seqs * width).reshape(num_seqs, width)
    rows = np.repeat(np.arange(num_seqs), num_tokens)
    arrays = {
        "input_ids": positions % 100,
        "position_ids": positions,
        "block_tables": tables,
        "cu_seqlens": np.arange(num_seqs + 1) * num_tokens,
        "context_lens": np.full(num_seqs, length),
        "slot_mapping": tables[rows, positions // 32] * 32 + positions % 32,
        "logits_indices": np.arange(num_seqs * num_tokens),
    }
    return ModelInputs(**{name: array.astype(np.int32) for name, array in arrays.items()})


def names(calls: Iterable[str]) -> Counter[str]:
    return Counter(call.split()[0] for call in calls)
