"""Packs tokens of named sequences into steps, with block tables of their own and no scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from trtforge.runtime.executor import ModelInputs

# A token that exists in every vocabulary worth testing; its row is not looked at.
_PADDING_TOKEN = 3


class PackedSequences:
    """Remembers the tokens and blocks of each sequence."""

    def __init__(self, block_size: int, block_order: Iterable[int]) -> None:
        """Blocks of `block_size` tokens are given out in `block_order`."""
        self._block_size = block_size
        self._free_blocks = list(block_order)[::-1]
        self._tokens: dict[str, list[int]] = {}
        self._blocks: dict[str, list[int]] = {}

    def step(
        self,
        new_tokens: Mapping[str, Sequence[int]],
        logits_indices: Sequence[int] | None = None,
        *,
        num_padding: int = 0,
    ) -> ModelInputs:
        """Append tokens to sequences; by default the logits of all of them are wanted.

        `num_padding` rows follow that belong to no sequence and are not stored.
        """
        positions: list[int] = []
        slots: list[int] = []
        for name, new in new_tokens.items():
            tokens, blocks = self._tokens.setdefault(name, []), self._blocks.setdefault(name, [])
            new_positions = range(len(tokens), len(tokens) + len(new))
            tokens += new
            while len(blocks) * self._block_size < len(tokens):
                blocks.append(self._free_blocks.pop())
            positions += new_positions
            slots += [
                blocks[position // self._block_size] * self._block_size + position % self._block_size
                for position in new_positions
            ]
        tables = np.zeros((len(new_tokens), max(len(self._blocks[name]) for name in new_tokens)), np.int32)
        for row, name in enumerate(new_tokens):
            tables[row, : len(self._blocks[name])] = self._blocks[name]
        ids = [token for new in new_tokens.values() for token in new]
        return ModelInputs(
            input_ids=np.asarray(ids + [_PADDING_TOKEN] * num_padding, np.int32),
            position_ids=np.asarray(positions + [0] * num_padding, np.int32),
            block_tables=tables,
            cu_seqlens=np.cumsum([0, *map(len, new_tokens.values())], dtype=np.int32),
            context_lens=np.asarray([len(self._tokens[name]) for name in new_tokens], np.int32),
            slot_mapping=np.asarray(slots + [-1] * num_padding, np.int32),
            logits_indices=np.asarray(
                range(len(positions)) if logits_indices is None else logits_indices, np.int32
            ),
        )

    def free(self, name: str) -> None:
        """Forget a sequence; its blocks are the next ones given out."""
        del self._tokens[name]
        self._free_blocks += self._blocks.pop(name)
