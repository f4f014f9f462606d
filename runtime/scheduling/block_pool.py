"""Which blocks of the paged cache are free, and how many owners the others have."""

from __future__ import annotations

from collections.abc import Iterable

from trtforge.errors import CapacityError
from trtforge.runtime.scheduling.prefix_cache import PrefixCache


class BlockPool:
    """`num_blocks` block ids from 0 on; each is owned, or free and empty, or free and still holds a prefix.

    Free blocks with a prefix are given out when there are no empty ones, the least recently used first.
    """

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache | None = None) -> None:
        self._prefix_cache = prefix_cache
        self._ref_counts = [0] * num_blocks
        # Last in, first out: recently freed blocks are the likeliest to be in a processor's caches.
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._evictable: dict[int, None] = {}  # in order of their last use

    @property
    def num_blocks(self) -> int:
        """All blocks, free or not."""
        return len(self._ref_counts)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can give out now."""
        return len(self._empty) + len(self._evictable)

    def ref_count(self, block: int) -> int:
        """Owners of `block`; 0 if it is free."""
        return self._ref_counts[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks; the caller becomes their only owner.

        Raises CapacityError, and takes none, if fewer are free.
        """
        if num_blocks > self.num_free_blocks:
            raise CapacityError(
                f"{num_blocks} blocks wanted, {self.num_free_blocks} of {self.num_blocks} are free"
            )
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one owner to each block, which is owned or holds a prefix."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._evictable[block]
            self._ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one ownership of each block; a block without owners becomes free.

        Raises RuntimeError for a block that has no owner.
        """
        for block in blocks:
            if self._ref_counts[block] == 0:
                raise RuntimeError(f"block {block} is freed but has no owner")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._prefix_cache is not None and block in self._prefix_cache:
                    self._evictable[block] = None
                else:
                    self._empty.append(block)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every block without owners is free exactly once."""
        unowned = [block for block, count in enumerate(self._ref_counts) if count == 0]
        free = sorted([*self._empty, *self._evictable])
        if free != unowned:
            raise RuntimeError(f"the free blocks {free} differ from the blocks without owners {unowned}")
        if self._prefix_cache is not None:
            self._prefix_cache.check_integrity()
            for block in unowned:
                if (block in self._evictable) != (block in self._prefix_cache):
                    raise RuntimeError(f"free block {block} is in the wrong list for its prefix")

    def _evict(self) -> int:
        block = next(iter(self._evictable))
        del self._evictable[block]
        if self._prefix_cache is not None:
            self._prefix_cache.forget(block)
        return block
