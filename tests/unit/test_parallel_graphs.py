"""Sharded builds in real processes: the tokens of one rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.export import TracedModel, divide, trace_checkpoint, write_graph
from trtforge.builder.sharding.split import Parallelism
from trtforge.checking.packing import PackedSequences
from trtforge.engine_options import EngineOptions
from trtforge.manifest import CacheDType, LayerCache, Limits, Manifest, Rank, Runtime
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.executor import Executor
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.parallel import micro_batches
from trtforge.runtime.request import EngineRequest, SamplingParams

VOCAB_SIZE = 450
LENGTHS = (1, 5, 40, 70)
MAX_TOKENS = 12
# More than one chunk for the longest prompts.
LIMITS = Limits(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32)

BuildModel = Callable[..., Path]


@pytest.fixture(scope="module")
def build_model(
    tmp_path_factory: pytest.TempPathFactory,
    make_random_llama: Callable[..., Path],
    make_manifest: Callable[..., Manifest],
) -> BuildModel:
    """`build_model(tp, pp, runtime, cache_dtype="float32")`: a new folder with the graphs and the manifest of
    a random llama with 9 heads and 3 KV heads."""
    checkpoint = make_random_llama(
        vocab_size=VOCAB_SIZE,
        hidden_size=144,
        intermediate_size=96,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=128,
    )

    @functools.cache
    def trace(cache_dtype: CacheDType) -> TracedModel:
        opened = Checkpoint.open(str(checkpoint))
        return trace_checkpoint(opened, "float32", lambda _: None, cache_dtype=cache_dtype)

    def make(tp: int, pp: int, runtime: Runtime, cache_dtype: CacheDType = "float32") -> Path:
        folder = tmp_path_factory.mktemp("model")
        parts = divide(trace(cache_dtype), Parallelism(tp, pp)).ranks
        for number, part in enumerate(parts):
            write_graph(part, folder / f"rank{number}")
        ranks = tuple(
            Rank(onnx=f"rank{number}/model.onnx", kv_layers=part.layers, logits_columns=part.logits_columns)
            for number, part in enumerate(parts)
        )
        layers = (LayerCache(num_kv_heads=3, head_dim=16),) * 2
        manifest = make_manifest(layers, kv_cache_dtype=cache_dtype, vocab_size=VOCAB_SIZE).model_copy(
            update={"runtime": runtime, "limits": LIMITS, "ranks": ranks, "tp_size": tp, "pp_size": pp}
        )
        manifest.save(folder)
        return folder

    return make


@pytest.fixture
def create() -> Iterator[Callable[..., Executor]]:
    """`create(folder, threads=...)`: an executor that the test's end closes."""
    made: list[Executor] = []

    def create(folder: Path, threads: int = 1) -> Executor:
        made.append(create_executor(Manifest.load(folder), folder, EngineOptions(threads=threads)))
        return made[-1]

    yield create
    for executor in made:
        executor.close()


def greedy_tokens(executor: Executor) -> dict[str, list[int]]:
    """Of several requests at once."""
    core = EngineCore(executor, LIMITS, (), VOCAB_SIZE)
    random = np.random.default_rng(3)
    for row, length in enumerate(LENGTHS):
        prompt = tuple(random.integers(VOCAB_SIZE, size=length).tolist())
        core.add_request(EngineRequest(str(row), prompt, SamplingParams(max_tokens=MAX_TOKENS)))
    tokens: dict[str, list[int]] = {str(row): [] for row in range(len(LENGTHS))}
    while core.has_work():
        for output in core.step():
            assert output.error is None
            tokens[output.request_id] += output.token_ids
    core.close()
    return tokens


@pytest.fixture(scope="module")
def expected(build_model: BuildModel) -> dict[str, list[int]]:
    """The tokens of one rank."""
    folder = build_model(1, 1, "openvino")
    executor = create_executor(Manifest.load(folder), folder, EngineOptions(threads=1))
    tokens = greedy_tokens(executor)
    assert all(len(set(generated)) > 5 for generated in tokens.values())
    return tokens


@pytest.mark.parametrize(
    ("runtime", "tp", "pp"),
    [
        ("openvino", 2, 1),
        ("openvino", 3, 1),
        ("openvino", 1, 2),
        ("openvino", 2, 2),
        ("reference", 2, 2),
    ],
)
def test_tokens_of_ranks_are_those_of_one(
    build_model: BuildModel,
    create: Callable[..., Executor],
    expected: dict[str, list[int]],
    runtime: str,
    tp: int,
    pp: int,
) -> None:
    assert greedy_tokens(create(build_model(tp, pp, runtime))) == expected


def test_ranks_with_a_cache_of_8_bit_floats(
    build_model: BuildModel, create: Callable[..., Executor], expected: dict[str, list[int]]
) -> None:
    one, four = (greedy_tokens(create(build_model(n, n, "reference", "float8_e4m3fn"))) for n in (1, 2))
    assert four == one != expected


def test_stages_that_compute_parts_of_a_step_at_the_same_time(
    build_model: BuildModel, create: Callable[..., Executor]
) -> None:
    """A step with enough tokens for several parts, of which the last wants no logits."""
    folders = [build_model(1, pp, "openvino") for pp in (1, 2)]
    limits = LIMITS.model_copy(update={"max_num_batched_tokens": 400})
    for folder in folders:
        Manifest.load(folder).model_copy(update={"limits": limits}).save(folder)
    single, staged = (create(folder) for folder in folders)
    sequences = PackedSequences(32, range(40))
    texts = {name: [*range(start, start + 90)] for name, start in (("a", 1), ("b", 50), ("c", 200))}
    inputs = sequences.step(texts, [89, 0, 5])
    assert len(micro_batches.split_step(inputs, 2)) == 2
    one, two = single.execute(inputs).logits, staged.execute(inputs).logits
    np.testing.assert_allclose(two, one, rtol=0, atol=2e-5 * np.abs(one).max())
    # What the parts have stored is there.
    inputs = sequences.step({"c": [1], "a": [2], "b": [3]})
    one, two = single.execute(inputs).logits, staged.execute(inputs).logits
    np.testing.assert_allclose(two, one, rtol=0, atol=2e-5 * np.abs(one).max())
