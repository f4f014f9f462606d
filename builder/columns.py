"""Some columns of a matrix that is read a few MiB at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ranges: TypeAlias = tuple[tuple[int, int], ...]  # start and stop of each, ascending


@dataclass(frozen=True, slots=True)
class Columns:
    """The `ranges` of rows that have `size` elements each."""

    size: int
    ranges: Ranges

    def of(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What of the last axis is in these columns."""
        return np.concatenate([array[..., start:stop] for start, stop in self.ranges], axis=-1)

    def keep(self, chunks: Iterable[bytes], element_bytes: int) -> Iterator[bytes]:
        """What of the matrix in `chunks` is in these columns. Chunks may end within a row."""
        row_bytes = self.size * element_bytes
        rest = b""
        for chunk in chunks:
            data = rest + chunk
            num_rows = len(data) // row_bytes
            rows = np.frombuffer(data, np.uint8, num_rows * row_bytes).reshape(num_rows, row_bytes)
            kept = [rows[:, start * element_bytes : stop * element_bytes] for start, stop in self.ranges]
            yield np.concatenate(kept, axis=1).tobytes()
            rest = data[num_rows * row_bytes :]
