"""The packed ONNX graph as an OpenVINO model.

OpenVINO's ONNX frontend reads the standard operators. The graph's own are converted here: attention to
the paged attention operator of OpenVINO's CPU plugin, the one that openvino-genai stands on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import openvino as ov
import openvino.opset13 as ops
from openvino.frontend.onnx import ConversionExtension
from openvino.op import _PagedAttentionExtension

from trtforge import wire
from trtforge.errors import ConfigError, EngineBuildError
from trtforge.manifest import LayerCache
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION
from trtforge.runtime.executors.graph_file import read_graph_file, weight_files
from trtforge.runtime.executors.openvino_all_reduce import RankSums
from trtforge.runtime.executors.openvino_passes import compute_in_float32, is_constant, merge_projections
from trtforge.runtime.executors.openvino_weights import dequantization_converter, quantization_converter

BLOCK_SIZE = 32  # tokens; fixed in the CPU plugin

_DOMAIN = "trtforge"
_ALONE = ("Linear", "PagedAttention")  # the domain's operators that are known without other ranks
_INPUTS = tuple(tensor.name for tensor in PAGED_ATTENTION.inputs)

# Inputs of the operator, in the order of the OpenVINO release that pyproject.toml pins.
PAGED_ATTENTION_INPUTS = (
    "query",
    "key",
    "value",
    "key_cache",
    "value_cache",
    "past_lens",
    "subsequence_begins",
    "block_indices",
    "block_indices_begins",
    "scale",
    "sliding_window",
    "alibi_slopes",
    "max_context_len",
    "score_aggregation_window",
    "rotated_block_indices",
    "rotation_deltas",
    "rotation_trig_lut",
    "xattention_threshold",
    "xattention_block_size",
    "xattention_stride",
    "sinks",
    "adaptive_rkv_start_size",
    "adaptive_rkv_evictable_sizes",
    "adaptive_rkv_diversity_block_set_indices",
    "adaptive_rkv_diversity_block_set_indices_begins",
    "token_type_ids",
    "qq_bias",
    "qq_bias_begins",
)

# What inputs hold whose feature is off.
_OFF: Mapping[str, npt.NDArray[Any]] = {
    "alibi_slopes": np.empty(0, np.float32),
    "score_aggregation_window": np.empty(0, np.int32),
    "rotated_block_indices": np.empty(0, np.int32),
    "rotation_deltas": np.empty(0, np.int32),
    "rotation_trig_lut": np.empty(0, np.float32),
    "xattention_threshold": np.empty(0, np.float32),
    "xattention_block_size": np.array(0, np.int32),
    "xattention_stride": np.array(0, np.int32),
    "sinks": np.empty((0, 0, 0, 0), np.float32),
    "adaptive_rkv_start_size": np.array(0, np.int32),
    "adaptive_rkv_evictable_sizes": np.empty(0, np.int32),
    "adaptive_rkv_diversity_block_set_indices": np.empty(0, np.int32),
    "adaptive_rkv_diversity_block_set_indices_begins": np.empty(0, np.int32),
    "token_type_ids": np.empty(0, np.int32),
    "qq_bias": np.empty(0, np.uint8),
    "qq_bias_begins": np.empty(0, np.int32),
}

# Inputs of the packed graph that stay as they are; a pipeline stage has some of them.
TOKEN_INPUTS = ("input_ids", wire.HIDDEN_STATES, "position_ids", "logits_indices")

# Inputs that all attention operators share, and their ranks; int32.
STEP_INPUTS: Mapping[str, int] = {
    "past_lens": 1,  # [B]: tokens in the cache before the step
    "subsequence_begins": 1,  # [B + 1]
    "block_indices": 1,  # the used part of all block tables, one after the other
    "block_indices_begins": 1,  # [B + 1]
    "max_context_len": 0,
}


def key_cache_input(layer: int) -> str:
    """Name of a layer's key cache, [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]."""
    return f"key_cache.{layer}"


def value_cache_input(layer: int) -> str:
    """Name of a layer's value cache, of the key cache's shape."""
    return f"value_cache.{layer}"


