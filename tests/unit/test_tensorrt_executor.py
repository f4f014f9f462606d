"""What TensorRTExecutor asks of the CUDA driver and of TensorRT, both of them fake ones, and how it says no.

That it computes the right thing is in test_executor_conformance.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_tensorrt.steps import INPUT_NAMES, names, step

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, ConfigError, DeviceError, ServerError
from trtforge.manifest import DimRange, LayerCache, Limits, Manifest, Profile
from trtforge.plugins.kernels import KERNELS
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.executors import create as executors
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.executors.decode_batches import DecodeBatches
from trtforge.runtime.executors.step_buffers import profile_for
from trtforge.runtime.scheduling.block_moves import BlockMoves

Make = Callable[..., Any]  # see the fixture make_tensorrt_executor

LIMITS = Limits(max_model_len=200, max_num_seqs=3, max_num_batched_tokens=64)
DECODE_SIZES = (1, 2, 3)
BLOCK_BYTES = 32 * 2 * 4  # of one layer
LAYERS = (LayerCache(num_kv_heads=1, head_dim=1),)


@pytest.fixture(scope="module")
def executor(make_tensorrt_executor: Make) -> Any:
    """Of an engine with two profiles."""
    return make_tensorrt_executor("tensorrt", limits=LIMITS)


def new_entries(executor: Any) -> list[tuple[Any, ...]]:
    """What was asked of TensorRT since this was asked last."""
    log = executor.ask("log")
    seen = getattr(executor, "num_seen", 0)
    executor.num_seen = len(log)
    return log[seen:]


# --------------------------------------------------------------------------- the stand-in


def test_the_stand_in_has_no_method_that_tensorrt_has_not(tensorrt_rtx: ModuleType) -> None:
    path = Path(__file__).parent / "fake_tensorrt" / "packages" / "tensorrt_rtx.py"
    spec = spec_from_file_location("fake_tensorrt_rtx", path)
    fake = module_from_spec(spec)
    spec.loader.exec_module(fake)
    for ours, theirs in (
        (fake.Runtime, tensorrt_rtx.Runtime),
        (fake.Engine, tensorrt_rtx.ICudaEngine),
        (fake.Context, tensorrt_rtx.IExecutionContext),
        (fake.ILogger, tensorrt_rtx.ILogger),
    ):
        public = {name for name in vars(ours) if not name.startswith("_")}
        assert public <= set(dir(theirs))
    for enum in ("ExecutionContextAllocationStrategy", "TensorLocation"):
        assert set(getattr(fake, enum).__members__) <= set(getattr(tensorrt_rtx, enum).__members__)
    assert hasattr(tensorrt_rtx.ICudaEngine, "num_optimization_profiles")


# --------------------------------------------------------------------------- loading


def test_plugins_are_registered_before_the_engine_is_loaded(executor: Any) -> None:
    log = executor.ask("log")
    registered = [entry[1:] for entry in log if entry[0] == "register"]
    assert sorted(registered) == sorted((spec.name, "trtforge") for spec in KERNELS)
    assert log[len(registered)][0] == "deserialize"


def test_no_module_of_torch_or_the_builder_is_imported(executor: Any) -> None:
    assert executor.modules == set()


def test_tensorrt_rtx_gets_no_plugins_and_captures_nothing(make_tensorrt_executor: Make) -> None:
    made = make_tensorrt_executor("tensorrt-rtx", limits=LIMITS)
    assert made.ask("log")[0][0] == "deserialize"
    calls = names(made.calls())
    made.execute(step(2))
    calls += names(made.calls())
    assert calls.keys().isdisjoint({"cuStreamBeginCapture", "cuGraphLaunch"})


def test_inputs_that_tensorrt_reads_on_the_host_stay_there(make_tensorrt_executor: Make) -> None:
    made = make_tensorrt_executor("tensorrt-rtx", limits=LIMITS, FAKE_TENSORRT_HOST_INPUT="context_lens")
    made.calls()
    made.execute(step(2, 5))
    assert names(made.calls())["cuMemcpyHtoDAsync"] == len(INPUT_NAMES) - 1
    with pytest.raises(ConfigError, match=r"reads \['context_lens'\] on the host"):
        make_tensorrt_executor("tensorrt", limits=LIMITS, FAKE_TENSORRT_HOST_INPUT="context_lens")


def test_every_context_gets_every_address_once_and_caches_are_in_place(executor: Any) -> None:
    bound: dict[int, dict[str, list[int]]] = {}
    for _, context, name, address in (entry for entry in executor.ask("log") if entry[0] == "bind"):
        bound.setdefault(context, {}).setdefault(name, []).append(address)
    assert len(bound) == 2 + len(DECODE_SIZES)  # profiles and graphs
    first, *others = bound.values()
    assert all(other == first for other in others)
    caches = {f"kv_cache.{layer}" for layer in range(2)} | {f"kv_cache_out.{layer}" for layer in range(2)}
    assert first.keys() == INPUT_NAMES | {"logits"} | caches
    assert all(len(addresses) == 1 for addresses in first.values())
    for layer in range(2):
        assert first[f"kv_cache.{layer}"] == first[f"kv_cache_out.{layer}"]
    assert len({addresses[0] for addresses in first.values()}) == len(INPUT_NAMES) + 3
    assert all(address % 256 == 0 for addresses in first.values() for address in addresses)


def test_the_cache_has_as_many_blocks_as_fit_beside_the_loaded_engine(make_tensorrt_executor: Make) -> None:
    total = 2**20
    made = make_tensorrt_executor(
        limits=LIMITS, options=EngineOptions(kv_cache_fraction=0.5), FAKE_CUDA_BYTES=str(total)
    )
    calls = made.calls()
    before = calls[: [call.split()[0] for call in calls].index("cuMemGetInfo")]
    used = sum(int(call.split()[1]) for call in before if call.startswith("cuMemAlloc"))
    assert used > 64 * 128 * 4  # logits at least
    assert made.kv_cache_spec().num_blocks == (total - used) // 2 // (2 * BLOCK_BYTES)


def test_a_cache_that_does_not_fit_is_a_capacity_error(make_tensorrt_executor: Make) -> None:
    with pytest.raises(
        CapacityError, match=r"the KV cache of layer 1: allocating .* CUDA_ERROR_OUT_OF_MEMORY"
    ):
        make_tensorrt_executor(
            limits=LIMITS, options=EngineOptions(kv_cache_bytes=900_000), FAKE_CUDA_BYTES="700000"
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"FAKE_CUDA_ARCH": "90"}, r"compute capability 8.9, and this one has 9.0: .* --gpu sm_90"),
        ({"content": "no engine"}, r"tensorrt_rtx 1.2.3 does not load .*\n  the magic tag does not match"),
        ({"LD_LIBRARY_PATH": "/nowhere"}, r"needs an NVIDIA GPU: .*libcuda\.so\.1 was not found"),
        ({"FAKE_CUDA_FAIL": "cuDeviceGet 101"}, r"needs an NVIDIA GPU: finding CUDA device 0 failed"),
        (
            {"runtime": "tensorrt", "has_kernels": False},
            r"plugins cannot be had: .*kernels/manifest.json does not exist",
        ),
    ],
)
def test_what_is_missing_is_said(make_tensorrt_executor: Make, arguments: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_tensorrt_executor(**arguments)


def test_without_the_package_the_command_that_installs_it_is_said(
    make_manifest: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(LAYERS).model_copy(update={"runtime": "tensorrt"})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match=r"needs the package tensorrt,.*pip install 'trtforge\[tensorrt\]'"):
        create_executor(manifest, tmp_path, EngineOptions())


def test_without_cuda_bindings_the_command_that_installs_them_is_said(
    make_manifest: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(LAYERS).model_copy(update={"runtime": "tensorrt-rtx"})
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package cuda-bindings: pip install 'trtforge\[gpu\]'"):
        create_executor(manifest, tmp_path, EngineOptions())


# --------------------------------------------------------------------------- steps


@pytest.mark.parametrize(("num_seqs", "past"), [(1, 0), (2, 40), (3, 199)])
def test_a_decode_step_is_one_graph(executor: Any, num_seqs: int, past: int) -> None:
    if past:
        fill(executor, num_seqs, past)
    executor.calls()
    new_entries(executor)
    logits = executor.execute(step(num_seqs, past=past)).logits
    assert names(executor.calls()) == Counter(cuCtxSetCurrent=1, cuGraphLaunch=1, cuStreamSynchronize=1)
    assert new_entries(executor) == []  # TensorRT is not even asked
    assert logits.shape == (num_seqs, 128)
    assert np.isfinite(logits).all()


def fill(executor: Any, num_seqs: int, length: int) -> None:
    """Store the first tokens of sequences whose tables are those of `step(num_seqs, past=length)`."""
    tables = step(num_seqs, past=length).block_tables
    for start in range(0, length, 20):
        new = step(num_seqs, min(20, length - start), start)
        slots = tables[np.repeat(np.arange(num_seqs), len(new.position_ids) // num_seqs)]
        slots = slots[np.arange(len(slots)), new.position_ids // 32] * 32 + new.position_ids % 32
        arrays = {name: getattr(new, name) for name in INPUT_NAMES}
        changes = {"block_tables": tables, "slot_mapping": slots.astype(np.int32)}
        executor.execute(ModelInputs(**arrays | changes))


def test_other_steps_are_enqueued_with_their_shapes_in_the_first_profile_that_has_room(executor: Any) -> None:
    for num_tokens, expected in ((3, 0), (4, 1), (64, 1)):
        executor.calls()
        new_entries(executor)
        inputs = step(1, num_tokens)
        logits = executor.execute(inputs).logits
        assert logits.shape == (num_tokens, 128)
        assert np.isfinite(logits).all()
        log = new_entries(executor)
        shapes = {entry[2]: entry[3] for entry in log if entry[0] == "shape"}
        assert shapes == {name: getattr(inputs, name).shape for name in INPUT_NAMES}
        assert [entry[2] for entry in log if entry[0] == "enqueue"] == [expected]
        calls = executor.calls()
        assert names(calls) == Counter(
            cuCtxSetCurrent=1, cuMemcpyHtoDAsync=7, cuMemcpyDtoHAsync=1, cuStreamSynchronize=1
        )
        sent = sum(int(call.split()[1]) for call in calls if call.startswith("cuMemcpyHtoD"))
        assert sent == sum(getattr(inputs, name).nbytes for name in INPUT_NAMES)
        assert f"cuMemcpyDtoHAsync {num_tokens * 128 * 4}" in calls


def test_a_step_that_no_profile_has_room_for_is_refused_before_anything_is_done(executor: Any) -> None:
    executor.calls()
    with pytest.raises(ValueError, match=r"at most .*'T': 64.*, and this one has .*'T': 66"):
        executor.execute(step(2, 33))
    assert names(executor.calls()).keys() <= {"cuCtxSetCurrent"}


def test_moves_are_copies_of_whole_blocks_in_order(make_tensorrt_executor: Make) -> None:
    made = make_tensorrt_executor(limits=LIMITS, options=EngineOptions(swap_bytes=4 * BLOCK_BYTES))
    made.calls()
    made.move_blocks(BlockMoves(swap_out=[(4, 1)], swap_in=[(0, 3)], copies=[(5, 6), (7, 8)]))
    copies = ["cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "cuMemcpyDtoDAsync", "cuMemcpyDtoDAsync"]
    assert made.calls() == ["cuCtxSetCurrent 1"] + [f"{copy} {BLOCK_BYTES}" for copy in copies] * 2


# --------------------------------------------------------------------------- failures and the end


def test_a_failing_gpu_is_a_device_error_with_the_driver_s_reason(make_tensorrt_executor: Make) -> None:
    made = make_tensorrt_executor("tensorrt", limits=LIMITS)
    made.ask("fail", "cuStreamSynchronize 700")
    for inputs in (step(1), step(1, 5)):
        with pytest.raises(
            DeviceError, match=r"the GPU's work failed with CUDA_ERROR_ILLEGAL_ADDRESS: an ill"
        ):
            made.execute(inputs)
    made.ask("fail", "cuMemcpyDtoDAsync 1")
    with pytest.raises(DeviceError, match=r"copying .* CUDA_ERROR_INVALID_VALUE"):
        made.move_blocks(BlockMoves(copies=[(0, 1)]))


def test_what_tensorrt_refuses_is_a_device_error_with_its_reasons(make_tensorrt_executor: Make) -> None:
    said = "TensorRT failed in enqueueing a step:\n  a plugin failed"
    with pytest.raises(DeviceError, match=said):
        make_tensorrt_executor("tensorrt", limits=LIMITS, FAKE_TENSORRT_FAIL="enqueue")
    made = make_tensorrt_executor("tensorrt-rtx", limits=LIMITS, FAKE_TENSORRT_FAIL="enqueue")
    with pytest.raises(DeviceError, match=said):
        made.execute(step(1))


def test_closing_gives_everything_back_once(make_tensorrt_executor: Make) -> None:
    options = EngineOptions(swap_bytes=4 * BLOCK_BYTES)
    made = make_tensorrt_executor("tensorrt", limits=LIMITS, options=options)
    opened = names(made.calls())
    made.close()
    closed = names(made.calls())
    for one, other in (
        ("cuMemAlloc", "cuMemFree"),
        ("cuMemHostAlloc", "cuMemFreeHost"),
        ("cuGraphInstantiateWithFlags", "cuGraphExecDestroy"),
        ("cuStreamCreate", "cuStreamDestroy"),
    ):
        assert opened[one] == closed[other] > 0
    made.close()
    assert made.calls() == []
    with pytest.raises(ServerError, match="closed"):
        made.execute(step(1))


# --------------------------------------------------------------------------- profiles and batches


def test_the_first_profile_with_room_for_every_dim_is_taken() -> None:
    def profile(name: str, largest: int, smallest: int = 1) -> Profile:
        dims = ("T", "B", "B_plus_1", "R", "max_blocks", "num_blocks")
        return Profile(
            name=name, dims={dim: DimRange(min=smallest, opt=largest, max=largest) for dim in dims}
        )

    profiles = [profile("a", 4), profile("b", 16, smallest=5), profile("c", 64)]

    def chosen(inputs: ModelInputs) -> int:
        return profile_for(profiles, {name: getattr(inputs, name).shape for name in INPUT_NAMES})

    steps = (step(3), step(4), step(9), step(6, past=159), step(2, 20))
    assert [chosen(inputs) for inputs in steps] == [0, 2, 2, 1, 2]
    with pytest.raises(ValueError, match="'B': 65"):
        chosen(step(65))


def test_batches_hold_the_wanted_rows_too() -> None:
    batches = DecodeBatches.of(Limits(max_model_len=100, max_num_seqs=9, max_num_batched_tokens=64), 32)
    assert batches.sizes == (1, 2, 4, 8, 9)
    assert [batches.size_for(step(n)) for n in (1, 3, 8, 9, 10)] == [1, 4, 8, 9, None]
    assert batches.size_for(step(2, 2)) is None
    assert batches.size_for(step(1, past=127)) == 1
    assert batches.size_for(step(1, past=128)) is None  # longer than a sequence may get
    for size in batches.sizes:
        assert batches.size_for(batches.padding(size)) == size
