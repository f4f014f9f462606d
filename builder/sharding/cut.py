"""Which part of a tensor's axis each rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from trtforge.builder.sharding.split import Range

Ranges: TypeAlias = tuple[Range, ...]  # ascending, apart from each other or adjacent


def length(ranges: Ranges) -> int:
    """Elements in all of them."""
    return sum(stop - start for start, stop in ranges)


@dataclass(frozen=True, slots=True)
class Cut:
    """Each rank has of an axis with `size` elements those in its `ranges`, one after the other.

    A cut of a `window` speaks of the elements in it alone, and says nothing of the others.
    """

    axis: int
    size: int
    ranges: tuple[Ranges, ...]  # by rank
    window: Range

    @classmethod
    def of(cls, axis: int, ranges: Sequence[Range]) -> Cut:
        """The whole axis, one range for each rank; they may overlap."""
        size = max(stop for _, stop in ranges)
        return cls(axis, size, tuple((part,) for part in ranges), (0, size))

    @property
    def is_whole(self) -> bool:
        """Whether it speaks of the whole axis."""
        return self.window == (0, self.size)

    @property
    def copies(self) -> list[int]:
        """How many ranks have each element."""
        counts = [0] * self.size
        for ranges in self.ranges:
            for start, stop in ranges:
                for index in range(start, stop):
                    counts[index] += 1
        return counts

    def at(self, axis: int) -> Cut:
        """The same of another axis of that size."""
        return replace(self, axis=axis)

    def scaled(self, axis: int, numerator: int, denominator: int) -> Cut | None:
        """With `numerator` elements for each `denominator` of them; None if that cuts through one."""
        numbers = {
            self.size,
            *self.window,
            *(end for ranges in self.ranges for part in ranges for end in part),
        }
        if any(number * numerator % denominator for number in numbers):
            return None

        def scale(part: Range) -> Range:
            return part[0] * numerator // denominator, part[1] * numerator // denominator

        ranges = tuple(tuple(scale(part) for part in ranges) for ranges in self.ranges)
        return Cut(axis, self.size * numerator // denominator, ranges, scale(self.window))

    def moved(self, axis: int, size: int, start: int) -> Cut:
        """Of an axis with `size` elements, of which this cut's are those from `start` on."""

        def move(part: Range) -> Range:
            return part[0] + start, part[1] + start

        ranges = tuple(tuple(move(part) for part in ranges) for ranges in self.ranges)
        return Cut(axis, size, ranges, move(self.window))

    def within(self, window: Range) -> Cut:
        """What of it is in `window`, as a cut of that window."""
        first, last = window
        ranges = tuple(
            tuple(
                (max(start, first), min(stop, last))
                for start, stop in ranges
                if start < last and stop > first
            )
            for ranges in self.ranges
        )
        return replace(self, ranges=ranges, window=window)

    def local(self, rank: int, index: int) -> int:
        """How many of the rank's elements come before the element `index`."""
        return sum(min(stop, index) - start for start, stop in self.ranges[rank] if start < index)

    def local_size(self, rank: int) -> int:
        """Elements that the rank has."""
        return length(self.ranges[rank])


def combine(cuts: Sequence[Cut]) -> Cut | None:
    """One cut that does what all of them want of their windows; None if they contradict each other.

    What is in none of the windows nobody has.
    """
    by_window = {cut.window: cut for cut in cuts}
    if any(by_window[cut.window] != cut for cut in cuts):
        return None
    ordered = [by_window[window] for window in sorted(by_window)]
    for one, other in pairwise(ordered):
        if (one.axis, one.size) != (other.axis, other.size) or one.window[1] > other.window[0]:
            return None
    first = ordered[0]
    ranges = tuple(
        _merge([part for cut in ordered for part in cut.ranges[rank]]) for rank in range(len(first.ranges))
    )
    return Cut(first.axis, first.size, ranges, (0, first.size))


def _merge(parts: Sequence[Range]) -> Ranges:
    """Adjacent ranges become one."""
    merged: list[Range] = []
    for start, stop in parts:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)
