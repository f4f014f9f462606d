"""Loops of a control flow graph, whose nodes are the indices of basic blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Successors = Mapping[int, Sequence[int]]


def natural_loops(successors: Successors, entry: int = 0) -> list[frozenset[int]]:
    """The natural loops, one a header: what can reach an edge back to it without passing it."""
    dominators = _dominators(successors, entry)
    predecessors: dict[int, set[int]] = {node: set() for node in dominators}
    for node in dominators:
        for successor in successors[node]:
            predecessors[successor].add(node)
    loops: dict[int, set[int]] = {}
    for node in dominators:
        for header in set(successors[node]) & dominators[node]:
            body = loops.setdefault(header, {header})
            unseen = [node]
            while unseen:
                member = unseen.pop()
                if member not in body:
                    body.add(member)
                    unseen += predecessors[member]
    return [frozenset(loops[header]) for header in sorted(loops)]


def _dominators(successors: Successors, entry: int) -> dict[int, set[int]]:
    """For each node that can be reached: the nodes that every path to it passes, itself included."""
    reached, unseen = {entry}, [entry]
    while unseen:
        new = set(successors[unseen.pop()]) - reached
        reached |= new
        unseen += new
    dominators = {node: set(reached) for node in reached}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        incoming: dict[int, list[set[int]]] = {node: [] for node in reached}
        for node in reached:
            for successor in successors[node]:
                incoming[successor].append(dominators[node])
        for node in reached - {entry}:
            new = set.intersection(*incoming[node]) | {node}
            changed |= new != dominators[node]
            dominators[node] = new
    return dominators
