"""The steps that every runtime is given: prefill, chunks and decodes of a few sequences of random tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtforge.checking.packing import PackedSequences
from trtforge.runtime.executor import ModelInputs

# What each step appends to the sequences a, b and c, which cross blocks of 16 and of 32 tokens. In a mixed
# step a chunk of a prompt, a decode and a prefill meet.
_STEPS: Mapping[str, Sequence[Mapping[str, int]]] = {
    "prefill": ({"a": 40, "b": 17},),
    "mixed": ({"a": 33, "b": 1, "c": 5},),
    "decode": ({"c": 1, "a": 1, "b": 1}, {"a": 1, "b": 1, "c": 1}, {"b": 1, "c": 1}),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step's inputs; all of its tokens' logits are wanted."""

    kind: str
    inputs: ModelInputs


def num_blocks(block_size: int) -> int:
    """Blocks that the schedule needs, with some that nobody uses between them."""
    return 2 * sum(-(-length // block_size) for length in _lengths().values())


def make_steps(seed: int, vocab_size: int, block_size: int, max_model_len: int) -> list[Step]:
    """The schedule with tokens and block numbers drawn from `seed`.

    Sequences end at `max_model_len` tokens, which leaves steps out of the schedule where it is short.
    """
    rng = np.random.default_rng(seed)
    texts = {name: rng.integers(vocab_size, size=length).tolist() for name, length in _lengths().items()}
    left = {name: text[:max_model_len] for name, text in texts.items()}
    sequences = PackedSequences(block_size, rng.permutation(num_blocks(block_size)).tolist())
    steps = []
    for kind, sizes_of_steps in _STEPS.items():
        for sizes in sizes_of_steps:
            new_tokens = {name: left[name][:size] for name, size in sizes.items() if left[name]}
            if new_tokens:
                steps.append(Step(kind, sequences.step(new_tokens)))
                left |= {name: left[name][len(new) :] for name, new in new_tokens.items()}
    return steps


def _lengths() -> dict[str, int]:
    lengths: dict[str, int] = {}
    for sizes_of_steps in _STEPS.values():
        for sizes in sizes_of_steps:
            for name, size in sizes.items():
                lengths[name] = lengths.get(name, 0) + size
    return lengths
