"""Gives sequences their places in the paged cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from trtforge.runtime.scheduling.block_moves import BlockMoves
from trtforge.runtime.scheduling.block_pool import BlockPool
from trtforge.runtime.scheduling.prefix_cache import PrefixCache
from trtforge.runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """The cache as it is allocated, and what is kept in it."""

    num_blocks: int
    block_size: int  # tokens
    num_host_blocks: int = 0  # for swapped sequences
    prefix_caching: bool = True
    window: int | None = None  # tokens that the layer with the longest view sees; None: all


class KVCacheManager:
    """Block tables of all sequences over one pool of blocks.

    What has to be moved because of its decisions gathers until `take_moves`.
    """

    def __init__(self, config: KVCacheConfig) -> None:
        self._block_size = config.block_size
        self._window = config.window
        self._prefixes = PrefixCache() if config.prefix_caching else None
        self._pool = BlockPool(config.num_blocks, self._prefixes)
        self._host_pool = BlockPool(config.num_host_blocks)
        self._moves = BlockMoves()
        self.num_prefix_queries = 0  # tokens looked up so far
        self.num_prefix_hits = 0  # of which found
        self.num_swapped_blocks = 0  # moved to host memory so far

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._block_size

    @property
    def has_window(self) -> bool:
        """Whether blocks are given back while their sequence runs."""
        return self._window is not None

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks with a prefix that a request could use, whether a sequence holds them or not."""
        return 0 if self._prefixes is None else len(self._prefixes)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that the first `num_tokens` tokens of a sequence occupy."""
        return -(-num_tokens // self._block_size)

    def max_sequences(self, num_tokens: int) -> int:
        """How many sequences of `num_tokens` tokens the whole cache holds."""
        return self._pool.num_blocks // self.num_blocks_for(num_tokens)

    def take_moves(self) -> BlockMoves:
        """What has to be moved before the blocks are used as decided since the last call."""
        moves, self._moves = self._moves, BlockMoves()
        return moves

    # ------------------------------------------------------------------ sequences that come and go

    def admit(self, sequence: Sequence, num_spare_blocks: int) -> bool:
        """Give a sequence without blocks those of all its known tokens, as far as possible cached ones.

        `num_computed_tokens` is what need not be computed. Returns False, and changes nothing, unless
        `num_spare_blocks` are still free then.
        """
        num_blocks = self.num_blocks_for(len(sequence.token_ids))
        if sequence.host_blocks:
            return self._swap_in(sequence, num_blocks, num_spare_blocks)
        hits = self._find_prefix(sequence)
        blocks = [block for block, _ in hits]
        num_new = num_blocks - len(blocks)
        num_revived = sum(self._pool.ref_count(block) == 0 for block in blocks)
        if num_new + num_revived + num_spare_blocks > self._pool.num_free_blocks:
            return False
        self._pool.share(blocks)
        sequence.block_table.extend(blocks)
        sequence.block_table.extend(self._pool.allocate(num_new))
        sequence.num_computed_tokens = len(blocks) * self._block_size
        sequence.num_cached_blocks = len(blocks)
        if hits:
            sequence.cache_parent = hits[-1][1]
        if self._prefixes is not None and sequence.status == "waiting":
            sequence.num_hit_tokens = sequence.num_computed_tokens
            self.num_prefix_queries += sequence.num_prompt_tokens
            self.num_prefix_hits += sequence.num_computed_tokens
        return True

    def fork(self, sequence: Sequence, child: Sequence, num_tokens: int) -> None:
        """Let `child`, which has no blocks, share the first `num_tokens` tokens that are in the cache."""
        num_released = sequence.num_released_blocks
        table = sequence.block_table[: self.num_blocks_for(num_tokens)]
        self._pool.share(table[num_released:])
        child.block_table = table
        child.num_released_blocks = num_released
        child.num_computed_tokens = num_tokens
        child.num_cached_blocks = sequence.num_cached_blocks
        sequence.num_safe_tokens = 0  # the last block is shared
        child.cache_parent = sequence.cache_parent

    def free(self, sequence: Sequence) -> None:
        """Give the sequence's blocks back; nothing of it is in the cache any more."""
        # Last blocks first: of a prefix that is no longer used its end is forgotten first.
        self._pool.free(reversed(sequence.block_table[sequence.num_released_blocks :]))
        self._host_pool.free(sequence.host_blocks)
        del sequence.block_table[:], sequence.host_blocks[:]
        sequence.num_computed_tokens = 0
        self._forget_table(sequence)

    def swap_out(self, sequence: Sequence) -> bool:
        """Move the sequence's blocks to host memory; False, and nothing is changed, if there is no room."""
        table = sequence.block_table[: self.num_blocks_for(sequence.num_computed_tokens)]
        if sequence.num_released_blocks or len(table) > self._host_pool.num_free_blocks or not table:
            return False
        sequence.host_blocks.extend(self._host_pool.allocate(len(table)))
        self._moves.swap_out += zip(table, sequence.host_blocks, strict=True)
        self.num_swapped_blocks += len(table)
        self._pool.free(reversed(sequence.block_table))
        del sequence.block_table[:]
        self._forget_table(sequence)
        return True

    # ------------------------------------------------------------------ sequences that run

    def allocate_slots(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Append blocks to the table until the tokens after `num_computed_tokens` have their slots.

            |   computed   |   num_new_tokens   |
            | blocks in the table | new blocks  |

        A last block that other sequences share is replaced by a copy, since the new tokens go into it.
        Returns False, and changes nothing, if the pool has too few free blocks. Not needed for tokens within
        `num_safe_tokens`.
        """
        table = sequence.block_table
        num_computed = sequence.num_computed_tokens
        first = num_computed // self._block_size
        num_missing = self.num_blocks_for(num_computed + num_new_tokens) - len(table)
        is_shared = False
        if first < len(table):  # else the new tokens begin a block
            is_shared = self._pool.ref_count(table[first]) > 1
            if not is_shared and self._prefixes is not None and table[first] in self._prefixes:
                # It was shared, and another owner has filled it in its own way before it left.
                self._prefixes.forget(table[first])
        num_missing = max(num_missing, 0)
        if num_missing + is_shared > self._pool.num_free_blocks:
            return False
        if is_shared:
            (copy,) = self._pool.allocate(1)
            self._moves.copies.append((table[first], copy))
            self._pool.free((table[first],))
            table[first] = copy
        if num_missing:
            table.extend(self._pool.allocate(num_missing))
        sequence.num_safe_tokens = len(table) * self._block_size
        return True

    def release_behind_window(self, sequence: Sequence) -> None:
        """Give back the blocks that no token from `num_computed_tokens` on can see."""
        if self._window is None:
            return
        num_invisible = (sequence.num_computed_tokens - self._window + 1) // self._block_size
        if self._prefixes is not None:  # not before the cache has been told of them
            num_invisible = min(num_invisible, sequence.num_cached_blocks)
        released = sequence.num_released_blocks
        if num_invisible > released:
            self._pool.free(sequence.block_table[released:num_invisible])
            sequence.num_released_blocks = num_invisible

    def cache_full_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others use the full blocks among the first `num_tokens` tokens, which have been computed."""
        size = self._block_size
        first = sequence.num_cached_blocks
        if self._prefixes is None or (first + 1) * size > num_tokens:
            return
        for index in range(first, num_tokens // size):
            tokens = sequence.token_ids[index * size : (index + 1) * size].tobytes()
            block = sequence.block_table[index]
            sequence.cache_parent = self._prefixes.insert(sequence.cache_parent, tokens, block)
        sequence.num_cached_blocks = num_tokens // size

    def forget_prefix(self, sequence: Sequence) -> None:
        """Let nobody else use the blocks that the sequence holds."""
        if self._prefixes is not None:
            for block in sequence.block_table[sequence.num_released_blocks :]:
                if block in self._prefixes:
                    self._prefixes.forget(block)

    # ------------------------------------------------------------------ integrity

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise RuntimeError if a block is lost or has other owners than the `sequences` that list it.

        `sequences` are all that may hold blocks, of the cache or of the host.
        """
        self._pool.check_integrity()
        self._host_pool.check_integrity()
        owners: Counter[int] = Counter()
        host_owners: Counter[int] = Counter()
        for sequence in sequences:
            owners.update(sequence.block_table[sequence.num_released_blocks :])
            host_owners.update(sequence.host_blocks)
            blocks = sequence.host_blocks or sequence.block_table
            if self.num_blocks_for(sequence.num_computed_tokens) > len(blocks):
                raise RuntimeError(
                    f"request {sequence.request_id}: {sequence.num_computed_tokens} computed tokens "
                    f"do not fit its {len(blocks)} blocks"
                )
        for pool, counted, kind in (
            (self._pool, owners, "block"),
            (self._host_pool, host_owners, "host block"),
        ):
            for block in range(pool.num_blocks):
                if counted[block] != pool.ref_count(block):
                    raise RuntimeError(
                        f"{kind} {block} is in {counted[block]} block tables "
                        f"but has {pool.ref_count(block)} owners"
                    )

    def _find_prefix(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Cached blocks from the first token on, and their numbers; one token at least is left to compute."""
        if self._prefixes is None or sequence.wants_prompt_logprobs:
            return []
        hits: list[tuple[int, int]] = []
        tokens = memoryview(sequence.token_ids).cast("B")
        num_bytes = self._block_size * sequence.token_ids.itemsize
        prefix: int | str = sequence.cache_salt
        for index in range((len(sequence.token_ids) - 1) // self._block_size):
            found = self._prefixes.find(prefix, bytes(tokens[index * num_bytes : (index + 1) * num_bytes]))
            if found is None:
                break
            hits.append(found)
            prefix = found[1]
        return hits

    def _swap_in(self, sequence: Sequence, num_blocks: int, num_spare_blocks: int) -> bool:
        if num_blocks + num_spare_blocks > self._pool.num_free_blocks:
            return False
        blocks = self._pool.allocate(num_blocks)
        sequence.block_table.extend(blocks)
        self._moves.swap_in += zip(sequence.host_blocks, blocks, strict=False)
        self._host_pool.free(sequence.host_blocks)
        del sequence.host_blocks[:]
        return True

    def _forget_table(self, sequence: Sequence) -> None:
        sequence.num_safe_tokens = 0
        sequence.num_released_blocks = 0
        sequence.num_cached_blocks = 0
        sequence.cache_parent = sequence.cache_salt
