"""Engines on a GPU give the logits that the reference executor gives on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from trtforge.builder.build import build
from trtforge.builder.options import BuildOptions
from trtforge.checking.packing import PackedSequences
from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError
from trtforge.manifest import Manifest
from trtforge.runtime.executor import Executor
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.executors.reference_executor import ReferenceExecutor
from trtforge.runtime.scheduling.block_moves import BlockMoves

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU"),
]

VOCAB_SIZE = 400
# Relative to the largest logit, of bfloat16 weights. Not measured: no GPU has run this yet.
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def checkpoint(make_random_llama: Callable[..., Path], tiny_tokenizer: Path) -> Path:
    """A random llama whose heads are as large as those of the kernels."""
    folder = make_random_llama(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=256, max_position_embeddings=256
    )
    shutil.copytree(tiny_tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def model_dir(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A build for this machine's GPU."""
    package = request.param.replace("-", "_")
    if find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    major, minor = torch.cuda.get_device_capability()
    options = BuildOptions(
        model=str(checkpoint),
        output=tmp_path_factory.mktemp("repository"),
        runtime=request.param,
        dtype="bfloat16",
        max_num_seqs=5,
        max_num_batched_tokens=128,
        block_size=32,
        gpus=(f"sm_{major}{minor}",),
        engine_cache=None,
    )
    try:
        return build(options).folder / "1"
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def executor(model_dir: Path) -> Executor:
    options = EngineOptions(kv_cache_bytes=2**24, swap_bytes=2**22)
    return create_executor(Manifest.load(model_dir), model_dir, options)


@pytest.fixture
def compare(model_dir: Path, executor: Executor) -> Callable[[list[dict[str, list[int]]]], None]:
    """Runs a schedule with both executors; each step maps sequences to new tokens."""

    def compare(schedule: list[dict[str, list[int]]]) -> None:
        manifest = Manifest.load(model_dir)
        reference = ReferenceExecutor(model_dir, manifest, device=torch.device("cpu"))
        spec = executor.kv_cache_spec()
        sequences = PackedSequences(spec.block_size, reversed(range(min(spec.num_blocks, 40))))
        for new_tokens in schedule:
            inputs = sequences.step(new_tokens)
            expected, actual = reference.execute(inputs).logits, executor.execute(inputs).logits
            np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())

    return compare


def tokens(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(VOCAB_SIZE, size=length).tolist()


def test_prefill_chunks_and_decode_together(compare: Callable[..., None]) -> None:
    texts = {name: tokens(seed, 100) for seed, name in enumerate("abc")}
    compare(
        [
            {"a": texts["a"][:37]},
            {"a": texts["a"][37:38], "b": texts["b"][:50]},
            {"b": texts["b"][50:51], "a": texts["a"][38:64], "c": texts["c"][:1]},
            {"a": texts["a"][64:65], "b": texts["b"][51:52], "c": texts["c"][1:2]},
        ]
    )


def test_decode_steps_of_every_number_of_sequences(compare: Callable[..., None]) -> None:
    """Across the ends of blocks too, where a captured step must not keep what it was captured with."""
    texts = {name: tokens(seed, 80) for seed, name in enumerate("abcde", start=10)}
    schedule = [{name: text[:20] for name, text in texts.items()}]
    for position in range(20, 70):
        names = "abcde"[: 5 - position % 5] if position >= 40 else "abcde"
        schedule.append({name: [texts[name][position]] for name in names})
    compare(schedule)


def test_moved_blocks_hold_what_they_held(executor: Executor) -> None:
    sequences = PackedSequences(32, [3, 4, 5])
    executor.execute(sequences.step({"a": tokens(20, 60)}))
    inputs = sequences.step({"a": [7]})
    expected = executor.execute(inputs).logits.copy()
    executor.move_blocks(BlockMoves(swap_out=[(3, 1), (4, 0)], copies=[(9, 3), (9, 4)]))
    assert np.abs(executor.execute(inputs).logits - expected).max() > 0.01
    executor.move_blocks(BlockMoves(swap_in=[(1, 3), (0, 4)]))
    np.testing.assert_allclose(executor.execute(inputs).logits, expected, atol=1e-3)
