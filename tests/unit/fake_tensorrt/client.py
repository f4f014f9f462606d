"""A TensorRTExecutor for tests, in a process of its own, where the CUDA driver and TensorRT are fake ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trtforge import wire
from trtforge.builder.profiles import make_profiles
from trtforge.engine_options import EngineOptions
from trtforge.integrity import file_digest
from trtforge.manifest import KERNELS_FOLDER, EngineInfo, Manifest, Rank
from trtforge.plugins.bundle import MANIFEST_FILE as BUNDLE_FILE
from trtforge.plugins.bundle import BundleManifest
from trtforge.runtime.executor import KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.scheduling.block_moves import BlockMoves

FOLDER = Path(__file__).parent


HIDDEN_SIZE = 3  # as the stand-in has it


def write_model(
    folder: Path,
    manifest: Manifest,
    *,
    content: str | None,
    has_kernels: bool,
    tp_size: int = 1,
    pp_size: int = 1,
) -> Manifest:
    """Fake engines for sm_89 in `folder`, one a rank, beside a bundle without kernels, and the manifest with
    them.

    `content` is what the files hold instead of those engines.
    """
    layers, vocab_size = manifest.kv_cache.layers, manifest.model.vocab_size
    bounds = [vocab_size * rank // tp_size for rank in range(tp_size + 1)]
    ranks = []
    for number in range(tp_size * pp_size):
        stage, place = divmod(number, tp_size)
        own = slice(len(layers) * stage // pp_size, len(layers) * (stage + 1) // pp_size)
        columns = (bounds[place], bounds[place + 1]) if stage == pp_size - 1 else (0, 0)
        rank = Rank(onnx=manifest.ranks[0].onnx, kv_layers=layers[own], logits_columns=columns)
        engine = _write_engine(folder / f"model{number}.engine", manifest, rank, content, is_first=stage == 0)
        ranks.append(rank.model_copy(update={"engine": engine}))
    if has_kernels:
        bundle = BundleManifest(compiler="none", compiler_version="0", cubins=())
        (folder / KERNELS_FOLDER).mkdir()
        (folder / KERNELS_FOLDER / BUNDLE_FILE).write_text(bundle.model_dump_json())
    sizes = {"tp_size": tp_size, "pp_size": pp_size}
    return manifest.model_copy(update={"ranks": tuple(ranks), **sizes})


def _write_engine(
    path: Path, manifest: Manifest, rank: Rank, content: str | None, *, is_first: bool
) -> EngineInfo:
    package = manifest.runtime.replace("-", "_")
    profiles = make_profiles(package, manifest.limits, manifest.kv_cache)
    start, stop = rank.logits_columns
    is_last = start < stop
    engine = {
        "inputs": wire.stage_inputs(is_first=is_first, is_last=is_last),
        "output": wire.stage_output(is_last=is_last),
        "first_token": start,
        "vocab_size": stop - start,
        "num_layers": len(rank.kv_layers),
        "hidden_size": HIDDEN_SIZE,
        "dtype": manifest.dtype,
        "activation_bytes": [1000 * (index + 1) for index in range(len(profiles))],
        "profiles": [{name: (dim.min, dim.max) for name, dim in p.dims.items()} for p in profiles],
    }
    path.write_text(json.dumps(engine) if content is None else content)
    return EngineInfo(
        file=path.name,
        size_bytes=path.stat().st_size,
        sha256=file_digest(path),
        package=package,
        version="1.2.3",
        compute_capabilities=("8.9",),
        profiles=profiles,
    )


class FakeTensorRTExecutor:
    """Passes everything on to the process, which ends with this object."""

    def __init__(
        self, folder: Path, manifest: Manifest, options: EngineOptions, environment: Mapping[str, str]
    ) -> None:
        """The process gets `environment` beside this one's. Raises what making the executor raises."""
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._record = folder / "calls"
        self._record.write_text("")
        paths = os.pathsep.join([str(FOLDER / "packages"), *sys.path])
        given = {"PYTHONPATH": paths, "FAKE_CUDA_RECORD": str(self._record), **environment}
        self._process = subprocess.Popen(
            [sys.executable, str(FOLDER / "serve.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **given},
        )
        theirs.close()
        self._connection.send((manifest, folder, options))
        self.modules: set[str] = self._answer()  # that were imported, of some that should not be
        self._spec: KVCacheSpec = self.ask("kv_cache_spec")

    def __del__(self) -> None:
        self._connection.close()
        self._process.wait()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method returns, or raises."""
        self._connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        result, problem = self._connection.recv()
        if problem is not None:
            raise problem
        return result

    def calls(self) -> list[str]:
        """What was asked of the driver since this was asked last: function, values."""
        calls = self._record.read_text().splitlines()
        self._record.write_text("")
        return calls

    def kv_cache_spec(self) -> KVCacheSpec:
        return self._spec

    def move_blocks(self, moves: BlockMoves) -> None:
        self.ask("move_blocks", moves)

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        return self.ask("execute", inputs)

    def close(self) -> None:
        self.ask("close")
