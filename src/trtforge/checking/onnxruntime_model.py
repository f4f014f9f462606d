"""A build's graph in ONNX Runtime, through the operators' function bodies and all in float32.

But a cache of 8-bit floats stays one: what it rounds off is not the runtime's error.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime

from trtforge import wire
from trtforge.errors import ConfigError, EngineBuildError
from trtforge.manifest import KVCacheLayout, LayerCache, Manifest
from trtforge.plugins.function_bodies import add_function_bodies
from trtforge.runtime.executor import KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.executors.graph_file import read_graph_file

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
# What the cache holds before anything is stored: a graph that reads it shows.
_UNWRITTEN = 7.0


class OnnxRuntimeModel:
    """Executes steps as an executor does. It copies its whole cache in each: for checks, not for serving."""

    def __init__(self, model_dir: Path, manifest: Manifest) -> None:
        """Load the only rank's graph in `model_dir`.

        Raises ConfigError if there is none and for several ranks, and EngineBuildError if ONNX Runtime does
        not take it.
        """
        if len(manifest.ranks) > 1:
            raise ConfigError(
                f"{model_dir} has {len(manifest.ranks)} ranks, whose sums ONNX Runtime cannot make: choose "
                "another runtime to compare with, or check a build of the model on one rank"
            )
        path = model_dir / manifest.ranks[0].onnx
        read_graph_file(path, len(manifest.kv_cache.layers))  # refuses by name what would fail below
        model = ir.load(path)
        widen(model)
        proto = ir.to_proto(add_function_bodies(model))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors: it warns of initializers that are not used
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its classes derive from nothing narrower
            raise EngineBuildError(
                f"ONNX Runtime {onnxruntime.__version__} does not take {path}: {error}"
            ) from error
        cache = manifest.kv_cache
        self._spec = KVCacheSpec(cache.block_size, cache.num_blocks)
        self._caches = [_unwritten_cache(cache, layer) for layer in cache.layers]

    def kv_cache_spec(self) -> KVCacheSpec:
        """The cache as the manifest has it."""
        return self._spec

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        """Run one step."""
        feeds = {
            tensor.name: onnxruntime.OrtValue.ortvalue_from_numpy(getattr(inputs, tensor.name))
            for tensor in wire.GRAPH_INPUTS
        }
        feeds |= {wire.kv_cache_input(layer): cache for layer, cache in enumerate(self._caches)}
        names = [wire.LOGITS, *(wire.kv_cache_output(layer) for layer in range(len(self._caches)))]
        logits, *self._caches = self._session.run_with_ort_values(names, feeds)
        return ModelOutputs(logits=logits.numpy())


def _unwritten_cache(cache: KVCacheLayout, layer: LayerCache) -> onnxruntime.OrtValue:
    """Of 8-bit floats if the graph's is, else of float32."""
    shape = (cache.num_blocks, 2, cache.block_size, layer.num_kv_heads, layer.head_dim)
    if cache.dtype != "float8_e4m3fn":
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, _UNWRITTEN, np.float32))
    array = np.full(shape, _UNWRITTEN, ml_dtypes.float8_e4m3fn).view(np.uint8)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ir.DataType.FLOAT8E4M3FN)


def widen(model: ir.Model) -> None:
    """Compute in float32 what the graph computes in 16 bits; weights stay in their files as they are.

    Behind each 16-bit weight stands a conversion, and the graph's own conversions to 16 bits go to float32.
    """
    graph, float32 = model.graph, ir.TensorType(ir.DataType.FLOAT)
    for weight in list(graph.initializers.values()):
        if weight.dtype in _NARROW:
            wide = ir.Value(name=f"{weight.name}.float32", shape=weight.shape, type=float32)
            ir.convenience.replace_all_uses_with(weight, wide)
            cast = ir.Node("", "Cast", [weight], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[wide])
            graph.insert_before(graph[0], cast)
    for node in graph:
        for attribute in list(node.attributes.values()):
            if attribute.name == "to" and attribute.value in _NARROW:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _NARROW:
                tensor = ir.tensor(attribute.value.numpy().astype(np.float32))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if value.dtype in _NARROW:
            value.dtype = ir.DataType.FLOAT
