"""The launcher against a driver that records, byte for byte, what it is asked to do."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trtforge.errors import PluginError
from trtforge.plugins.launch import Kernel, Launch, Plan, workspace_layout
from trtforge.plugins.launcher import Launcher

FOLDER = Path(__file__).parent / "fake_cuda"
SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER_ATTRIBUTE = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
NULL = "00" * 8


@dataclass(frozen=True)
class Cubin:
    threads: int = 128
    shared: int = 1024
    num_ctas: int = 1


SCALE = Kernel(
    operator="demo",
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
    operator="demo",
    function="sum_rows",
    parameters=(("partial", "*fp32"), ("stride", "i64"), ("mask", "*i8"), ("y", "*bf16"), ("count", "u32")),
    constants=(),
    num_warps=8,
    num_stages=1,
)
CUBINS = {
    SCALE: (Cubin(), b"scale_rows 8 4 4 8 8 8 8\0"),
    SUM: (Cubin(threads=256), b"sum_rows 8 8 8 8 4 8 8\0"),
}
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


@pytest.fixture(scope="module")
def driver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.fail("these tests compile a fake CUDA driver: install a C compiler (cc, gcc or clang)")
    folder = tmp_path_factory.mktemp("driver")
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(FOLDER / "libcuda.c")]
    subprocess.run(command, check=True)
    return folder


@dataclass(frozen=True)
class Outcome:
    errors: list[str | None]  # of each step
    calls: list[str]  # of the driver, with their values

    def launches(self) -> list[list[str]]:
        """Of each launch the kernel, grid, block, shared bytes and stream, then attributes and parameters."""
        return [call.split()[1:] for call in self.calls if call.startswith("cuLaunchKernelEx")]


@pytest.fixture
def run(driver_folder: Path, tmp_path: Path):
    """`run(*steps, cubins=..., threads=1, fail="")`: what a launcher does in a process with the driver."""

    def run(*steps: Any, cubins: Any = CUBINS, threads: int = 1, fail: str = "") -> Outcome:
        record = tmp_path / "calls"
        record.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(driver_folder),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "FAKE_CUDA_RECORD": str(record),
            "FAKE_CUDA_ARCH": "90",
            "FAKE_CUDA_FAIL": fail,
        }
        process = subprocess.run(
            [sys.executable, str(FOLDER / "run.py")],
            input=pickle.dumps({"cubins": cubins, "steps": steps, "threads": threads}),
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

    partial = struct.pack("<Q", WORKSPACE + 256).hex()
    y = struct.pack("<Q", POINTERS["y"]).hex()
    stride = struct.pack("<q", 2**40).hex()
    assert outcome.launches() == [
        ["scale_rows", "3,2,1", "128,1,1", "1024", hex(STREAM), *scale_parameters(-7)],
        [
            "sum_rows",
            "5,1,4",
            "256,1,1",
            "1024",
            hex(STREAM),
            partial,
            stride,
            NULL,
            y,
            "ffffffff",
            NULL,
            NULL,
        ],
        ["scale_rows", "1,1,1", "128,1,1", "1024", hex(STREAM), *scale_parameters(9)],
    ]


def test_a_launch_of_loaded_kernels_does_nothing_else(run) -> None:
    _, (plan, *_) = step = launch(scale(), scale((9, 1, 1)))
    outcome = run(("load", (plan,)), step, step)
    assert outcome.errors == [None] * 3
    names = [call.split()[0] for call in outcome.calls]
    assert names.count("cuModuleLoadData") == 1
    loaded = names.index("cuModuleLoadData")
    assert (
        names[loaded:]
        == ["cuModuleLoadData", "cuModuleGetFunction", "cuCtxPopCurrent"] + ["cuLaunchKernelEx"] * 4
    )


@pytest.mark.parametrize(("shared", "allowed"), [(48 * 1024, False), (48 * 1024 + 1, True)])
def test_shared_memory_above_48_kib_has_to_be_allowed(run, shared: int, allowed: bool) -> None:
    outcome = run(launch(scale()), cubins={SCALE: (Cubin(shared=shared), CUBINS[SCALE][1])})
    call = f"cuFuncSetAttribute scale_rows {SHARED_BYTES_ATTRIBUTE} {shared}"
    assert (call in outcome.calls) == allowed
    assert outcome.launches()[0][3] == str(shared)


def test_a_cluster_multiplies_the_grid(run) -> None:
    outcome = run(launch(scale()), cubins={SCALE: (Cubin(num_ctas=2), CUBINS[SCALE][1])})
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
    kernel = Kernel("demo", "odd", (("x", "fp16"),), (), 4, 1)
    cubins = {kernel: (Cubin(), b"odd 2 8 8\0")}
    outcome = run(launch(Launch(kernel, (1, 1, 1), {"x": 1.0})), cubins=cubins)
    assert "parameter of type fp16" in outcome.errors[0]


@pytest.mark.parametrize(
    ("function", "doing"),
    [
        ("cuLaunchKernelEx", "launching {name} over a grid of (3, 2, 1)"),
        ("cuModuleLoadData", "loading {name}"),
        ("cuFuncSetAttribute", "allowing {name} 100000 bytes of shared memory"),
    ],
)
def test_errors_of_the_driver_say_what_failed_and_why(run, function: str, doing: str) -> None:
    cubins = {SCALE: (Cubin(shared=100_000), CUBINS[SCALE][1])}
    outcome = run(launch(scale()), cubins=cubins, fail=f"{function} 700")
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
