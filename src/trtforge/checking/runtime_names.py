"""The runtimes that a build can be checked with, named where nothing heavy is imported."""

from __future__ import annotations

from typing import Literal

# These execute the ONNX file, for whichever runtime it was built.
OfAnyBuild = Literal["onnxruntime", "openvino", "reference"]
