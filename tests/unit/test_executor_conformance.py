"""What every executor has to do, whatever computes its logits."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtforge.builder.engine import choose_target
from trtforge.builder.rank_engine import build_rank_engine
from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError
from trtforge.manifest import LayerCache, Limits, Manifest, Rank
from trtforge.runtime.executor import Executor, Float32Array, KVCacheSpec
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor
from trtforge.runtime.executors.reference_executor import ReferenceExecutor
from trtforge.runtime.scheduling.block_moves import BlockMoves

VOCAB_SIZE = 128
SPEC = KVCacheSpec(block_size=32, num_blocks=24, num_host_blocks=4)
LIMITS = Limits(max_model_len=768, max_num_seqs=4, max_num_batched_tokens=800)
# Of the fake engine's 2 layers of one float32.
SWAP_BYTES = 4 * 32 * 2 * 2 * 4

Drive = Callable[..., Any]  # see the fixture of this name

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU"),
]


@pytest.fixture(
    scope="module",
    params=[
        "fake",
        "openvino",
        "reference",
        "ranks-fake",
        "tensorrt-fake",
        "tensorrt-rtx-fake",
        pytest.param("reference-cuda", marks=ON_GPU),
        pytest.param("tensorrt-rtx", marks=ON_GPU),
    ],
)
def make_executor(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    """Makes executors of one kind whose logits are the same function of a sequence's tokens."""
    if request.param == "fake":
        return lambda: FakeExecutor(VOCAB_SIZE, SPEC.num_blocks, SPEC.block_size, num_host_blocks=4)
    if request.param == "ranks-fake":
        return _fake_ranks(request.getfixturevalue("tmp_path_factory").mktemp("ranks"), request)
    if request.param.endswith("-fake"):
        options = EngineOptions(swap_bytes=SWAP_BYTES)
        make = request.getfixturevalue("make_tensorrt_executor")
        runtime = request.param.removesuffix("-fake")
        return lambda: make(runtime, limits=LIMITS, options=options)
    folder, manifest = request.getfixturevalue("export_tiny_llama")("float32")
    if request.param == "tensorrt-rtx":
        request.getfixturevalue("tensorrt_rtx")
        return _tensorrt_rtx(folder, manifest)
    if request.param.startswith("reference"):
        device = torch.device("cuda" if request.param == "reference-cuda" else "cpu")
        return lambda: ReferenceExecutor(folder, manifest, device=device, num_host_blocks=4)
    return lambda: OpenVINOExecutor(folder, manifest, threads=2, num_host_blocks=4)


