"""What tests of executors share: sequences fed step by step, and a tiny model for OpenVINO."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.export import export_model, write_graph
from trtforge.builder.repository import VERSION_FOLDER, install_triton_model
from trtforge.checking.onnxruntime_model import OnnxRuntimeModel
from trtforge.checking.packing import PackedSequences
from trtforge.engine_options import EngineOptions
from trtforge.integrity import file_digest
from trtforge.manifest import (
    CacheDType,
    DType,
    KVCacheLayout,
    LayerCache,
    Limits,
    Manifest,
    ModelInfo,
    Rank,
    Runtime,
)
from trtforge.runtime.executor import Executor, Float32Array

VOCAB_SIZE = 128
FOLDER = Path(__file__).parent
# Tests import what they share from the folders beside this file.
sys.path.append(str(FOLDER))


class SequenceDriver:
    """Feeds sequences to an executor step by step, with block tables of its own."""

    def __init__(
        self, executor: Executor | OnnxRuntimeModel, block_order: Iterable[int] | None = None
    ) -> None:
        """Blocks are given out in `block_order`, by default in ascending order."""
        spec = executor.kv_cache_spec()
        self._executor = executor
        self._sequences = PackedSequences(
            spec.block_size, range(spec.num_blocks) if block_order is None else block_order
        )
        self.inputs = self._sequences.step
        self.free = self._sequences.free

    def step(self, new_tokens: Mapping[str, Sequence[int]], num_padding: int = 0) -> dict[str, Float32Array]:
        """Run one step; returns the logits of each sequence's new tokens, [new, vocab_size]."""
        inputs = self.inputs(new_tokens, num_padding=num_padding)
        logits = self._executor.execute(inputs).logits.copy()
        ends = np.cumsum([len(new) for new in new_tokens.values()])
        return dict(zip(new_tokens, np.split(logits, ends[:-1]), strict=True))

    def run(self, schedule: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, Float32Array]:
        """Run many steps; returns the logits of each sequence's tokens, [its tokens, vocab_size]."""
        rows: dict[str, list[Float32Array]] = {}
        for new_tokens in schedule:
            for name, logits in self.step(new_tokens).items():
                rows.setdefault(name, []).append(logits)
        return {name: np.concatenate(logits) for name, logits in rows.items()}


@pytest.fixture(scope="session")
def drive() -> type[SequenceDriver]:
    """`drive(executor, block_order=None)`: a SequenceDriver without sequences."""
    return SequenceDriver


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    """`make_manifest(layers, dtype=..., ...)`: the manifest of a model.onnx for the openvino runtime."""

    def make(
        layers: tuple[LayerCache, ...],
        *,
        dtype: DType = "float32",
        kv_cache_dtype: CacheDType | None = None,
        block_size: int = 32,
        num_blocks: int = 24,
        vocab_size: int = VOCAB_SIZE,
    ) -> Manifest:
        return Manifest(
            trtforge_version="0",
            build_key="test",
            runtime="openvino",
            dtype=dtype,
            model=ModelInfo(
                name="tiny", architecture="Tiny", vocab_size=vocab_size, num_parameters=1, eos_token_ids=()
            ),
            kv_cache=KVCacheLayout(
                dtype=kv_cache_dtype or dtype, block_size=block_size, num_blocks=num_blocks, layers=layers
            ),
            limits=Limits(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512),
            ranks=(Rank(onnx="model.onnx", kv_layers=layers, logits_columns=(0, vocab_size)),),
            files={},
        )

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_random_llama: Callable[..., Path]) -> Path:
    """A Hugging Face folder: a random llama of VOCAB_SIZE tokens, 4 heads and 2 KV heads."""
    return make_random_llama(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, max_position_embeddings=512
    )


@pytest.fixture(scope="session")
def export_tiny_llama(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, make_manifest: Callable[..., Manifest]
) -> Callable[[DType], tuple[Path, Manifest]]:
    """`export_tiny_llama(dtype)`: the folder of its graph and its manifest; made once for each dtype."""
    made: dict[DType, tuple[Path, Manifest]] = {}

    def export(dtype: DType) -> tuple[Path, Manifest]:
        if dtype not in made:
            folder = tmp_path_factory.mktemp(dtype)
            exported = export_model(Checkpoint.open(str(tiny_llama)), dtype)
            write_graph(exported, folder)
            made[dtype] = folder, make_manifest(exported.layers, dtype=dtype)
        return made[dtype]

    return export


