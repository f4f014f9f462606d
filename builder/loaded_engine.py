"""What TensorRT itself says of a built engine, where it can be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtforge.builder.engine import own_compute_capability
from trtforge.errors import ConfigError
from trtforge.manifest import EngineInfo
from trtforge.tensorrt_package import load_package, package_logger


def loaded_information(file: Path, info: EngineInfo) -> Any | None:
    """The layers of an engine as IEngineInspector's JSON has them. None where the engine cannot be loaded:
    without a GPU, or without its package in the same version.
    """
    try:
        own_compute_capability(info.package)
        trt = load_package(info.package)
    except ConfigError:
        return None
    if trt.__version__ != info.version:
        return None
    engine = trt.Runtime(package_logger(info.package)).deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