def read_graph(
    path: Path,
    layers: tuple[LayerCache, ...],
    *,
    transpose_weights: bool = False,
    multiply_integers: bool = False,
    sums: RankSums | None = None,
) -> ov.Model:
    """Read the graph that the builder wrote, for the CPU plugin.

    Inputs are TOKEN_INPUTS, STEP_INPUTS and two caches a layer, whose type and shape the plugin chooses when
    it compiles; the only output is logits, or hidden states of a stage that is not the last. Weights stay in
    the graph's files, mapped into memory; `transpose_weights` copies those of Linear nodes to [in, out].
    With `multiply_integers` products of 8-bit activations are those of integers, else of floats.
    `sums` are those of AllReduce nodes, which no other graph may have.

    Raises ConfigError if there is no graph or OpenVINO's operators cannot express it, and EngineBuildError
    if OpenVINO does not read it.
    """
    graph = _check_graph(path, len(layers), _ALONE if sums is None else (*_ALONE, "AllReduce"))
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    is_bfloat16 = types[wire.kv_cache_input(0)] == onnx.TensorProto.BFLOAT16
    core = ov.Core()
    core.add_extension(ConversionExtension("Linear", _DOMAIN, _linear_converter(transpose_weights)))
    core.add_extension(ConversionExtension("DequantizeLinear", "", dequantization_converter(is_bfloat16)))
    core.add_extension(ConversionExtension("QuantizeLinear", "", quantization_converter(multiply_integers)))
    core.add_extension(ConversionExtension("PagedAttention", _DOMAIN, _attention_converter(layers)))
    if sums is not None:
        core.add_extension(ConversionExtension("AllReduce", _DOMAIN, sums.converter()))
    try:
        model = core.read_model(path)
        _connect_attention(model, len(layers))
        if not transpose_weights:
            merge_projections(model)
        compute_in_float32(model)
    except RuntimeError as error:
        raise EngineBuildError(
            f"OpenVINO {ov.__version__} cannot read {path}; build the model again with this version of "
            f"trtforge. OpenVINO says: {error}"
        ) from error
    return model


def _check_graph(path: Path, num_layers: int, known: tuple[str, ...]) -> onnx.GraphProto:
    """The graph, without what would fail somewhere inside OpenVINO: that is refused by name."""
    graph = read_graph_file(path, num_layers)
    for node in graph.node:
        if node.domain == _DOMAIN and node.op_type not in known:
            raise ConfigError(
                f"{path} has {node.op_type} nodes, which the openvino runtime does not execute yet: models "
                "with them cannot be served on a CPU"
            )
        if node.op_type == "PagedAttention":
            reason = _unlike_openvino(node)
            if reason:
                raise ConfigError(
                    f"{path} {reason}, which OpenVINO's paged attention cannot: this model cannot be served "
                    "by the openvino runtime"
                )
    for file in weight_files(path.parent, graph):
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise ConfigError(
                f"{file} is a link out of its folder, which OpenVINO does not follow: put the file there"
            )
    return graph


