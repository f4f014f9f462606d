"""How ranks share a mixture of experts: each has a part of the intermediate features of every expert."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from trtforge.builder.sharding.cut import Cut, Ranges
from trtforge.builder.sharding.split import Range

_GATE_UP, _DOWN, _GATE_UP_BIAS, _DOWN_BIAS = 3, 4, 5, 6  # inputs of MoeExperts


def down_axis(node: ir.Node) -> int:
    """The axis of `down` that the intermediate features are along."""
    return 1 if node.attributes["transposed"].value else 2


def expert_cuts(node: ir.Node, ranges: Sequence[Range]) -> list[Cut | None]:
    """The cuts of the inputs of the MoeExperts `node`, of whose intermediate features ranks have `ranges`."""
    size = ranges[-1][1]
    gate_up = tuple(_gate_and_up(node, size, part) for part in ranges)
    down_cut = Cut.of(down_axis(node), ranges)
    gate_up_cut = Cut(3 - down_axis(node), 2 * size, gate_up, (0, 2 * size))
    cuts: list[Cut | None] = [None] * len(node.inputs)
    cuts[_GATE_UP], cuts[_DOWN] = gate_up_cut, down_cut
    if len(cuts) > _GATE_UP_BIAS:
        cuts[_GATE_UP_BIAS] = gate_up_cut.at(1)
    return cuts


def _gate_and_up(node: ir.Node, size: int, part: Range) -> Ranges:
    start, stop = part
    if node.attributes["activation"].value == "swiglu_oai":  # interleaved
        return ((2 * start, 2 * stop),)
    return (start, stop), (size + start, size + stop)


def without_down_bias(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Inputs of all ranks but one: the bias belongs to the sum over ranks, not to each part of it."""
    return list(inputs[:_DOWN_BIAS])
