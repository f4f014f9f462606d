"""Triton looks for the model's class here."""

from trtforge.runtime.triton.adapter import TritonPythonModel

__all__ = ["TritonPythonModel"]
