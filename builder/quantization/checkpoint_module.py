"""The tensors of one module of a checkpoint, by the names of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtforge.errors import ExportError
from trtforge.plugins.op import Array

if TYPE_CHECKING:
    from trtforge.builder.checkpoint import TensorEntry

Tensors = Mapping[str, "TensorEntry"]


@dataclass(frozen=True, slots=True)
class Module:
    """What has names that begin with `prefix`, in a checkpoint that is quantized by `method`."""

    prefix: str
    method: str
    tensors: Tensors

    def get(self, part: str) -> TensorEntry | None:
        """A part, if there is one."""
        return self.tensors.get(f"{self.prefix}.{part}")

    def need(self, part: str) -> TensorEntry:
        """A part. Raises ExportError if there is none."""
        entry = self.get(part)
        if entry is None:
            raise ExportError(f"{self.prefix} is quantized ({self.method}) and has no {part}")
        return entry

    def read(self, part: str) -> Array:
        """The data of a part. Raises ExportError if there is none."""
        return self.need(part).read()

    def read_if_there(self, part: str) -> Array | None:
        """The data of a part, if there is one."""
        return None if self.get(part) is None else self.read(part)

    def refuse(self, problem: str) -> ExportError:
        """An error for what is quantized `problem`, such as "with 3 bits"."""
        return ExportError(f"the checkpoint is quantized ({self.method}) {problem}, which is not supported")
