"""Which blocks of the paged cache are free, and how many owners the others have."""

from __future__ import annotations

from collections.abc import Iterable

from trtforge.errors import CapacityError


class BlockPool:
    """`num_blocks` block ids from 0 on; each is either free or has at least one owner."""

    def __init__(self, num_blocks: int) -> None:
        self._ref_counts = [0] * num_blocks
        # Last in, first out: recently freed blocks are the likeliest to be in a processor's caches.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_blocks(self) -> int:
        """All blocks, free or not."""
        return len(self._ref_counts)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can give out now."""
        return len(self._free)

    def ref_count(self, block: int) -> int:
        """Owners of `block`; 0 if it is free."""
        return self._ref_counts[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks; the caller becomes their only owner.

        Raises CapacityError, and takes none, if fewer are free.
        """
        if num_blocks > len(self._free):
            raise CapacityError(
                f"{num_blocks} blocks wanted, {len(self._free)} of {self.num_blocks} are free"
            )
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one ownership of each block; a block without owners becomes free.

        Raises RuntimeError for a block that has no owner.
        """
        for block in blocks:
            if self._ref_counts[block] == 0:
                raise RuntimeError(f"block {block} is freed but has no owner")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free.append(block)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the free list holds every block without owners exactly once."""
        unowned = [block for block, count in enumerate(self._ref_counts) if count == 0]
        if sorted(self._free) != unowned:
            raise RuntimeError(
                f"free list {sorted(self._free)} differs from the blocks without owners {unowned}"
            )
