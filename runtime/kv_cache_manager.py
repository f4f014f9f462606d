"""Gives sequences their places in the paged cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from trtforge.runtime.block_pool import BlockPool
from trtforge.runtime.sequence import Sequence


class KVCacheManager:
    """Block tables of all sequences over one pool of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._pool = BlockPool(num_blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.num_free_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that the first `num_tokens` tokens of a sequence occupy."""
        return -(-num_tokens // self._block_size)

    def max_sequences(self, num_tokens: int) -> int:
        """How many sequences of `num_tokens` tokens the whole cache holds."""
        return self._pool.num_blocks // self.num_blocks_for(num_tokens)

    def allocate_slots(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Append blocks to the table until the tokens after `num_computed_tokens` have their slots.

            |   computed   |   num_new_tokens   |
            | blocks in the table | new blocks  |

        Returns False, and changes nothing, if the pool has too few free blocks.
        """
        num_tokens = sequence.num_computed_tokens + num_new_tokens
        num_missing = self.num_blocks_for(num_tokens) - len(sequence.block_table)
        if num_missing <= 0:
            return True
        if num_missing > self._pool.num_free_blocks:
            return False
        sequence.block_table.extend(self._pool.allocate(num_missing))
        return True

    def free(self, sequence: Sequence) -> None:
        """Give the sequence's blocks back; nothing of it is in the cache any more."""
        # Last blocks first, so that they are given out in the order of the table again.
        self._pool.free(reversed(sequence.block_table))
        del sequence.block_table[:]
        sequence.num_computed_tokens = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise RuntimeError if a block is lost or has other owners than the `sequences` that list it.

        `sequences` are all that may hold blocks.
        """
        self._pool.check_integrity()
        owners: Counter[int] = Counter()
        for sequence in sequences:
            owners.update(sequence.block_table)
            if self.num_blocks_for(sequence.num_computed_tokens) > len(sequence.block_table):
                raise RuntimeError(
                    f"request {sequence.request_id}: {sequence.num_computed_tokens} computed tokens "
                    f"do not fit its {len(sequence.block_table)} blocks"
                )
        for block in range(self._pool.num_blocks):
            if owners[block] != self._pool.ref_count(block):
                raise RuntimeError(
                    f"block {block} is in {owners[block]} block tables "
                    f"but has {self._pool.ref_count(block)} owners"
                )
