"""Loops of control flow graphs whose loops are known."""

from __future__ import annotations

import pytest
from kernel_harness.loops import natural_loops


@pytest.mark.parametrize(
    ("successors", "loops"),
    [
        ({0: [1], 1: [2], 2: []}, []),
        ({0: [1], 1: [1, 2], 2: []}, [{1}]),
        ({0: [1], 1: [2], 2: [2, 3], 3: [1, 4], 4: []}, [{1, 2, 3}, {2}]),
        # A branch within the loop, and a part of it that lies behind its end.
        ({0: [1], 1: [2, 5], 2: [3], 3: [1, 4], 4: [], 5: [5, 2]}, [{1, 2, 3, 5}, {5}]),
        # Two edges back to one header are one loop; code that nothing reaches is none.
        ({0: [1], 1: [2, 3], 2: [1], 3: [1, 4], 4: [], 6: [6]}, [{1, 2, 3}]),
    ],
)
def test_natural_loops(successors: dict[int, list[int]], loops: list[set[int]]) -> None:
    assert natural_loops(successors) == loops
