"""Draws one decoder layer as SVG, alone or in an HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir

from trtforge.builder.inspection.graph_facts import AttributeText, dtype_name, read_model, shown_attributes
from trtforge.builder.inspection.layer import Layer, find_layer
from trtforge.builder.inspection.layout import Layout, Point, lay_out
from trtforge.plugins.op import DOMAIN

MARGIN, TITLE_HEIGHT = 24, 44
_MIN_WIDTH = 860  # of title and legend
LINE_HEIGHT, PADDING = 15, 8
CHARACTER_WIDTH = 6.7  # of the 11-pixel monospace font, with some air
MAX_CHARACTERS = 44
_MAX_NUMBERS = 8  # of a constant that is written out
_TO_THE_END = 2**63 - 1  # as torch writes the end of a Slice

# Fill of a box by what it is.
_FILLS = {"operator": "#cfe2f3", "weights": "#fdebd0", "plain": "#ffffff", "value": "#eeeeee"}
_LEGEND = {
    "operator": "operator of trtforge",
    "weights": "standard operator with weights",
    "plain": "other standard operator",
    "value": "from or to other layers",
}


@dataclass(frozen=True, slots=True)
class _Box:
    key: str
    kind: str
    lines: tuple[str, ...]  # the first one is the title
    tooltip: str

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels."""
        width = max(map(len, self.lines)) * CHARACTER_WIDTH + 2 * PADDING
        return width, len(self.lines) * LINE_HEIGHT + 2 * PADDING


def draw_layer(onnx_file: Path, index: int, file: Path) -> None:
    """Write decoder layer `index` as `file`: a box for each node, edges for what flows between them.

    A box names the node's weights and constants, an edge the shape of its value, and both tell more when
    they are pointed at. Raises ConfigError if the graph has no such layer.
    """
    model = read_model(onnx_file)
    layer = find_layer(model, index)
    title = f"{onnx_file.name}, layer {index}: {len(layer.nodes)} nodes, weights {layer.weight_prefix}*"
    picture = layer_svg(layer, title)
    if file.suffix == ".html":
        picture = (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f"</head>\n<body>{picture}</body></html>"
        )
    file.write_text(picture + "\n", encoding="utf-8")


def layer_svg(layer: Layer, title: str) -> str:
    """The picture as an SVG element."""
    boxes, values = _boxes(layer)
    layout = lay_out({box.key: box.size for box in boxes}, values)
    width, height = layout.width + 2 * MARGIN, layout.height + 2 * MARGIN + TITLE_HEIGHT
    width = max(width, _MIN_WIDTH)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="monospace" font-size="11">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#666"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="{MARGIN}" font-size="14" font-weight="bold">{escape(title)}</text>',
        *_legend(),
        f'<g transform="translate({MARGIN} {MARGIN + TITLE_HEIGHT})">',
        *_draw_edges(layout, values),
        *(_draw_box(box, layout.centers[box.key]) for box in boxes),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts)


# --------------------------------------------------------------------------- what is drawn


def _boxes(layer: Layer) -> tuple[list[_Box], dict[tuple[str, str], ir.Value]]:
    """A box for each node and for each value that enters or leaves the layer; values by their edges."""
    keys = {node: f"node {number}" for number, node in enumerate(layer.nodes)}
    boxes = [_node_box(node, key, layer.weight_prefix) for node, key in keys.items()]
    edges: dict[tuple[str, str], ir.Value] = {}
    outside: dict[str, _Box] = {}
    for node, key in keys.items():
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            producer = value.producer()
            source = keys.get(producer) if producer is not None else None
            if source is None:
                source = f"in {value.name}"
                outside.setdefault(source, _value_box(value, source))
            edges[source, key] = value
        for value in node.outputs:
            if value.is_graph_output() or any(user not in keys for user in value.consumers()):
                target = f"out {value.name}"
                outside.setdefault(target, _value_box(value, target))
                edges[key, target] = value
    return [*boxes, *outside.values()], edges


def _node_box(node: ir.Node, key: str, weight_prefix: str) -> _Box:
    constants = [value for value in node.inputs if value is not None and value.is_initializer()]
    kind = "plain"
    if node.domain == DOMAIN:
        kind = "operator"
    elif not all(map(_is_number, constants)):
        kind = "weights"
    words = [f"{name}={_attribute_text(name, value)}" for name, value in shown_attributes(node).items()]
    lines = [node.op_type, *(_constant_text(value, weight_prefix) for value in constants), *_wrapped(words)]
    tooltip = [f"{node.domain}::{node.op_type}".removeprefix("::"), node.name or ""]
    tooltip += [f"in: {_typed(value)}" for value in node.inputs if value is not None]
    tooltip += [f"out: {_typed(value)}" for value in node.outputs]
    return _Box(key, kind, tuple(map(_shortened, lines)), "\n".join([*tooltip, *words]))