def _fake_ranks(folder: Path, request: pytest.FixtureRequest) -> Callable[[], Executor]:
    """Two processes, each with the logits of half of the tokens."""
    layers = (LayerCache(num_kv_heads=1, head_dim=1),)
    columns = ((0, VOCAB_SIZE // 2), (VOCAB_SIZE // 2, VOCAB_SIZE))
    ranks = tuple(
        Rank(onnx=f"rank{number}/model.onnx", kv_layers=layers, logits_columns=columns[number])
        for number in range(2)
    )
    changes = {"runtime": "fake", "limits": LIMITS, "ranks": ranks, "tp_size": 2}
    manifest = request.getfixturevalue("make_manifest")(layers).model_copy(update=changes)
    return lambda: create_executor(manifest, folder, EngineOptions(swap_bytes=SWAP_BYTES))


def _tensorrt_rtx(folder: Path, manifest: Manifest) -> Callable[[], Executor]:
    """Of an engine for this machine's GPU, in true float32."""
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    major, minor = torch.cuda.get_device_capability()
    try:
        target = choose_target("tensorrt-rtx", [f"sm_{major}{minor}"])
    except ConfigError as error:
        pytest.skip(str(error))
    graph, layout = folder / "model.onnx", manifest.kv_cache
    engine = build_rank_engine(graph, target, LIMITS, layout, None, lambda fraction, step: None)
    rank = manifest.ranks[0].model_copy(update={"onnx": f"{folder.name}/model.onnx", "engine": engine})
    changes = {"runtime": "tensorrt-rtx", "limits": LIMITS, "ranks": (rank,)}
    options = EngineOptions(swap_bytes=4 * layout.block_size * layout.bytes_per_token)
    return lambda: create_executor(manifest.model_copy(update=changes), folder.parent, options)


@pytest.fixture(scope="module")
def executor(make_executor: Callable[[], Executor]) -> Executor:
    """One executor for many tests: each also shows that the tests before it left no trace."""
    return make_executor()


def tokens(seed: int, length: int) -> list[int]:
    """A text of random tokens."""
    return np.random.default_rng(seed).integers(VOCAB_SIZE, size=length).tolist()


def chunks(text: list[int], *sizes: int) -> list[list[int]]:
    """The text cut into pieces of these sizes and what is left."""
    ends = np.cumsum(sizes)
    return [piece for piece in map(list, np.split(text, ends)) if piece]


def assert_same(actual: Float32Array, expected: Float32Array) -> None:
    """Equal up to the order of float32 sums, which differs with the size of a step."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_packed_batch_equals_each_sequence_alone(executor: Executor, drive: Drive) -> None:
    texts = {"a": tokens(1, 50), "b": tokens(2, 1), "c": tokens(3, 32), "d": tokens(4, 97)}
    packed = drive(executor).run([texts])
    for name, text in texts.items():
        assert_same(packed[name], drive(executor).run([{name: text}])[name])


@pytest.mark.parametrize("sizes", [(1,), (31, 1), (32,), (33, 40), (64, 1, 1)])
def test_chunked_prefill_equals_whole(executor: Executor, drive: Drive, sizes: Sequence[int]) -> None:
    text = tokens(5, 100)
    whole = drive(executor).run([{"a": text}])["a"]
    chunked = drive(executor).run({"a": piece} for piece in chunks(text, *sizes))["a"]
    assert_same(chunked, whole)


def test_decode_continues_prefill(executor: Executor, drive: Drive) -> None:
    text = tokens(6, 70)
    whole = drive(executor).run([{"a": text}])["a"]
    decoded = drive(executor).run({"a": piece} for piece in chunks(text, 25, *[1] * 44))["a"]
    assert_same(decoded, whole)


def test_history_reaches_the_logits(executor: Executor, drive: Drive) -> None:
    """What all the other tests stand on: an executor that ignores the cache would pass them."""
    one, other = tokens(7, 80), tokens(7, 80)
    other[3] = (other[3] + 1) % VOCAB_SIZE
    rows = [drive(executor).run({"a": piece} for piece in chunks(text, 40, 39))["a"] for text in (one, other)]
    assert_same(rows[1][:3], rows[0][:3])
    assert np.abs(rows[1][-1] - rows[0][-1]).max() > 1e-3 * np.abs(rows[0]).max()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_over_any_blocks_equals_alone(
    executor: Executor, drive: Drive, data: st.DataObject
) -> None:
    """Prefills, chunks and decodes mixed in one step, in any order; blocks scattered over the cache."""
    texts = {
        name: tokens(seed, data.draw(st.integers(1, 90), label=f"length of {name}"))
        for seed, name in enumerate("abc", start=10)
    }
    block_order = data.draw(st.permutations(range(SPEC.num_blocks)), label="block order")
    left = dict(texts)
    schedule = []
    while left:
        names = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True), label="sequences")
        sizes = {
            name: data.draw(st.integers(1, len(left[name])), label=f"tokens of {name}") for name in names
        }
        schedule.append({name: left[name][:size] for name, size in sizes.items()})
        left = {name: text[sizes.get(name, 0) :] for name, text in left.items()}
        left = {name: text for name, text in left.items() if text}
    scheduled = drive(executor, block_order).run(schedule)
    for name, text in texts.items():
        assert_same(scheduled[name], drive(executor).run([{name: text}])[name])


def test_reused_blocks_leave_no_trace(make_executor: Callable[[], Executor], drive: Drive) -> None:
    text = tokens(8, 45)
    fresh = drive(make_executor()).run([{"a": text}])["a"]
    executor = make_executor()
    driver = drive(executor)
    num_slots = SPEC.num_blocks * SPEC.block_size
    for _ in range(2):
        driver.run([{"b": tokens(9, num_slots - 7)}])
        driver.free("b")
        np.testing.assert_array_equal(driver.run([{"a": text}])["a"], fresh)
        driver.free("a")


def _changed(array: Any, index: Any, value: int) -> Any:
    array = array.copy()
    array[index] = value
    return array


BAD_STEPS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "block beyond the cache": lambda step: {
        "block_tables": _changed(step.block_tables, (0, -1), SPEC.num_blocks)
    },
    "negative block": lambda step: {"block_tables": _changed(step.block_tables, (0, 0), -1)},
    "table too short": lambda step: {"block_tables": step.block_tables[:, :-1].copy()},
    "slot of another block": lambda step: {"slot_mapping": _changed(step.slot_mapping, 5, 0)},
    "context without the new tokens": lambda step: {"context_lens": step.context_lens - 1},
    "positions of other tokens": lambda step: {"position_ids": step.position_ids + 1},
    "row that does not exist": lambda step: {
        "logits_indices": _changed(step.logits_indices, 0, len(step.input_ids))
    },
    "negative row": lambda step: {"logits_indices": _changed(step.logits_indices, 0, -1)},
    "token beyond the vocabulary": lambda step: {"input_ids": _changed(step.input_ids, 2, VOCAB_SIZE)},
    "negative token": lambda step: {"input_ids": _changed(step.input_ids, 2, -1)},
    "tokens of no sequence": lambda step: {"cu_seqlens": step.cu_seqlens - np.int32([0, 1])},
}


@pytest.mark.parametrize("problem", BAD_STEPS)
def test_failed_step_harms_no_other_blocks(executor: Executor, drive: Drive, problem: str) -> None:
    text = tokens(11, 60)
    expected = drive(executor).run([{"a": text}])["a"]
    driver = drive(executor)
    before = driver.step({"a": text[:40]})["a"]
    bad = driver.inputs({"b": tokens(12, 70)})
    with pytest.raises(ValueError, match=r"\w"):
        executor.execute(dataclasses.replace(bad, **BAD_STEPS[problem](bad)))
    after = driver.step({"a": text[40:]})["a"]
    assert_same(np.concatenate([before, after]), expected)


def test_logits_rows_come_in_the_wanted_order(executor: Executor, drive: Drive) -> None:
    texts = {"a": tokens(13, 20), "b": tokens(14, 40)}
    rows = np.concatenate(list(drive(executor).step(texts).values()))
    for wanted in ([59], [19, 59], [59, 0, 19, 20], [3, 3]):
        logits = executor.execute(drive(executor).inputs(texts, wanted)).logits
        assert logits.shape == (len(wanted), VOCAB_SIZE)
        assert logits.dtype == np.float32
        assert_same(logits, rows[wanted])


def test_logits_stay_until_the_next_step(executor: Executor, drive: Drive) -> None:
    driver = drive(executor)
    logits = executor.execute(driver.inputs({"a": tokens(15, 40)})).logits
    copy = logits.copy()
    gc.collect()  # the outputs object and the inputs are gone
    driver.inputs({"b": tokens(16, 200)})
    np.testing.assert_array_equal(logits, copy)


def test_moved_blocks_keep_their_contents(executor: Executor, drive: Drive) -> None:
    """The same blocks under other numbers give the same logits; those left behind may be written to."""
    text = tokens(19, 80)
    expected = drive(executor).run([{"a": text}])["a"][70:]
    original = drive(executor, [3, 4, 5])
    original.step({"a": text[:70]})
    executor.move_blocks(BlockMoves(swap_out=[(4, 2), (5, 0)], copies=[(3, 9)]))
    overwriting = drive(executor, [3, 4, 5])
    overwriting.step({"b": tokens(20, 96)})
    executor.move_blocks(BlockMoves(swap_in=[(2, 11), (0, 10)]))
    moved = original.inputs({"a": text[70:]})
    renumbered = np.array([[9, 11, 10]], np.int32)
    slots = renumbered[0, moved.position_ids // 32] * 32 + moved.position_ids % 32
    moved = dataclasses.replace(moved, block_tables=renumbered, slot_mapping=slots.astype(np.int32))
    assert_same(executor.execute(moved).logits, expected)


def test_cache_spec_is_what_was_asked_for(executor: Executor, drive: Drive) -> None:
    assert executor.kv_cache_spec() == SPEC
    drive(executor).run([{"a": tokens(17, SPEC.block_size * SPEC.num_blocks)}])
    assert executor.kv_cache_spec() == SPEC


def test_close_is_idempotent(make_executor: Callable[[], Executor], drive: Drive) -> None:
    executor = make_executor()
    drive(executor).run([{"a": tokens(18, 5)}])
    executor.close()
    executor.close()
    assert executor.kv_cache_spec() == SPEC
