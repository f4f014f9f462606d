"""Places the boxes of a small directed graph in rows, so that edges go down and cross rarely.

The method is Sugiyama's: rows by longest path, order within rows by barycenters, then positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]
Size: TypeAlias = tuple[float, float]
Edge: TypeAlias = tuple[str, str]
# A box, or the place in a row where an edge passes it by.
_Item: TypeAlias = str | tuple[str, str, int]

COLUMN_GAP, ROW_GAP = 18.0, 34.0
_PASSING_WIDTH = 4.0
_NUM_ORDER_SWEEPS, _NUM_COLUMN_SWEEPS = 24, 80
# An edge that passes rows resists bending more than a box resists moving.
_PASSING_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Centers of the boxes, and for each edge the points it goes through, from box to box."""

    width: float
    height: float
    centers: Mapping[str, Point]
    routes: Mapping[Edge, Sequence[Point]]


def lay_out(sizes: Mapping[str, Size], edges: Iterable[Edge]) -> Layout:
    """Place boxes of these sizes. `edges` must not form a cycle; an edge given twice is drawn once."""
    edges = list(dict.fromkeys(edges))
    row_of = _rows(list(sizes), edges)
    chains = {edge: _chain(edge, row_of) for edge in edges}
    rows: list[list[_Item]] = [[] for _ in range(max(row_of.values()) + 1)]
    for box in sizes:
        rows[row_of[box]].append(box)
    for (_, target), chain in chains.items():
        for row, item in enumerate(chain[1:-1], start=row_of[target] - len(chain) + 2):
            rows[row].append(item)
    above: dict[_Item, list[_Item]] = {}
    below: dict[_Item, list[_Item]] = {}
    for chain in chains.values():
        for upper, lower in pairwise(chain):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    rows = _ordered(rows, above, below)
    x_of = _columns(rows, chains.values(), sizes)
    return _finish(rows, x_of, chains, sizes)


