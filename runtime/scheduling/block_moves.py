"""What a step moves between blocks before it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

Move = tuple[int, int]  # (from, to)


@dataclass(slots=True)
class BlockMoves:
    """Whole blocks, all layers of them, moved in this order: out, in, copies. A block or a host block that is
    written is not read later in the same kind of move."""

    swap_out: list[Move] = field(default_factory=list)  # block to host block
    swap_in: list[Move] = field(default_factory=list)  # host block to block
    copies: list[Move] = field(default_factory=list)  # block to block

    def __bool__(self) -> bool:
        return bool(self.swap_out or self.swap_in or self.copies)
