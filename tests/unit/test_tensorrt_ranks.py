"""TensorRTExecutor on several ranks: a process each, with a fake driver, a fake TensorRT and a fake NCCL.

What NCCL adds up is in no fake engine; what stages hand on is checked by the stage that gets it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt.client import HIDDEN_SIZE
from fake_tensorrt.steps import INPUT_NAMES, names, step

from trtforge.checking.packing import PackedSequences
from trtforge.errors import ConfigError, DeviceError
from trtforge.manifest import Limits
from trtforge.runtime.executor import ModelInputs

Make = Callable[..., Any]  # see the fixture make_tensorrt_executor

LIMITS = Limits(max_model_len=128, max_num_seqs=6, max_num_batched_tokens=200)
DECODE_SIZES = (1, 2, 4, 6)
VOCAB_SIZE = 128
ROW_BYTES = 4 * HIDDEN_SIZE


@pytest.fixture(scope="module")
def single(make_tensorrt_executor: Make) -> Any:
    return make_tensorrt_executor("tensorrt", limits=LIMITS)


@pytest.fixture(scope="module")
def two_stages(make_tensorrt_executor: Make, cuda_driver_folder: Path, tmp_path_factory: Any) -> Any:
    """Of one rank each, which need no NCCL; `loading` is what they have asked of the driver for a start."""
    folder = tmp_path_factory.mktemp("driver")
    shutil.copy(cuda_driver_folder / "libcuda.so.1", folder)
    made = make_tensorrt_executor("tensorrt", limits=LIMITS, pp_size=2, LD_LIBRARY_PATH=str(folder))
    made.loading = made.calls()
    return made


def assert_same(made: Any, single: Any, steps: list[ModelInputs]) -> None:
    for inputs in steps:
        expected = single.execute(inputs).logits
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(made.execute(inputs).logits, expected)


def mixed_steps() -> list[ModelInputs]:
    """Prefill, chunks beside decode, and decode steps of every number of sequences up to 5."""
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=(5, 128)).tolist()
    lengths = {"a": 3, "b": 40, "c": 20, "d": 1, "e": 33}
    rows = dict(zip(lengths, tokens, strict=True))
    schedule = [lengths, {"c": 30, "a": 1}, {"e": 1, "b": 2}]
    schedule += [dict.fromkeys(chosen, 1) for chosen in ("abcde", "bca", "d", "ec", "abde", "cdeba", "eda")]
    sequences = PackedSequences(32, reversed(range(24)))
    return [
        sequences.step({name: [rows[name].pop() for _ in range(num_new)] for name, num_new in new.items()})
        for new in schedule
    ]


# --------------------------------------------------------------------------- tensor parallelism


def test_ranks_meet_in_nccl_and_share_the_columns(make_tensorrt_executor: Make, single: Any) -> None:
    made = make_tensorrt_executor("tensorrt", limits=LIMITS, tp_size=2)
    calls = [call.split() for call in made.calls()]
    (unique_id,) = [call[3] for call in calls if call[0] == "ncclGetUniqueId"]
    joined = [call[1:] for call in calls if call[0] == "ncclCommInitRank"]
    assert sorted(joined) == [["2", "0", unique_id], ["2", "1", unique_id]]
    assert sorted(call[1] for call in calls if call[0] == "cuDeviceGet") == ["0", "1"]
    # Two profiles and a context for each size of decode steps, in both ranks.
    assert names(" ".join(call) for call in calls)["set_communicator"] == 2 * (2 + len(DECODE_SIZES))
    assert made.kv_cache_spec() == single.kv_cache_spec()
    assert_same(made, single, [step(2, 10), step(2, 1, past=10), step(3)])
    made.close()
    assert names(made.calls())["ncclCommDestroy"] == 2


def test_what_nccl_refuses_ends_all_ranks(make_tensorrt_executor: Make) -> None:
    with pytest.raises(DeviceError, match=r"rank \d failed: NCCL failed in ncclCommInitRank: invalid usage"):
        make_tensorrt_executor("tensorrt", limits=LIMITS, tp_size=2, FAKE_NCCL_FAIL="ncclCommInitRank")


def test_without_nccl_ranks_that_share_layers_are_refused(
    make_tensorrt_executor: Make, cuda_driver_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(cuda_driver_folder / "libcuda.so.1", tmp_path)
    with pytest.raises(ConfigError, match="needs NCCL: pip install nvidia-nccl-cu13"):
        make_tensorrt_executor("tensorrt", limits=LIMITS, tp_size=2, LD_LIBRARY_PATH=str(tmp_path))


# --------------------------------------------------------------------------- pipeline stages


def test_stages_compute_what_one_rank_does(two_stages: Any, single: Any) -> None:
    assert two_stages.kv_cache_spec() == single.kv_cache_spec()
    assert_same(two_stages, single, mixed_steps())


def test_stages_of_two_ranks_meet_in_an_nccl_group_each(make_tensorrt_executor: Make, single: Any) -> None:
    made = make_tensorrt_executor("tensorrt", limits=LIMITS, tp_size=2, pp_size=2, dtype="float16")
    joined = Counter(tuple(call.split()[1:]) for call in made.calls() if call.startswith("ncclCommInitRank"))
    assert len(joined) == sum(joined.values()) == 4
    assert len({unique_id for _, _, unique_id in joined}) == 2
    assert {(size, rank) for size, rank, _ in joined} == {("2", "0"), ("2", "1")}
    assert_same(made, single, mixed_steps())
    made.close()
    assert names(made.calls())["ncclCommDestroy"] == 4


def test_stages_of_tensorrt_rtx_read_arrays_on_the_host(make_tensorrt_executor: Make, single: Any) -> None:
    made = make_tensorrt_executor(
        "tensorrt-rtx", limits=LIMITS, pp_size=2, FAKE_TENSORRT_HOST_INPUT="context_lens"
    )
    assert_same(made, single, mixed_steps())
    assert names(made.calls()).keys().isdisjoint({"cuStreamBeginCapture", "cuGraphLaunch"})


def test_a_step_copies_what_its_stage_reads_and_hands_on(two_stages: Any) -> None:
    two_stages.calls()
    two_stages.execute(step(2, 10))
    calls = two_stages.calls()
    # The first stage reads no logits_indices, the second one no input_ids.
    assert names(calls) == Counter(
        cuCtxSetCurrent=2,
        cuMemcpyHtoDAsync=2 * (len(INPUT_NAMES) - 1) + 1,
        cuMemcpyDtoHAsync=2,
        cuStreamSynchronize=2,
    )
    for copy in ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"):
        assert calls.count(f"{copy} {20 * ROW_BYTES}") == 1
    assert calls.count(f"cuMemcpyDtoHAsync {20 * VOCAB_SIZE * 4}") == 1


def test_a_decode_step_is_one_graph_in_each_stage(two_stages: Any) -> None:
    # All sizes were run once for a try and once to be captured, with the copies of both stages.
    loading = names(two_stages.loading)
    assert loading["cuMemcpyHtoDAsync"] == 2 * len(DECODE_SIZES) * (2 * (len(INPUT_NAMES) - 1) + 1)
    assert loading["cuMemcpyDtoHAsync"] == 2 * len(DECODE_SIZES) * 2
    two_stages.calls()
    logits = two_stages.execute(step(3)).logits
    assert names(two_stages.calls()) == Counter(cuCtxSetCurrent=2, cuGraphLaunch=2, cuStreamSynchronize=2)
    assert logits.shape == (3, VOCAB_SIZE)


def test_memory_is_for_the_largest_step_and_for_logits_in_the_last_stage_alone(two_stages: Any) -> None:
    num_tokens = LIMITS.max_num_batched_tokens
    for num_bytes, count in ((num_tokens * ROW_BYTES, 2), (num_tokens * VOCAB_SIZE * 4, 1)):
        assert two_stages.loading.count(f"cuMemAlloc {num_bytes}") == count
    pinned = [call.split()[1] for call in two_stages.loading if call.startswith("cuMemHostAlloc")]
    assert pinned.count(str(num_tokens * ROW_BYTES)) == 2
    assert pinned.count(str(LIMITS.max_num_seqs * VOCAB_SIZE * 4)) == 1


def test_large_steps_go_through_the_stages_in_parts(two_stages: Any, single: Any) -> None:
    sequences = PackedSequences(32, range(24))
    inputs = sequences.step({"a": [*range(70)], "b": [*range(90)], "c": [*range(30)]})
    for wanted in ([*range(190)], [0, 69, 189], [160, 189]):  # of all, of some, of the second part
        two_stages.calls()
        assert_same(two_stages, single, [replace(inputs, logits_indices=np.array(wanted, np.int32))])
        calls = two_stages.calls()
        for num_tokens in (160, 30):
            for copy in ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"):
                assert calls.count(f"{copy} {num_tokens * ROW_BYTES}") == 1
        assert names(calls)["cuStreamSynchronize"] == 4


# --------------------------------------------------------------------------- failures of a stage


@pytest.mark.parametrize(("rank", "tensor"), [(0, "input_ids"), (1, "hidden_states")])
def test_a_stage_that_fails_ends_all_with_its_reason(
    make_tensorrt_executor: Make, rank: int, tensor: str
) -> None:
    made = make_tensorrt_executor(
        "tensorrt-rtx", limits=LIMITS, pp_size=2, FAKE_TENSORRT_FAIL=f"enqueue {tensor}"
    )
    reason = f"rank {rank} failed: TensorRT failed in enqueueing a step:\n  a plugin failed"
    for _ in range(2):
        with pytest.raises(DeviceError, match=reason):
            made.execute(step(2, 5))


def test_a_stage_that_does_not_load_is_named(make_tensorrt_executor: Make) -> None:
    with pytest.raises(DeviceError, match=r"rank 1 failed: TensorRT failed in enqueueing a step"):
        make_tensorrt_executor(
            "tensorrt", limits=LIMITS, pp_size=2, FAKE_TENSORRT_FAIL="enqueue hidden_states"
        )
