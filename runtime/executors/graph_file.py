"""Reads a rank's ONNX file, and refuses by name what no runtime could execute."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo

from trtforge import wire
from trtforge.errors import ConfigError


def read_graph_file(path: Path, num_layers: int) -> onnx.GraphProto:
    """The graph in `path`, whose weights stay in their files.

    Raises ConfigError if there is no graph, if a file of weights is missing or too short, and if there is
    not one cache for each of the manifest's `num_layers`.
    """
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: build the model again") from None
    except DecodeError:
        raise ConfigError(f"{path} is not an ONNX file: build the model again") from None
    for file, end_bytes in weight_files(path.parent, graph).items():
        if not file.is_file() or file.stat().st_size < end_bytes:
            raise ConfigError(f"{file} is missing or cut short: build the model again")
    others = {wire.HIDDEN_STATES, *(tensor.name for tensor in wire.GRAPH_INPUTS)}
    caches = {value.name for value in graph.input} - others
    if caches != {wire.kv_cache_input(layer) for layer in range(num_layers)}:
        raise ConfigError(
            f"{path} has {len(caches)} cache inputs, its manifest {num_layers} layers: build the model again"
        )
    return graph


def weight_files(folder: Path, graph: onnx.GraphProto) -> dict[Path, int]:
    """The files that hold weights of `graph`, each with the bytes it has at least."""
    ends_bytes: dict[Path, int] = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            data = ExternalDataInfo(tensor)
            file = folder / data.location
            end_bytes = (data.offset or 0) + (data.length or 0)
            ends_bytes[file] = max(end_bytes, ends_bytes.get(file, 0))
    return ends_bytes
