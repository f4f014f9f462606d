"""Which blocks of the paged cache hold which tokens after which prefix."""

from __future__ import annotations

from itertools import count

# What came before a block: the number of the block content in front of it, or the request's salt.
Prefix = int | str


class PrefixCache:
    """Full blocks by their content: their own tokens and everything in front of them.

    A block is found under (prefix, tokens), where `prefix` is the number that the content in front of it
    got when it was inserted. So the tokens themselves are compared, over the whole chain, and two contents
    can't be taken for each other however hashes fall. Numbers are never used again: when a block is
    forgotten, those behind it can't be found any more, and age until they are forgotten too.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[Prefix, bytes], tuple[int, int]] = {}  # to (block, its number)
        self._keys: dict[int, tuple[Prefix, bytes]] = {}  # by block
        self._numbers = count(1)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def find(self, prefix: Prefix, tokens: bytes) -> tuple[int, int] | None:
        """The block with these tokens behind `prefix`, and the number under which others follow it."""
        return self._entries.get((prefix, tokens))

    def insert(self, prefix: Prefix, tokens: bytes, block: int) -> int:
        """Remember that `block` holds these tokens, unless another one does; returns their number."""
        key = (prefix, tokens)
        found = self._entries.get(key)
        if found is not None:
            return found[1]
        number = next(self._numbers)
        self._entries[key] = (block, number)
        self._keys[block] = key
        return number

    def forget(self, block: int) -> None:
        """The block's content is about to change. Raises KeyError if it is not in the cache."""
        del self._entries[self._keys.pop(block)]

    def check_integrity(self) -> None:
        """Raise RuntimeError unless blocks and contents point at each other."""
        if {block: key for key, (block, _) in self._entries.items()} != self._keys:
            raise RuntimeError("the prefix cache's blocks and contents disagree")