def _value_box(value: ir.Value, key: str) -> _Box:
    return _Box(key, "value", (_shortened(value.name or ""), _shape(value)), _typed(value))


def _is_number(value: ir.Value) -> bool:
    """Whether a constant is so small that it is written out."""
    tensor = value.const_value
    is_small = tensor is not None and tensor.size <= _MAX_NUMBERS
    return is_small and not isinstance(tensor, ir.ExternalTensor)


def _constant_text(value: ir.Value, weight_prefix: str) -> str:
    if value.const_value is None or not _is_number(value):
        return f"{(value.name or '').removeprefix(weight_prefix)} {_shape(value)}"
    numbers = ", ".join(map(_number_text, value.const_value.numpy().flatten().tolist()))
    return f"[{numbers}]" if value.shape else numbers


def _number_text(number: int | float) -> str:
    if number == _TO_THE_END:
        return "end"
    return f"{number:g}" if isinstance(number, float) else str(number)


def _attribute_text(name: str, value: AttributeText) -> str:
    if name == "to":  # of Cast
        return dtype_name(ir.DataType(value))
    return str(value) if isinstance(value, str) else _number_text(value)


def _typed(value: ir.Value) -> str:
    return f"{value.name} {dtype_name(value.dtype)} {_shape(value)}"


def _shape(value: ir.Value) -> str:
    if value.shape is None:
        return "?"
    return (
        f"[{', '.join(str(dim) if isinstance(dim, int) else str(dim.value or '?') for dim in value.shape)}]"
    )


def _wrapped(words: Iterable[str]) -> list[str]:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) < MAX_CHARACTERS:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word)
    return [line for line in lines if line]


def _shortened(text: str) -> str:
    """Without its beginning if it is too long: the ends of names tell more."""
    return text if len(text) <= MAX_CHARACTERS else f"…{text[1 - MAX_CHARACTERS :]}"


# --------------------------------------------------------------------------- SVG


def _draw_box(box: _Box, center: Point) -> str:
    width, height = box.size
    x, y = center[0] - width / 2, center[1] - height / 2
    radius = height / 2 if box.kind == "value" else 3
    lines = []
    for number, line in enumerate(box.lines):
        weight = ' font-weight="bold"' if number == 0 else ""
        baseline = y + PADDING + LINE_HEIGHT * (number + 0.75)
        lines.append(f'<text x="{center[0]:.1f}" y="{baseline:.1f}"{weight}>{escape(line)}</text>')
    return (
        f'<g class="{box.kind}" text-anchor="middle"><title>{escape(box.tooltip)}</title>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:.1f}" '
        f'fill="{_FILLS[box.kind]}" stroke="#666"/>{"".join(lines)}</g>'
    )


def _draw_edges(layout: Layout, values: dict[tuple[str, str], ir.Value]) -> list[str]:
    parts, names = [], []
    named: set[str] = set()
    for edge, value in values.items():
        path = _curve(layout.routes[edge])
        parts.append(
            f'<path d="{path}" fill="none" stroke="#666" marker-end="url(#arrow)">'
            f"<title>{escape(_typed(value))}</title></path>"
        )
        source, target = edge
        if source.startswith("node") and target.startswith("node") and value.name not in named:
            named.add(value.name or "")
            x, y = layout.routes[edge][0]
            halo = 'stroke="white" stroke-width="3" paint-order="stroke"'
            names.append(
                f'<text x="{x + 5:.1f}" y="{y + 12:.1f}" font-size="9" fill="#777" {halo}>'
                f"{escape(_shape(value))}</text>"
            )
    return parts + names


def _curve(points: Sequence[Point]) -> str:
    """Through all points, leaving and reaching each of them vertically."""
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x, y), (next_x, next_y) in pairwise(points):
        middle = (y + next_y) / 2
        path += f"C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {next_y:.1f}"
    return path


def _legend() -> list[str]:
    parts = []
    x = float(MARGIN)
    for kind, text in _LEGEND.items():
        parts.append(
            f'<rect x="{x:.1f}" y="{MARGIN + 10}" width="14" height="12" rx="3" fill="{_FILLS[kind]}" '
            f'stroke="#666"/><text x="{x + 19:.1f}" y="{MARGIN + 20}">{escape(text)}</text>'
        )
        x += len(text) * CHARACTER_WIDTH + 40
    return parts
