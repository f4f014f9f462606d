"""The launcher against a driver that records, byte for byte, what it is asked to do."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trtforge.errors import PluginError
from trtforge.plugins.bundle import HIDDEN_PARAMETERS, MANIFEST_FILE, BundleManifest, CubinEntry
from trtforge.plugins.launch import Kernel, Launch, Plan, workspace_layout
from trtforge.plugins.launcher import Launcher

FOLDER = Path(__file__).parent / "fake_cuda"
SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER_ATTRIBUTE = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
NULL = "00" * 8


SCALE = Kernel(
    operator="fake_cuda.rows",
    function="scale_rows",
    parameters=(
        ("x", "*bf16"),
        ("num_rows", "i32"),
        ("factor", "fp32"),
        ("partial", "*fp32"),
        ("y", "*bf16"),
    ),
    constants=(("BLOCK", 64),),
    num_warps=4,
    num_stages=2,
)
SUM = Kernel(
    operator="fake_cuda.rows",
    function="sum_rows",
    parameters=(("partial", "*fp32"), ("stride", "i64"), ("mask", "*i8"), ("y", "*bf16"), ("count", "u32")),
    constants=(),
    num_warps=8,
    num_stages=1,
)
# Sizes of their parameters, hidden ones included: all that the driver of these tests knows of a cubin.
CUBINS = {SCALE: "8 4 4 8 8 8 8", SUM: "8 8 8 8 4 8 8"}
SCALE_ARGUMENTS = {"x": "x", "num_rows": -7, "factor": 0.1, "partial": "partial", "y": "y"}
SUM_ARGUMENTS = {"partial": "partial", "stride": 2**40, "mask": None, "y": "y", "count": 2**32 - 1}
POINTERS = {"x": 0x7F00_0000_1230, "y": 0x7F00_0000_4560}
WORKSPACE = 0x7F11_0000_0000
STREAM = 0xABC0


def scale(grid: tuple[int, int, int] = (3, 2, 1), **arguments: Any) -> Launch:
    return Launch(SCALE, grid, SCALE_ARGUMENTS | arguments)


def launch(*launches: Launch, pointers: dict[str, int] = POINTERS) -> tuple[str, tuple[Any, ...]]:
    plan = Plan(launches, {"counters": 4, "partial": 1000})
    return "launch", (plan, pointers, WORKSPACE, STREAM)


def write_bundle(folder: Path, cubins: dict[Kernel, str], **changes: Any) -> None:
    """A bundle for sm_90. `changes` are fields of every entry of its manifest."""
    entries = []
    for kernel, sizes in cubins.items():
        cubin = f"{kernel.function}_symbol {sizes}\0".encode()
        values = {
            "name": kernel.name,
            "arch": 90,
            "operator": kernel.operator,
            "function": kernel.function,
            "symbol": f"{kernel.function}_symbol",
            "parameters": kernel.parameters,
            "hidden_parameters": HIDDEN_PARAMETERS,
            "constants": dict(kernel.constants),
            "num_warps": kernel.num_warps,
            "num_stages": kernel.num_stages,
            "num_ctas": 1,
            "threads": 32 * kernel.num_warps,
            "shared_bytes": 1024,
            "source_sha256": hashlib.sha256((FOLDER / "rows" / "kernel.py").read_bytes()).hexdigest(),
            "sha256": hashlib.sha256(cubin).hexdigest(),
            "num_bytes": len(cubin),
        }
        entries.append(CubinEntry(**values | changes))
        path = folder / entries[-1].file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cubin)
    manifest = BundleManifest(compiler="none", compiler_version="0", cubins=tuple(entries))
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())


@dataclass(frozen=True)
class Outcome:
    errors: list[str | None]  # of each step
    calls: list[str]  # of the driver, with their values

    def launches(self) -> list[list[str]]:
        """Of each launch the kernel, grid, block, shared bytes and stream, then attributes and parameters."""
        return [call.split()[1:] for call in self.calls if call.startswith("cuLaunchKernelEx")]


@pytest.fixture
def run(cuda_driver_folder: Path, tmp_path: Path):
    """`run(*steps, cubins=..., capability=90, threads=1, fail="", **changes)`: steps of a launcher.

    They run in a process with the recording driver. `changes` are those of `write_bundle`.
    """

    def run(
        *steps: Any,
        cubins: dict[Kernel, str] = CUBINS,
        capability: int = 90,
        threads: int = 1,
        fail: str = "",
        **changes: Any,
    ) -> Outcome:
        record, bundle = tmp_path / "calls", tmp_path / "bundle"
        write_bundle(bundle, cubins, **changes)
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(cuda_driver_folder),
            "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), *sys.path]),
            "FAKE_CUDA_RECORD": str(record),
            "FAKE_CUDA_ARCH": str(capability),
            "FAKE_CUDA_FAIL": fail,
        }
        process = subprocess.run(
            [sys.executable, str(FOLDER / "run.py")],
            input=pickle.dumps({"bundle": bundle, "steps": steps, "threads": threads}),
            env=environment,
            capture_output=True,
        )
        assert process.returncode == 0, process.stderr.decode()
        return Outcome(pickle.loads(process.stdout), record.read_text().splitlines())

    return run


def test_every_parameter_arrives_byte_for_byte(run) -> None:
    outcome = run(launch(scale(), Launch(SUM, (5, 1, 4), SUM_ARGUMENTS), scale((1, 1, 1), num_rows=9)))
    assert outcome.errors == [None]

    def scale_parameters(num_rows: int) -> list[str]:
        # "counters" is in front of "partial" and takes up a whole alignment.
        values = struct.pack("<Q", POINTERS["x"]), struct.pack("<i", num_rows), struct.pack("<f", 0.1)
        pointers = struct.pack("<Q", WORKSPACE + 256), struct.pack("<Q", POINTERS["y"])
        return [value.hex() for value in (*values, *pointers)] + [NULL, NULL]

    partial, stride = struct.pack("<Q", WORKSPACE + 256).hex(), struct.pack("<q", 2**40).hex()
    sum_parameters = [partial, stride, NULL, struct.pack("<Q", POINTERS["y"]).hex(), "ffffffff", NULL, NULL]
    assert outcome.launches() == [
        ["scale_rows_symbol", "3,2,1", "128,1,1", "1024", hex(STREAM), *scale_parameters(-7)],
        ["sum_rows_symbol", "5,1,4", "256,1,1", "1024", hex(STREAM), *sum_parameters],
        ["scale_rows_symbol", "1,1,1", "128,1,1", "1024", hex(STREAM), *scale_parameters(9)],
    ]


def test_a_launch_of_loaded_kernels_does_nothing_else(run) -> None:
    _, (plan, *_) = step = launch(scale(), scale((9, 1, 1)))
    outcome = run(("load", (plan,)), step, step)
    assert outcome.errors == [None] * 3
    names = [call.split()[0] for call in outcome.calls]
    assert names.count("cuModuleLoadData") == 1
    loading = ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncLoad", "cuCtxPopCurrent"]
    assert names[names.index("cuModuleLoadData") :] == loading + ["cuLaunchKernelEx"] * 4


@pytest.mark.parametrize(("shared", "allowed"), [(48 * 1024, False), (48 * 1024 + 1, True)])
def test_shared_memory_above_48_kib_has_to_be_allowed(run, shared: int, allowed: bool) -> None:
    outcome = run(launch(scale()), shared_bytes=shared)
    call = f"cuFuncSetAttribute scale_rows_symbol {SHARED_BYTES_ATTRIBUTE} {shared}"
    assert (call in outcome.calls) == allowed
    assert outcome.launches()[0][3] == str(shared)


def test_a_cluster_multiplies_the_grid(run) -> None:
    outcome = run(launch(scale()), num_ctas=2)
    _, grid, _, _, _, attribute, *parameters = outcome.launches()[0]
    assert grid == "6,2,1"
    assert attribute == f"attribute={CLUSTER_ATTRIBUTE}:2,1,1"
    assert len(parameters) == len(SCALE.parameters) + 2


def test_an_empty_grid_is_not_launched(run) -> None:
    outcome = run(launch(scale((4, 0, 1)), scale((1, 1, 1))))
    assert outcome.errors == [None]
    assert [launched[1] for launched in outcome.launches()] == ["1,1,1"]


def test_what_kernels_do_not_take_is_refused(run) -> None:
    outcome = run(
        launch(scale(), pointers=POINTERS | {"y": 0x7F00_0000_4568}),
        launch(scale(), pointers={"y": POINTERS["y"]}),
        launch(scale(num_rows=2**31)),
        launch(scale(num_rows=1.5)),
        launch(scale(factor=1e39)),
    )
    misaligned, missing, *values = outcome.errors
    assert "scale_rows" in misaligned
    assert "y begins at address 0x7f0000004568" in misaligned
    assert "multiple of 16" in misaligned
    assert "x points to x, of which no address was given" in missing
    for error in values:
        assert "'num_rows': 'i32'" in error
    assert "2147483648" in values[0]
    assert outcome.launches() == []


def test_a_parameter_type_that_cannot_be_passed_is_refused(run) -> None:
    kernel = Kernel("fake_cuda.rows", "odd", (("x", "fp16"),), (), 4, 1)
    outcome = run(launch(Launch(kernel, (1, 1, 1), {"x": 1.0})), cubins={kernel: "2 8 8"})
    assert "parameter of type fp16" in outcome.errors[0]


def test_a_device_without_cubins_is_told_which_there_are(run) -> None:
    outcome = run(launch(scale()), capability=86)
    for text in (SCALE.name, "for sm_90, and not for sm_80", "trtforge compile-kernels"):
        assert text in outcome.errors[0]
    outcome = run(launch(scale()), capability=75)
    assert "no kernels are compiled for compute capability 7.5" in outcome.errors[0]


@pytest.mark.parametrize(
    ("function", "doing"),
    [
        ("cuLaunchKernelEx", "launching {name} over a grid of (3, 2, 1)"),
        ("cuModuleLoadData", "loading {name}"),
        ("cuFuncSetAttribute", "allowing {name} 100000 bytes of shared memory"),
    ],
)
def test_errors_of_the_driver_say_what_failed_and_why(run, function: str, doing: str) -> None:
    outcome = run(launch(scale()), shared_bytes=100_000, fail=f"{function} 700")
    reason = "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"
    assert outcome.errors == [f"{doing.format(name=SCALE.name)} failed with {reason}"]
    # The context that was current before loading is current again.
    pushed, popped = (
        sum(call.startswith(f"cuCtx{what}") for call in outcome.calls) for what in ("Push", "Pop")
    )
    assert pushed == popped == 1


def test_concurrent_launches_do_not_mix_their_arguments(run) -> None:
    steps = [
        launch(scale((number, 1, 1), num_rows=number), pointers={"x": 16 * number, "y": 16 * number})
        for number in range(1, 401)
    ]
    outcome = run(*steps, threads=8)
    assert outcome.errors == [None] * len(steps)
    seen = []
    for _, grid, _, _, _, x, num_rows, _, _, y, *_ in outcome.launches():
        number = int(grid.split(",")[0])
        assert x == y == struct.pack("<Q", 16 * number).hex()
        assert num_rows == struct.pack("<i", number).hex()
        seen.append(number)
    assert sorted(seen) == list(range(1, 401))


def test_workspaces_do_not_overlap_and_are_aligned() -> None:
    offsets, size = workspace_layout(Plan((), {"a": 1, "b": 0, "c": 256, "d": 257, "e": 5000}))
    ends = {
        name: offsets[name] + num_bytes
        for name, num_bytes in zip("abcde", (1, 0, 256, 257, 5000), strict=True)
    }
    assert all(offset % 256 == 0 for offset in offsets.values())
    for first, second in zip("abcd", "bcde", strict=True):
        assert ends[first] <= offsets[second]
    assert ends["e"] <= size < ends["e"] + 256
    assert workspace_layout(Plan((), {})) == ({}, 0)


def test_without_a_driver_the_error_says_so() -> None:
    from cuda.bindings import driver

    try:
        driver.cuInit(0)
    except RuntimeError:
        pass
    else:
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(PluginError, match=r"need an NVIDIA driver: libcuda\.so\.1"):
        Launcher(None)
