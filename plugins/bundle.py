"""Compiled kernels as they are shipped: a folder of cubins with a manifest of how each is launched.

    FOLDER/manifest.json
    FOLDER/sm_90/paged_attention-0123456789ab.cubin

Needs no compiler: it is what a serving machine reads.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtforge.errors import PluginError
from trtforge.plugins.launch import Constant, Kernel

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION: Literal[1] = 1
ARCHS = (80, 89, 90, 100, 120)
# Compute capability -> which of ARCHS it runs, and the most shared memory of a block. Machine code runs on
# GPUs of the same major and the same or a higher minor capability; but from 9.0 on Triton compiles for the
# architecture-specific targets (sm_90a), whose code runs on exactly one.
_GPUS: Mapping[int, tuple[int, int]] = {
    80: (80, 163 * 1024),
    86: (80, 99 * 1024),
    87: (80, 163 * 1024),
    89: (89, 99 * 1024),
    90: (90, 227 * 1024),
    100: (100, 227 * 1024),
    120: (120, 99 * 1024),
}
# Null pointers that follow the declared parameters of every cubin.
HIDDEN_PARAMETERS = ("global_scratch", "profile_scratch")


def arch_for(compute_capability: int) -> int:
    """Which of ARCHS a GPU of this compute capability (86 is 8.6) runs; raises PluginError if none."""
    return _gpu(compute_capability)[0]


def max_shared_bytes(compute_capability: int) -> int:
    """The most dynamic shared memory that a block may ask for; raises PluginError as `arch_for`."""
    return _gpu(compute_capability)[1]


def _gpu(compute_capability: int) -> tuple[int, int]:
    if compute_capability not in _GPUS:
        raise PluginError(
            f"no kernels are compiled for compute capability {compute_capability / 10}; there are some for "
            f"{', '.join(str(capability / 10) for capability in _GPUS)}"
        )
    return _GPUS[compute_capability]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CubinEntry(_Frozen):
    """One cubin: what it was compiled from and how it is launched."""

    name: str = Field(pattern=r"^\w+-[0-9a-f]{12}$")  # the Kernel's
    arch: int
    operator: str
    function: str
    symbol: str  # the function's name in the cubin
    parameters: tuple[tuple[str, str], ...]  # as the Kernel's
    hidden_parameters: tuple[str, ...]  # null pointers after them
    constants: Mapping[str, Constant]
    num_warps: int
    num_stages: int
    num_ctas: int  # blocks of a cluster
    threads: int  # of a block
    shared_bytes: int  # dynamic shared memory of a block
    source_sha256: str  # of the files with the kernel's source
    sha256: str
    num_bytes: int

    @property
    def file(self) -> str:
        """Relative to the bundle's folder."""
        return f"sm_{self.arch}/{self.name}.cubin"


class BundleManifest(_Frozen):
    """What a bundle holds, by arch and name."""

    format_version: Literal[1] = FORMAT_VERSION
    compiler: str
    compiler_version: str
    cubins: tuple[CubinEntry, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder of compiled kernels whose files are what its manifest says."""

    folder: Path
    manifest: BundleManifest

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Open a bundle and check every file in it.

        Raises PluginError if there is none, if another version wrote it, or if a file is missing or changed.
        """
        path = folder / MANIFEST_FILE
        try:
            manifest = BundleManifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise PluginError(f"{path} does not exist: {_remedy(folder)}") from None
        except ValidationError as error:
            raise PluginError(
                f"{path} is not a manifest of kernels that this version reads: {_remedy(folder)} ({error})"
            ) from None
        bundle = cls(folder, manifest)
        for entry in manifest.cubins:
            bundle._read(entry)
        return bundle

    def cubin(self, kernel: Kernel, compute_capability: int) -> tuple[CubinEntry, bytes]:
        """The cubin of `kernel` that a GPU of this compute capability runs.

        Raises PluginError if the bundle has none, if it was compiled from another version of the kernel's
        source, or if it needs more shared memory than this GPU has.
        """
        arch = arch_for(compute_capability)
        archs = {entry.arch: entry for entry in self.manifest.cubins if entry.name == kernel.name}
        if arch not in archs:
            there = ", ".join(f"sm_{other}" for other in archs) or "no arch at all"
            constants = ", ".join(f"{name}={value}" for name, value in kernel.constants)
            raise PluginError(
                f"{self.folder} has {kernel.name} ({kernel.operator}: {constants}) for {there}, and not for "
                f"sm_{arch}: {_remedy(self.folder)}"
            )
        entry = archs[arch]
        if entry.source_sha256 != source_sha256(kernel.module):
            raise PluginError(
                f"{self.folder / entry.file} was compiled from another version of {kernel.module}: "
                f"{_remedy(self.folder)}"
            )
        if entry.shared_bytes > max_shared_bytes(compute_capability):
            raise PluginError(
                f"{kernel.name} needs {entry.shared_bytes} bytes of shared memory, as the GPUs that it was "
                f"planned for have; compute capability {compute_capability / 10} has "
                f"{max_shared_bytes(compute_capability)}"
            )
        return entry, self._read(entry)

    def _read(self, entry: CubinEntry) -> bytes:
        path = self.folder / entry.file
        try:
            cubin = path.read_bytes()
        except FileNotFoundError:
            raise PluginError(
                f"{path} is missing, though the manifest has it: {_remedy(self.folder)}"
            ) from None
        if hashlib.sha256(cubin).hexdigest() != entry.sha256:
            raise PluginError(
                f"{path} is not the file that was compiled: it has {len(cubin)} bytes, {entry.num_bytes} in "
                f"the manifest, or other contents: {_remedy(self.folder)}"
            )
        return cubin


@functools.cache
def source_sha256(module: str) -> str:
    """Of the file that defines `module`, which is not imported, and of files beside it whose names begin with
    that one's: what its kernels share. Raises PluginError if there is no such module.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise PluginError(f"there is no module {module}, which a kernel names as its source")
    file = Path(spec.origin)
    files = sorted(file.parent.glob(f"{file.stem}*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _remedy(folder: Path) -> str:
    return f"compile the kernels with `trtforge compile-kernels MODEL --output {folder}`"
