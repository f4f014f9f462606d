"""Checks of a written graph that need no weights and no runtime."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import external_data_helper

from trtforge import wire
from trtforge.errors import EngineBuildError


def verify_graph(path: Path, num_layers: int, *, is_first: bool = True, is_last: bool = True) -> None:
    """Check that the ONNX file is valid, has the contract's inputs and outputs and all of its weights.

    `is_first` and `is_last` say which pipeline stage it is.

    Raises EngineBuildError naming what is wrong.
    """
    try:
        # By path, the checker also opens the external data's files.
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineBuildError(f"the graph {path.name} that was written is not valid: {error}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    layers = range(num_layers)
    wanted_inputs = [*wire.stage_inputs(is_first=is_first, is_last=is_last)]
    wanted_inputs += [wire.kv_cache_input(i) for i in layers]
    _compare("inputs", [value.name for value in graph.input], wanted_inputs)
    wanted_outputs = [wire.stage_output(is_last=is_last)] + [wire.kv_cache_output(i) for i in layers]
    _compare("outputs", [value.name for value in graph.output], wanted_outputs)
    for tensor in graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            _check_data(path.parent, tensor)


def _compare(kind: str, found: list[str], wanted: list[str]) -> None:
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        raise EngineBuildError(f"the graph that was written has wrong {kind}: {missing=}, {unknown=}")


def _check_data(folder: Path, tensor: onnx.TensorProto) -> None:
    data = external_data_helper.ExternalDataInfo(tensor)
    size = (folder / data.location).stat().st_size
    end = (data.offset or 0) + (data.length or 0)
    if end > size:
        raise EngineBuildError(
            f"weight {tensor.name} ends at byte {end} of {data.location}, which has {size} bytes"
        )
