"""Cuts a graph into pipeline stages, where one tensor alone goes from layer to layer."""

from __future__ import annotations

import onnx_ir as ir

from trtforge import wire
from trtforge.builder.sharding.split import Range, split_layers
from trtforge.errors import ExportError
from trtforge.plugins.op import DOMAIN
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION

# Their outputs say how large a tensor is, not what is in it.
_SHAPE_OPERATORS = ("Shape", "Size")


def split_stages(graph: ir.Graph, pp: int) -> list[tuple[ir.Graph, Range]]:
    """The graphs of the stages, with the layers that each has; `graph` stays as it is.

    Weights are shared. What does not depend on tokens, such as the angles of positions, each stage computes
    itself. Raises ConfigError if there are fewer layers than stages, and ExportError if more than one tensor
    would have to go from one to the next.
    """
    attention = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, PAGED_ATTENTION.name)]
    layers = split_layers(len(attention), pp)
    boundaries = [_layer_input(graph, attention, start) for start, _ in layers[1:]]
    stages = []
    for (start, stop), before, after in zip(layers, [None, *boundaries], [*boundaries, None], strict=True):
        stages.append((_stage(graph, range(start, stop), before, after), (start, stop)))
    return stages


def _layer_input(graph: ir.Graph, attention: list[ir.Node], index: int) -> ir.Value:
    """The hidden states that the layer `index` begins with: the last value before its attention through which
    everything goes that comes of tokens."""
    nodes = list(graph)
    tokens = {value for value in graph.inputs if value.name == wire.GRAPH_INPUTS[0].name}
    of_tokens: list[ir.Node] = []
    for node in nodes:
        if node.op_type not in _SHAPE_OPERATORS and not tokens.isdisjoint(node.inputs):
            caches = node.outputs[1:] if node in attention else ()
            tokens.update(value for value in node.outputs if value not in caches)
            of_tokens.append(node)
    last_use = {value: number for number, node in enumerate(of_tokens) for value in node.inputs}
    first, last = (of_tokens.index(attention[i]) for i in (index - 1, index))
    found: ir.Value | None = None
    alive: set[ir.Value] = set()
    for number, node in enumerate(of_tokens[:last]):
        alive = {value for value in alive if last_use[value] > number}
        alive.update(value for value in node.outputs if value in tokens and last_use.get(value, -1) > number)
        if number > first and len(alive) == 1:
            (found,) = alive
    if found is None or found.shape is None or len(found.shape) not in (2, 3):
        raise ExportError(
            f"the model cannot be divided into stages in front of layer {index}: more than one tensor goes "
            "to it from the layers before it; use --pp 1"
        )
    return found


def _stage(graph: ir.Graph, layers: range, before: ir.Value | None, after: ir.Value | None) -> ir.Graph:
    caches = [wire.kv_cache_input(layer) for layer in layers]
    names = wire.stage_inputs(is_first=before is None, is_last=after is None)
    by_name = {value.name: value for value in graph.inputs}
    inputs = [before if name == wire.HIDDEN_STATES else by_name[name] for name in [*names, *caches]]
    outputs = {value.name: value for value in graph.outputs}
    first_output = outputs[wire.LOGITS] if after is None else after
    kept = [first_output, *(outputs[wire.kv_cache_output(layer)] for layer in layers)]
    # Nothing but its size is asked of the tokens.
    hidden_inputs = [] if before is None else [by_name["input_ids"]]
    stage = ir.convenience.extract(graph, [*inputs, *hidden_inputs], kept)
    if before is not None:
        _begin_with_hidden_states(stage, inputs.index(before))
    if after is not None:
        _end_with_hidden_states(stage)
    for index, layer in enumerate(layers):
        for kind in (wire.kv_cache_input, wire.kv_cache_output):
            for value in (*stage.inputs, *stage.outputs):
                if value.name == kind(layer):
                    value.name = kind(index)
    return stage


def _begin_with_hidden_states(stage: ir.Graph, index: int) -> None:
    """[T, hidden_size] in place of the traced value, which may have an axis between them."""
    value, ids = stage.inputs[index], stage.inputs[-1]
    del stage.inputs[-1]
    position_ids = next(other for other in stage.inputs if other.name == "position_ids")
    for use in ids.uses():
        if use.node.op_type not in _SHAPE_OPERATORS:
            raise ExportError(
                f"the node {use.node.name} needs token ids in a stage after the first: use --pp 1"
            )
    ir.convenience.replace_all_uses_with(ids, position_ids)
    dims = list(value.shape)
    if len(dims) == 3:
        hidden = ir.Value(name=wire.HIDDEN_STATES, type=value.type, shape=ir.Shape([dims[0], dims[2]]))
        axis = _constant(stage, "hidden_states_axis", 1)
        unsqueeze = ir.node("Unsqueeze", [hidden, axis])
        unsqueeze.outputs[0].name = value.name
        unsqueeze.outputs[0].type, unsqueeze.outputs[0].shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, unsqueeze.outputs[0])
        stage.insert_before(stage[0], unsqueeze)
        stage.inputs[index] = hidden
    else:
        value.name = wire.HIDDEN_STATES


def _end_with_hidden_states(stage: ir.Graph) -> None:
    value = stage.outputs[0]
    dims = list(value.shape)
    axis = _constant(stage, "hidden_states_out_axis", 1)
    squeeze = ir.node("Squeeze", [value, axis]) if len(dims) == 3 else ir.node("Identity", [value])
    result = squeeze.outputs[0]
    result.name, result.type = wire.HIDDEN_STATES_OUT, value.type
    result.shape = ir.Shape([dims[0], dims[-1]])
    stage.append(squeeze)
    stage.outputs[0] = result


def _constant(stage: ir.Graph, name: str, number: int) -> ir.Value:
    tensor = ir.tensor([number], dtype=ir.DataType.INT64)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    stage.register_initializer(value)
    return value