def _unlike_openvino(node: onnx.NodeProto) -> str:
    """What this attention does that OpenVINO's does not; empty if there is nothing."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    given = {name for name, value in zip(_INPUTS, node.input, strict=False) if value}
    if "softcap" in attributes and attributes["softcap"].f != 0:
        return f"caps attention scores (softcap {attributes['softcap'].f:g})"
    for name in ("k_scale", "v_scale"):
        if name in given:
            return f"scales what it stores in the cache ({name})"
    # It takes both, and forgets the window.
    if "alibi_slopes" in given and "window" in attributes and attributes["window"].i != 0:
        return f"has alibi_slopes in a window of {attributes['window'].i} tokens"
    return ""


# --------------------------------------------------------------------------- conversion of nodes


def _constant(value: npt.ArrayLike, dtype: npt.DTypeLike = None) -> Any:
    return ops.constant(np.asarray(value, dtype)).output(0)


def _linear_converter(transpose_weights: bool) -> Callable[[Any], list[Any]]:
    def convert(context: Any) -> list[Any]:
        x, weight = context.get_input(0), _without_conversion(context.get_input(1))
        if transpose_weights and is_constant(weight):
            # bfloat16 has no numpy type: `data` then holds the same bits as float16, which are only moved.
            bits = np.ascontiguousarray(weight.get_node().data.T)
            tensor = ov.Tensor(bits, ov.Shape(bits.shape), weight.get_element_type())
            y = ops.matmul(x, ops.constant(tensor, shared_memory=False), False, False)
        else:
            y = ops.matmul(x, weight, False, True)
        if context.get_input_size() > 2:
            y = ops.add(y, context.get_input(2))
        return [y.output(0)]

    return convert


def _without_conversion(output: Any) -> Any:
    """What a conversion to the same type converts, such as that of expanded weights."""
    node = output.get_node()
    if node.get_type_name() != "Convert" or node.get_input_element_type(0) != output.get_element_type():
        return output
    return node.input_value(0)


def _attention_converter(layers: tuple[LayerCache, ...]) -> Callable[[Any], list[Any]]:
    layer_of = {wire.kv_cache_input(index): layer for index, layer in enumerate(layers)}

    def convert(context: Any) -> list[Any]:
        q, k, v, kv_cache, _, cu_seqlens, context_lens, _ = (context.get_input(i) for i in range(8))
        layer = layer_of[kv_cache.get_any_name()]
        # A converter may not add inputs to the graph. Inputs of the graph that have the right rank and type
        # stand for them until `_connect_attention`.
        inputs = {
            "query": _merge_heads(q),
            "key": _merge_heads(k),
            "value": _merge_heads(v),
            "key_cache": kv_cache,
            "value_cache": kv_cache,
            "past_lens": context_lens,
            "subsequence_begins": cu_seqlens,
            "block_indices": context_lens,
            "block_indices_begins": context_lens,
            "scale": _constant(context.get_attribute("scale"), np.float32),
            "sliding_window": _constant(context.get_attribute("window"), np.int32),
            "max_context_len": _constant(0, np.int32),
        } | {name: _constant(value) for name, value in _OFF.items()}
        for index in range(8, context.get_input_size()):
            value = context.get_input(index)
            if value.get_node().get_type_name() == "NullNode":  # left out
                continue
            if _INPUTS[index] == "sinks":
                value = ops.reshape(value, _constant([1, -1, 1, 1]), False).output(0)
            inputs[_INPUTS[index]] = value
        node = _PagedAttentionExtension([inputs[name] for name in PAGED_ATTENTION_INPUTS])
        for kind in ("k", "v"):  # the plugin lays out the caches from these
            node.get_rt_info()[f"num_{kind}_heads"] = layer.num_kv_heads
            node.get_rt_info()[f"{kind}_head_size"] = layer.head_dim
        out = ops.reshape(node.output(0), _constant([0, -1, layer.head_dim]), True).output(0)
        return [out, _constant(0, np.float32)]  # the cache is written in place, its output is dropped

    return convert


def _merge_heads(x: Any) -> Any:
    """[T, H, D] -> [T, H * D]"""
    return ops.reshape(x, _constant([0, -1]), True).output(0)


# --------------------------------------------------------------------------- the converted model


def _connect_attention(model: ov.Model, num_layers: int) -> None:
    """Give the attention nodes their real inputs, and drop the graph's own caches and metadata."""
    shared = {
        name: _parameter(name, ov.PartialShape([-1] * rank), ov.Type.i32)
        for name, rank in STEP_INPUTS.items()
    }
    parameters = list(shared.values())
    layer_of = {wire.kv_cache_input(layer): layer for layer in range(num_layers)}
    key_cache_index = PAGED_ATTENTION_INPUTS.index("key_cache")
    for node in model.get_ordered_ops():
        if node.get_type_name() != "PagedAttentionExtension":
            continue
        layer = layer_of[node.input_value(key_cache_index).get_any_name()]
        unknown = ov.PartialShape.dynamic(4), ov.Type.dynamic
        caches = {
            "key_cache": _parameter(key_cache_input(layer), *unknown),
            "value_cache": _parameter(value_cache_input(layer), *unknown),
        }
        parameters += caches.values()
        for name, parameter in (shared | caches).items():
            node.input(PAGED_ATTENTION_INPUTS.index(name)).replace_source_output(parameter.output(0))
    for result in model.get_results():
        if not result.output(0).get_names() & {wire.LOGITS, wire.HIDDEN_STATES_OUT}:
            model.remove_result(result)
    for parameter in model.get_parameters():
        if not parameter.output(0).get_names() & set(TOKEN_INPUTS):
            model.remove_parameter(parameter)
    model.add_parameters(parameters)
    model.validate_nodes_and_infer_types()


def _parameter(name: str, shape: ov.PartialShape, dtype: ov.Type) -> Any:
    parameter = ops.parameter(shape, dtype, name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter
