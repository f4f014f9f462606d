"""What several ranks cost on the cores of one machine: telling them a step, adding up, and both in a model.

    python benchmarks/parallel.py [--single FOLDER --sharded FOLDER] [--json FILE]

Every figure is the best of several rounds' medians, since other work on the cores shows first where processes
wait for each other. A step's broadcast is the time of a step of ranks with a fake executor, less that
of this executor alone. Sums of two ranks are those of float32; gloo, by torch.distributed, does the same.
With the folders of one model's manifest, built with --tp 1 and with --tp 2, decode and prefill of two ranks
with one thread each are compared with one rank with two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import Figure, describe_machine, finish
from parallel_rank import SIZES_BYTES

from trtforge.checking.packing import PackedSequences
from trtforge.engine_options import EngineOptions
from trtforge.manifest import KVCacheLayout, LayerCache, Limits, Manifest, ModelInfo, Rank
from trtforge.runtime.executor import Executor, ModelInputs
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.parallel.communicator import GroupShape
from trtforge.runtime.parallel.memory_communicator import communicator_bytes
from trtforge.runtime.parallel.shared_memory import SharedMemory

ROUNDS = 3
NUM_RANKS = 2
VOCAB_SIZE = 32_000
NUM_SEQS = (1, 64, 256)
PREFILL_TOKENS = 256
DECODE_SEQS = (1, 8)
STEPS = 30


def main() -> None:
    """Print all figures; the headline is what a sum of one token's activations takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--single", type=Path, help="folder with the manifest of the model on one rank")
    parser.add_argument("--sharded", type=Path, help="the same with --tp 2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sums = _measure_sums()
    figures = [*sums, *_measure_broadcast()]
    if arguments.single and arguments.sharded:
        figures += _measure_model(arguments.single, arguments.sharded)
    for figure in figures:
        print(f"{figure.name:<44}{figure.value:>12,.1f} {figure.unit}")
    finish(sums[0], figures[1:], describe_machine(["numpy", "torch", "openvino"]), arguments.json)


def _measure_sums() -> list[Figure]:
    figures = []
    for kind in ("ours", "gloo"):
        rounds = [_sum_round(kind) for _ in range(ROUNDS)]
        figures += [
            Figure(
                f"all_reduce of {size} bytes, {kind}",
                min(medians[str(size)] for medians in rounds),
                "us",
                higher_is_better=False,
            )
            for size in SIZES_BYTES
        ]
    return figures


def _sum_round(kind: str) -> dict[str, float]:
    program = str(Path(__file__).with_name("parallel_rank.py"))
    _, fd = SharedMemory.create(communicator_bytes(GroupShape(NUM_RANKS, 1)))
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(fd) if kind == "ours" else f"{folder}/meeting"
        ranks = [
            subprocess.Popen(
                [sys.executable, program, kind, meeting, str(rank), str(NUM_RANKS)],
                pass_fds=[fd],
                stdout=subprocess.PIPE,
            )
            for rank in range(NUM_RANKS)
        ]
        os.close(fd)
        outputs = [rank.communicate()[0] for rank in ranks]
    medians: dict[str, float] = json.loads(outputs[0])
    return medians


def _measure_broadcast() -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = _fake_manifest(())
        columns = [(0, VOCAB_SIZE // 2), (VOCAB_SIZE // 2, VOCAB_SIZE)]
        layers = alone.kv_cache.layers
        both = _fake_manifest(
            tuple(Rank(onnx=f"rank{i}/", kv_layers=layers, logits_columns=c) for i, c in enumerate(columns))
        )
        with _executor(alone, folder) as one, _executor(both, folder) as two:
            for num_seqs in NUM_SEQS:
                inputs = _decode(one, num_seqs)
                two.execute(_prefill(num_seqs))
                cost_us = _best_us(two, inputs) - _best_us(one, inputs)
                figures.append(
                    Figure(f"broadcast of {num_seqs} sequences", cost_us, "us", higher_is_better=False)
                )
    return figures


def _fake_manifest(ranks: tuple[Rank, ...]) -> Manifest:
    return Manifest(
        trtforge_version="0",
        build_key="fake",
        runtime="fake",
        dtype="float32",
        model=ModelInfo(
            name="fake", architecture="Fake", vocab_size=VOCAB_SIZE, num_parameters=1, eos_token_ids=()
        ),
        kv_cache=KVCacheLayout(
            dtype="float32",
            block_size=32,
            num_blocks=2 * max(NUM_SEQS),
            layers=(LayerCache(num_kv_heads=1, head_dim=1),),
        ),
        limits=Limits(max_model_len=64, max_num_seqs=max(NUM_SEQS), max_num_batched_tokens=2048),
        tp_size=max(1, len(ranks)),
        ranks=ranks,
        files={},
    )


def _measure_model(single: Path, sharded: Path) -> list[Figure]:
    figures = []
    options = EngineOptions(threads=NUM_RANKS)
    times: dict[str, list[float]] = {}
    # In turns, so that both see the same machine.
    with (
        _executor(Manifest.load(single), single, options) as one,
        _executor(Manifest.load(sharded), sharded, options) as two,
    ):
        for num_seqs in DECODE_SEQS:
            one_inputs, _ = _decode(one, num_seqs), _decode(two, num_seqs)
            times[f"decode of {num_seqs}"] = [_best_us(executor, one_inputs) for executor in (one, two)]
        prefill = _prefill(1, PREFILL_TOKENS)
        times[f"prefill of {PREFILL_TOKENS}"] = [
            _best_us(executor, prefill, steps=5) for executor in (one, two)
        ]
    for name, (one_us, two_us) in times.items():
        figures += [
            Figure(f"{name}, one rank", one_us / 1e3, "ms", higher_is_better=False),
            Figure(f"{name}, two ranks", two_us / 1e3, "ms", higher_is_better=False),
            Figure(f"{name}, speed of two ranks", 100 * one_us / two_us, "% of one rank's"),
        ]
    return figures


@contextmanager
def _executor(manifest: Manifest, folder: Path, options: EngineOptions | None = None) -> Iterator[Executor]:
    executor = create_executor(manifest, folder, options or EngineOptions())
    yield executor
    executor.close()


def _prefill(num_seqs: int, num_tokens: int = 4) -> ModelInputs:
    sequences = PackedSequences(32, range(2 * max(num_seqs, 64)))
    return sequences.step({str(row): [5] * num_tokens for row in range(num_seqs)}, [0])


def _decode(executor: Executor, num_seqs: int) -> ModelInputs:
    """A step of one token for each of sequences that the executor has the beginning of."""
    sequences = PackedSequences(32, range(2 * max(num_seqs, 64)))
    executor.execute(sequences.step({str(row): [5] * 4 for row in range(num_seqs)}, [0]))
    return sequences.step({str(row): [6] for row in range(num_seqs)})


def _best_us(executor: Executor, inputs: ModelInputs, steps: int = STEPS) -> float:
    return min(_median_us(executor, inputs, steps) for _ in range(ROUNDS))


def _median_us(executor: Executor, inputs: ModelInputs, steps: int) -> float:
    times: Sequence[float] = [_step_us(executor, inputs) for _ in range(steps)]
    return float(statistics.median(times))


def _step_us(executor: Executor, inputs: ModelInputs) -> float:
    started = time.perf_counter()
    logits = executor.execute(inputs).logits
    elapsed_us = 1e6 * (time.perf_counter() - started)
    if not np.isfinite(logits[0, 0]):
        raise ValueError("a step computed no numbers")
    return elapsed_us


if __name__ == "__main__":
    main()
