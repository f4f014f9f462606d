"""What tests of plugins share: one operator, and a launcher that remembers."""

from __future__ import annotations

from typing import Any

import pytest

from trtforge.plugins.launch import Call

# TensorRT-RTX's classes are imported with the operator: tests are skipped where they are not.


@pytest.fixture
def launcher() -> Any:
    from trt_plugins.gather import RecordingLauncher

    return RecordingLauncher()


@pytest.fixture
def calls() -> list[Call]:
    """What was planned."""
    return []


@pytest.fixture
def creator(launcher: Any, calls: list[Call]) -> Any:
    from trt_plugins.gather import make_creator

    return make_creator(launcher, calls)
