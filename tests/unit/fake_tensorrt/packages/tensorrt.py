"""Stands in for full TensorRT: as `tensorrt_rtx`, and with as much of plugins as registering them takes."""

from __future__ import annotations

from enum import Enum
from typing import Any

from tensorrt_rtx import *  # noqa: F403
from tensorrt_rtx import LOG, __version__

__all__ = ["LOG", "__version__"]


class PluginFieldType(Enum):
    CHAR = 1
    INT32 = 2
    INT64 = 3
    FLOAT32 = 4


class PluginField:
    def __init__(self, name: str, data: Any, kind: PluginFieldType) -> None:
        self.name = name


PluginFieldCollection = list


class IPluginV3:
    pass


class IPluginV3OneCore:
    pass


class IPluginV3OneBuildV2:
    pass


class IPluginV3OneRuntime:
    pass


class IPluginCreatorV3One:
    def __init__(self) -> None:
        pass


class _Registry:
    def register_creator(self, creator: Any, namespace: str) -> bool:
        LOG.append(("register", creator.name, namespace))
        return True


def get_plugin_registry() -> _Registry:
    return _Registry()