@pytest.fixture(scope="session")
def tensorrt_rtx() -> ModuleType:
    """The package; tests that need it are skipped where it is not installed."""
    return pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")


@pytest.fixture
def make_repository(
    export_tiny_llama: Callable[[DType], tuple[Path, Manifest]], tmp_path: Path
) -> Callable[[DType], Path]:
    """`make_repository(dtype)`: a repository of this test's own with the tiny llama, for openvino."""

    def make(dtype: DType) -> Path:
        graph_folder, manifest = export_tiny_llama(dtype)
        version = tmp_path / "repository" / "llm" / VERSION_FOLDER
        files = {f"rank0/{name}": version / "rank0" / name for name in ("model.onnx", "model.safetensors")}
        (version / "rank0").mkdir(parents=True)
        for file in files.values():
            shutil.copy(graph_folder / file.name, file)
        rank = manifest.ranks[0].model_copy(update={"onnx": "rank0/model.onnx"})
        written = {
            "ranks": (rank,),
            "files": {name: file.stat().st_size for name, file in files.items()},
            "sha256": {name: file_digest(file) for name, file in files.items()},
        }
        model = manifest.model.model_copy(update={"name": "llm"})
        install_triton_model(version.parent, manifest.model_copy(update={**written, "model": model}))
        return tmp_path / "repository"

    return make


@pytest.fixture(scope="session")
def cuda_driver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fake CUDA driver and the fake NCCL, for LD_LIBRARY_PATH of another process."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.fail("these tests compile a fake CUDA driver: install a C compiler (cc, gcc or clang)")
    folder = tmp_path_factory.mktemp("driver")
    for source, library in (("libcuda.c", "libcuda.so.1"), ("libnccl.c", "libnccl.so.2")):
        command = [compiler, "-shared", "-fPIC", "-o", str(folder / library)]
        subprocess.run([*command, str(FOLDER / "fake_cuda" / source)], check=True)
    return folder


@pytest.fixture(scope="session")
def make_threaded_ranks() -> Callable[..., Any]:
    """`make_threaded_ranks(exported, tp, folder, block_size, num_blocks)`: see `threaded_ranks/model.py`."""
    from threaded_ranks.model import ThreadedRanks

    return ThreadedRanks


@pytest.fixture(scope="session")
def make_tensorrt_executor(
    tmp_path_factory: pytest.TempPathFactory, cuda_driver_folder: Path, make_manifest: Callable[..., Manifest]
) -> Callable[..., Executor]:
    """`make_tensorrt_executor(runtime, limits=..., options=..., tp_size=..., pp_size=..., **environment)`:
    one in a process of its own, where driver and TensorRT are fake ones; see `fake_tensorrt/client.py`."""
    from fake_tensorrt.client import FakeTensorRTExecutor, write_model

    def make(
        runtime: Runtime = "tensorrt-rtx",
        *,
        limits: Limits | None = None,
        options: EngineOptions | None = None,
        content: str | None = None,
        has_kernels: bool = True,
        dtype: DType = "float32",
        tp_size: int = 1,
        pp_size: int = 1,
        **environment: str,
    ) -> Executor:
        folder = tmp_path_factory.mktemp("engine")
        layers = (LayerCache(num_kv_heads=1, head_dim=1),) * 2
        manifest = make_manifest(layers, dtype=dtype, kv_cache_dtype="float32")
        manifest = manifest.model_copy(update={"runtime": runtime, "limits": limits or manifest.limits})
        manifest = write_model(
            folder, manifest, content=content, has_kernels=has_kernels, tp_size=tp_size, pp_size=pp_size
        )
        driver = {"LD_LIBRARY_PATH": str(cuda_driver_folder), "FAKE_CUDA_ARCH": "89"}
        return FakeTensorRTExecutor(folder, manifest, options or EngineOptions(), driver | environment)

    return make
