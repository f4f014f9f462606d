"""A model's folder in a Triton model repository: config.pbtxt, model.py and the manifest."""

from __future__ import annotations

import re
import shutil
from importlib import resources
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from trtforge import wire
from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError
from trtforge.manifest import Manifest

VERSION_FOLDER = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_model_name(name: str) -> str:
    """Return `name` if it is a plain folder name; raises ConfigError otherwise (no path may hide in it)."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"model name {name!r} is not allowed: use letters, digits, '.', '_' and '-', starting with a "
            "letter or digit, at most 128 characters"
        )
    return name


def triton_config(name: str) -> pb.ModelConfig:
    """The Triton configuration of the decoupled model called `name`."""
    config = pb.ModelConfig(name=check_model_name(name), backend="python", max_batch_size=0)
    config.model_transaction_policy.decoupled = True
    for spec in wire.REQUEST_TENSORS:
        config.input.add(
            name=spec.name,
            data_type=pb.DataType.Value(f"TYPE_{spec.data_type}"),
            dims=spec.dims,
            optional=spec.optional,
        )
    for spec in wire.RESPONSE_TENSORS:
        config.output.add(
            name=spec.name, data_type=pb.DataType.Value(f"TYPE_{spec.data_type}"), dims=spec.dims
        )
    # One instance: it owns the engine. The engine's processes place themselves on the devices.
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    for parameter, value in EngineOptions().as_parameters().items():
        config.parameters[parameter].string_value = value
    return config


def install_triton_model(folder: Path, manifest: Manifest) -> None:
    """Write config.pbtxt, 1/model.py and 1/manifest.json into `folder`, a model's folder."""
    version = folder / VERSION_FOLDER
    version.mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(text_format.MessageToString(triton_config(manifest.model.name)))
    source = resources.files("trtforge") / "model_repository" / "llm" / "1" / "model.py"
    with resources.as_file(source) as path:
        shutil.copyfile(path, version / "model.py")
    manifest.save(version)
