"""Memory that processes share without a name: nothing of it is left when the last of them has ended."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64  # bytes; a cache line


def aligned(num_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class SharedMemory:
    """A file in memory that has no path. Children get its descriptor.

    Pages cost nothing until they are written to, so that sizes may be those of the largest step.
    """

    def __init__(self, fd: int) -> None:
        """Map all of the file behind `fd`, which may be closed then."""
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)

    @classmethod
    def create(cls, num_bytes: int) -> tuple[SharedMemory, int]:
        """Zeroed memory and its descriptor, which the caller closes."""
        fd = os.memfd_create("trtforge-ranks")
        os.ftruncate(fd, num_bytes)
        return cls(fd), fd

    def array(self, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """What is at `offset` bytes, as an array."""
        return np.ndarray(shape, dtype, self._map, offset)

    def integers(self, offset: int, count: int) -> memoryview:
        """`count` integers of 64 bits, which are written and read whole."""
        return memoryview(self._map)[offset : offset + 8 * count].cast("q")
