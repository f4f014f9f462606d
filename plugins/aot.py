"""Kernels compiled ahead of time to cubins, with the Triton language's compiler and without a GPU.

Needs the compiler (`pip install 'trtforge[kernels]'`). It runs in processes of its own, so that its settings
are theirs alone: TRITON_INTERPRET in the caller's environment means nothing to them.
"""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trtforge.errors import ConfigError, PluginError
from trtforge.plugins.bundle import (
    HIDDEN_PARAMETERS,
    MANIFEST_FILE,
    Bundle,
    BundleManifest,
    CubinEntry,
    max_shared_bytes,
    source_sha256,
)
from trtforge.plugins.launch import Kernel

# Bits of a parameter in PTX; a pointer has 64.
_BITS = {"i32": 32, "u32": 32, "i64": 64, "u64": 64, "fp32": 32}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin and what a bundle's manifest says of it."""

    entry: CubinEntry
    cubin: bytes


def check_compiler() -> None:
    """Raise ConfigError if Triton is not installed."""
    if find_spec("triton") is None:
        raise ConfigError("compiling kernels needs Triton: install it with pip install 'trtforge[kernels]'")


@contextmanager
def compiler(num_processes: int, cache: Path | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes that can run `compile_kernel`, with Triton's cache in `cache` if it is to be kept.

    Raises ConfigError if Triton is not installed.
    """
    check_compiler()
    with tempfile.TemporaryDirectory(prefix="trtforge-triton-") as folder:
        # Spawned: a fork may have Triton imported already, and it reads its settings only then.
        pool = ProcessPoolExecutor(
            num_processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare,
            initargs=(str(cache or folder),),
        )
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # paths of this machine, and half of a cubin


def write_bundle(
    kernels: Mapping[int, Sequence[Kernel]],
    folder: Path,
    *,
    num_processes: int,
    on_compiled: Callable[[Compiled], None] = lambda _: None,
    on_refused: Callable[[PluginError], None] | None = None,
) -> Bundle:
    """Compile kernels, by arch, into the bundle `folder`; it replaces a bundle that is there.

    `folder` appears whole or not at all. The same kernels give the same bytes. `on_compiled` is called after
    each.

    Raises PluginError for a kernel that does not compile, or not to what its launches assume, and ConfigError
    if Triton is not installed or `folder` cannot be made or is something else than a bundle.
    """
    folder = folder.expanduser().resolve()
    staged = _stage(folder)
    wanted = sorted({(arch, kernel.name): kernel for arch in kernels for kernel in kernels[arch]}.items())
    try:
        jobs = [(kernel, arch) for (arch, _), kernel in wanted]
        compiled = _compile_all(jobs, num_processes, on_compiled, on_refused)
        for result in compiled:
            path = staged / result.entry.file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(result.cubin)
        manifest = BundleManifest(
            compiler="triton",
            compiler_version=version("triton"),
            cubins=tuple(sorted((r.entry for r in compiled), key=lambda entry: (entry.arch, entry.name))),
        )
        (staged / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
        staged.chmod(0o755)  # mkdtemp's folders are its owner's alone
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # there only if something failed
    return Bundle(folder, manifest)


def _stage(folder: Path) -> Path:
    """A new folder beside `folder`, so that a rename makes that appear at once."""
    is_bundle = (folder / MANIFEST_FILE).is_file()
    if folder.exists() and not is_bundle and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and is no bundle of kernels: give another --output")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be made: {error}") from error


def _compile_all(
    jobs: Sequence[tuple[Kernel, int]],
    num_processes: int,
    on_compiled: Callable[[Compiled], None],
    on_refused: Callable[[PluginError], None] | None,
) -> list[Compiled]:
    results = []
    with compiler(max(1, min(num_processes, len(jobs)))) as pool:
        futures = {pool.submit(compile_kernel, kernel, arch): (kernel, arch) for kernel, arch in jobs}
        for future in as_completed(futures):
            try:
                results.append(future.result())
            except BrokenProcessPool as error:
                done = {(result.entry.name, result.entry.arch) for result in results}
                running = [_what(*job) for job in futures.values() if (job[0].name, job[1]) not in done]
                raise PluginError(
                    "the compiler crashed or had too little memory while it compiled one of: "
                    f"{'; '.join(running[:num_processes])}"
                ) from error
            except PluginError as error:
                if on_refused is None:
                    raise
                on_refused(error)
                continue
            on_compiled(results[-1])
    return results


def compile_kernel(kernel: Kernel, arch: int) -> Compiled:
    """Compile one kernel, in a process of `compiler`.

    Raises PluginError if it does not compile, if its parameters are not what `kernel` says, or if it wants
    memory that its launches do not give it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.errors import TritonError

    function = getattr(importlib.import_module(kernel.module), kernel.function, None)
    if not isinstance(function, triton.JITFunction):
        raise PluginError(f"{kernel.module} has no Triton function {kernel.function} that can be compiled")
    source = ASTSource(
        fn=function,
        signature=_signature(kernel, function),
        constexprs=dict(kernel.constants),
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(function.arg_names)
            if dict(kernel.parameters).get(name, "").startswith("*")
        },
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    try:
        result: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except (TritonError, RuntimeError) as error:
        raise PluginError(f"{_what(kernel, arch)} does not compile: {error}") from error
    metadata = result.metadata
    scratch_bytes = metadata.global_scratch_size + metadata.profile_scratch_size
    if scratch_bytes:
        raise PluginError(
            f"{_what(kernel, arch)} wants {scratch_bytes} bytes of scratch memory from its launcher, "
            "which gives none: use a workspace of the plan, and no tensor descriptors made on the device"
        )
    if metadata.shared > max_shared_bytes(arch):
        raise PluginError(
            f"{_what(kernel, arch)} needs {metadata.shared} bytes of shared memory, and a block has at most "
            f"{max_shared_bytes(arch)}: plan smaller tiles or fewer stages"
        )
    check_ptx_parameters(kernel, arch, result.asm["ptx"])
    cubin = result.asm["cubin"]
    entry = CubinEntry(
        name=kernel.name,
        arch=arch,
        operator=kernel.operator,
        function=kernel.function,
        symbol=metadata.name,
        parameters=kernel.parameters,
        hidden_parameters=HIDDEN_PARAMETERS,
        constants=dict(kernel.constants),
        num_warps=kernel.num_warps,
        num_stages=kernel.num_stages,
        num_ctas=metadata.num_ctas,
        threads=32 * metadata.num_warps,  # may be more than asked for: warp specialization adds some
        shared_bytes=metadata.shared,
        source_sha256=source_sha256(kernel.module),
        sha256=hashlib.sha256(cubin).hexdigest(),
        num_bytes=len(cubin),
    )
    return Compiled(entry, cubin)


def _signature(kernel: Kernel, function: Any) -> dict[str, str]:
    """Types by parameter, as Triton wants them; raises PluginError if `kernel` declares others."""
    parameters, constants = dict(kernel.parameters), dict(kernel.constants)
    for kind, declared, actual in (
        ("parameters", list(parameters), [p.name for p in function.params if not p.is_constexpr]),
        ("constants", sorted(constants), sorted(p.name for p in function.params if p.is_constexpr)),
    ):
        if declared != actual:
            raise PluginError(f"{kernel.module}.{kernel.function} has the {kind} {actual}, not {declared}")
    return {name: parameters.get(name, "constexpr") for name in function.arg_names}


def check_ptx_parameters(kernel: Kernel, arch: int, ptx: str) -> None:
    """Raise PluginError unless the PTX's entry takes the kernel's parameters and then the hidden ones.

    Launches go by the manifest: a compiler that leaves out a parameter, or adds one, would make them pass
    wrong values.
    """
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    declarations = re.findall(r"\.param\s+\.[a-z](\d+)", entry.group(1)) if entry else []
    actual = [int(bits) for bits in declarations]
    expected = [64 if kind.startswith("*") else _bits(kernel, kind) for _, kind in kernel.parameters]
    expected += [64] * len(HIDDEN_PARAMETERS)
    if actual != expected:
        raise PluginError(
            f"{_what(kernel, arch)} was compiled to parameters of {actual} bits, but launches pass {expected}"
        )


def _bits(kernel: Kernel, kind: str) -> int:
    if kind not in _BITS:
        raise PluginError(
            f"{kernel.function} has a parameter of type {kind}: pointers and {sorted(_BITS)} are passed"
        )
    return _BITS[kind]


def _what(kernel: Kernel, arch: int) -> str:
    constants = ", ".join(f"{name}={value}" for name, value in kernel.constants)
    return f"{kernel.module}.{kernel.function} for sm_{arch} ({constants})"
