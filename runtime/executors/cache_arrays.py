"""Moves blocks of caches that numpy can see."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trtforge.runtime.scheduling.block_moves import BlockMoves, Move


def move_blocks(moves: BlockMoves, blocks: npt.NDArray[Any], host_blocks: npt.NDArray[Any]) -> None:
    """Apply `moves` to one cache, [num_blocks, ...], and its host memory, [num_host_blocks, ...]."""
    _copy(moves.swap_out, blocks, host_blocks)
    _copy(moves.swap_in, host_blocks, blocks)
    _copy(moves.copies, blocks, blocks)


def _copy(moves: list[Move], source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    if moves:
        sources, targets = np.array(moves).T
        target[targets] = source[sources]