def _rows(boxes: Sequence[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Below all that a box follows from; a box that follows from nothing right above its first use."""
    targets: dict[str, list[str]] = {box: [] for box in boxes}
    num_sources = dict.fromkeys(boxes, 0)
    for source, target in edges:
        targets[source].append(target)
        num_sources[target] += 1
    row_of = dict.fromkeys(boxes, 0)
    left = dict(num_sources)
    ready = [box for box in boxes if not left[box]]
    for box in ready:  # grows
        for target in targets[box]:
            row_of[target] = max(row_of[target], row_of[box] + 1)
            left[target] -= 1
            if not left[target]:
                ready.append(target)
    for box in boxes:
        if not num_sources[box] and targets[box]:
            row_of[box] = min(row_of[target] for target in targets[box]) - 1
    return row_of


def _chain(edge: Edge, row_of: Mapping[str, int]) -> list[_Item]:
    source, target = edge
    return [source, *((source, target, row) for row in range(row_of[source] + 1, row_of[target])), target]


# --------------------------------------------------------------------------- order within the rows

_Neighbours: TypeAlias = Mapping[_Item, Sequence[_Item]]


def _ordered(rows: list[list[_Item]], above: _Neighbours, below: _Neighbours) -> list[list[_Item]]:
    best, fewest = rows, _num_crossings(rows, below)
    for sweep in range(_NUM_ORDER_SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        rows = [list(row) for row in rows]
        for index in range(len(rows)) if down else reversed(range(len(rows))):
            fixed = index - 1 if down else index + 1
            if 0 <= fixed < len(rows):
                rows[index] = _by_barycenter(rows[index], rows[fixed], neighbours)
        crossings = _num_crossings(rows, below)
        if crossings < fewest:
            best, fewest = rows, crossings
    return best


def _by_barycenter(row: list[_Item], fixed: list[_Item], neighbours: _Neighbours) -> list[_Item]:
    place = {item: index for index, item in enumerate(fixed)}
    centers = {}
    for index, item in enumerate(row):
        places = [place[neighbour] for neighbour in neighbours.get(item, ())]
        centers[item] = fmean(places) if places else index
    return sorted(row, key=lambda item: centers[item])


def _num_crossings(rows: list[list[_Item]], below: _Neighbours) -> int:
    count = 0
    for row, next_row in pairwise(rows):
        place = {item: index for index, item in enumerate(next_row)}
        ends = [place[lower] for item in row for lower in sorted(below.get(item, ()), key=place.__getitem__)]
        count += sum(end > other for index, end in enumerate(ends) for other in ends[index + 1 :])
    return count


# --------------------------------------------------------------------------- positions


def _columns(
    rows: list[list[_Item]], chains: Iterable[Sequence[_Item]], sizes: Mapping[str, Size]
) -> dict[_Item, float]:
    """Boxes as near to their neighbours, and edges as straight, as the order in the rows allows."""
    pulled_by: dict[_Item, list[_Item]] = {}
    for chain in chains:
        pulled_by.setdefault(chain[0], []).append(chain[1])
        pulled_by.setdefault(chain[-1], []).append(chain[-2])
        pulled_by |= {item: list(chain) for item in chain[1:-1]}
    x_of: dict[_Item, float] = {}
    for row in rows:
        x_of |= _apart(row, dict.fromkeys(row, 0.0), sizes)
    for sweep in range(_NUM_COLUMN_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {item: fmean(x_of[other] for other in pulled_by.get(item, [item])) for item in row}
            x_of |= _apart(row, wanted, sizes)
    return x_of


def _apart(row: list[_Item], wanted: Mapping[_Item, float], sizes: Mapping[str, Size]) -> dict[_Item, float]:
    """Positions in the row's order that do not overlap and are least squares from `wanted`.

    With the widths taken off it is an isotonic regression: neighbours that want to overlap form a group at
    their weighted mean (pool adjacent violators).
    """
    starts = []
    start = 0.0
    for item, following in zip(row, [*row[1:], None], strict=True):
        starts.append(start)
        if following is not None:
            start += (_width(item, sizes) + _width(following, sizes)) / 2 + COLUMN_GAP
    groups: list[tuple[float, float, int]] = []  # mean, weight, number of items
    for item, start in zip(row, starts, strict=True):
        mean, weight, count = wanted[item] - start, 1.0 if isinstance(item, str) else _PASSING_WEIGHT, 1
        while groups and groups[-1][0] > mean:
            other_mean, other_weight, other_count = groups.pop()
            mean = (mean * weight + other_mean * other_weight) / (weight + other_weight)
            weight, count = weight + other_weight, count + other_count
        groups.append((mean, weight, count))
    means = [mean for mean, _, count in groups for _ in range(count)]
    return {item: mean + start for item, mean, start in zip(row, means, starts, strict=True)}


def _width(item: _Item, sizes: Mapping[str, Size]) -> float:
    return sizes[item][0] if isinstance(item, str) else _PASSING_WIDTH


def _finish(
    rows: list[list[_Item]],
    x_of: Mapping[_Item, float],
    chains: Mapping[Edge, Sequence[_Item]],
    sizes: Mapping[str, Size],
) -> Layout:
    left = min(x - _width(item, sizes) / 2 for item, x in x_of.items())
    right = max(x + _width(item, sizes) / 2 for item, x in x_of.items())
    span_of: dict[_Item, tuple[float, float]] = {}  # top and bottom of the item
    centers: dict[str, Point] = {}
    top = 0.0
    for row in rows:
        height = max((sizes[item][1] for item in row if isinstance(item, str)), default=0.0)
        for item in row:
            half = (sizes[item][1] if isinstance(item, str) else height) / 2
            span_of[item] = top + height / 2 - half, top + height / 2 + half
            if isinstance(item, str):
                centers[item] = x_of[item] - left, top + height / 2
        top += height + ROW_GAP
    routes = {}
    entries = _entries(chains, x_of, sizes)
    for edge, chain in chains.items():
        points = [(x_of[chain[0]] - left, span_of[chain[0]][1])]
        for item in chain[1:-1]:
            points += [(x_of[item] - left, y) for y in span_of[item]]
        routes[edge] = [*points, (entries[edge] - left, span_of[chain[-1]][0])]
    return Layout(right - left, top - ROW_GAP, centers, routes)


def _entries(
    chains: Mapping[Edge, Sequence[_Item]], x_of: Mapping[_Item, float], sizes: Mapping[str, Size]
) -> dict[Edge, float]:
    """Where each edge meets the top of its box: side by side, from left to right as they come."""
    entering: dict[str, list[Edge]] = {}
    for edge in chains:
        entering.setdefault(edge[1], []).append(edge)
    result = {}
    for target, edges in entering.items():
        edges.sort(key=lambda edge: x_of[chains[edge][-2]])
        width = sizes[target][0]
        for number, edge in enumerate(edges, start=1):
            result[edge] = x_of[target] - width / 2 + width * number / (len(edges) + 1)
    return result
