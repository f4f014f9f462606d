"""Kernels compiled ahead of time: what is written is loaded, and what cannot be launched is refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import pytest
from kernel_harness.sass import disassemble
from kernel_harness.scaled_add.launch import LARGE, SMALL, choices, plan

from trtforge.errors import ConfigError, PluginError
from trtforge.plugins.aot import check_ptx_parameters, compile_kernel, write_bundle
from trtforge.plugins.bundle import ARCHS, Bundle, arch_for, source_sha256
from trtforge.plugins.launch import Call, Gpu, Kernel

CALL = Call(
    shapes={"total": (-1, 64), "x": (-1, 64)},
    dtypes={"total": "bfloat16", "x": "bfloat16"},
    attributes={"scale": 1.0},
)
SMALL_KERNEL, LARGE_KERNEL = choices(CALL, 80)
PTX = """
.visible .entry scaled_add(
	.param .u64 .ptr .global .align 1 scaled_add_param_0,
	.param .u64 .ptr .global .align 1 scaled_add_param_1,
	.param .{scale} scaled_add_param_2,
	.param .u32 scaled_add_param_3,
	.param .u64 .ptr .global .align 1 scaled_add_param_4,
	.param .u64 .ptr .global .align 1 scaled_add_param_5
)
.reqntid 128
{{ ld.param.b64 %rd1, [scaled_add_param_0]; }}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "kernels"
    write_bundle({arch: choices(CALL, arch) for arch in (80, 90)}, folder, num_processes=1)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A bundle of both kernels for sm_80 and sm_90, to be changed."""
    return Path(shutil.copytree(written, tmp_path / "kernels"))


def edit_manifest(folder: Path, **values: object) -> None:
    """Change all of its cubins' entries."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["cubins"]:
        entry.update(values)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(("compute_capability", "arch"), [(80, 80), (86, 80), (90, 90)])
def test_what_a_plan_launches_is_there(written: Path, compute_capability: int, arch: int) -> None:
    bundle = Bundle.load(written)
    for num_rows, block in ((1, SMALL), (10_000, LARGE)):
        shapes = dict.fromkeys(CALL.shapes, (num_rows, 64))
        (launch,) = plan(replace(CALL, shapes=shapes), Gpu(compute_capability, 132)).launches
        entry, cubin = bundle.cubin(launch.kernel, compute_capability)
        assert (entry.arch, entry.constants) == (arch, {"BLOCK": block})
        assert entry.parameters == launch.kernel.parameters
        assert len(entry.hidden_parameters) == 2
        assert (entry.threads, entry.num_ctas, entry.shared_bytes) == (128, 1, 0)
        assert (f".text.{entry.symbol}").encode() in cubin
        assert disassemble(cubin).opcodes["STG"] > 0


def test_the_manifest_lists_the_folder(written: Path) -> None:
    entries = Bundle.load(written).manifest.cubins
    files = {str(path.relative_to(written)) for path in written.rglob("*.cubin")}
    assert files == {entry.file for entry in entries}
    assert len(files) == 4
    assert list(entries) == sorted(entries, key=lambda entry: (entry.arch, entry.name))


def test_the_same_kernels_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    # In another order, by other processes, at another place.
    kernels = {arch: choices(CALL, arch)[::-1] for arch in (90, 80)}
    again = write_bundle(kernels, tmp_path / "again", num_processes=2).folder
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        assert (written / file).read_bytes() == (again / file).read_bytes()


def test_a_damaged_cubin_is_refused(folder: Path) -> None:
    path = next(folder.rglob("*.cubin"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(PluginError, match=f"{path.name} is not the file that was compiled"):
        Bundle.load(folder)


def test_a_missing_cubin_is_named(folder: Path) -> None:
    path = next(folder.rglob("*.cubin"))
    path.unlink()
    with pytest.raises(PluginError, match=rf"{path.name} is missing.*trtforge compile-kernels"):
        Bundle.load(folder)


def test_no_manifest_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        PluginError, match=r"manifest.json does not exist: compile .*trtforge compile-kernels"
    ):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("values", [{"future": 1}, {"name": "../../etc/passwd"}, {"arch": "sm_80"}])
def test_a_manifest_that_is_not_understood(folder: Path, values: dict[str, object]) -> None:
    edit_manifest(folder, **values)
    with pytest.raises(PluginError, match="not a manifest of kernels that this version reads"):
        Bundle.load(folder)


def test_a_kernel_or_an_arch_that_is_not_there(written: Path) -> None:
    bundle = Bundle.load(written)
    with pytest.raises(
        PluginError, match=r"for sm_80, sm_90, and not for sm_100: .*trtforge compile-kernels"
    ):
        bundle.cubin(SMALL_KERNEL, 100)
    with pytest.raises(PluginError, match="for no arch at all, and not for sm_90"):
        bundle.cubin(replace(SMALL_KERNEL, num_warps=8), 90)


def test_a_cubin_of_other_source_is_refused(folder: Path) -> None:
    edit_manifest(folder, source_sha256="0" * 64)
    with pytest.raises(PluginError, match=r"another version of kernel_harness\.scaled_add\.kernel"):
        Bundle.load(folder).cubin(SMALL_KERNEL, 80)


def test_what_kernels_share_is_part_of_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for package, parts, plans in (("one", "", ""), ("two", "", "# others"), ("three", "# others", "")):
        (tmp_path / package).mkdir()
        sources = {"__init__": "", "kernel": "# kernels", "kernel_parts": parts, "launch": plans}
        for name, text in sources.items():
            (tmp_path / package / f"{name}.py").write_text(text)
        digests.append(source_sha256(f"{package}.kernel"))
    assert digests[0] == digests[1] != digests[2]


def test_a_gpu_with_less_shared_memory(folder: Path) -> None:
    edit_manifest(folder, shared_bytes=120_000)
    bundle = Bundle.load(folder)
    bundle.cubin(SMALL_KERNEL, 80)
    with pytest.raises(PluginError, match=r"120000 bytes of shared memory.* 8\.6 has 101376"):
        bundle.cubin(SMALL_KERNEL, 86)


def test_which_machine_code_a_gpu_runs() -> None:
    assert [arch_for(arch) for arch in ARCHS] == list(ARCHS)
    assert [arch_for(capability) for capability in (86, 87)] == [80, 80]
    for capability in (75, 103, 121):  # sm_100a and sm_120a have no forward compatibility
        with pytest.raises(PluginError, match=f"compute capability {capability / 10}"):
            arch_for(capability)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (replace(SMALL_KERNEL, parameters=SMALL_KERNEL.parameters[::-1]), "has the parameters"),
        (replace(SMALL_KERNEL, constants=()), "has the constants"),
        (replace(SMALL_KERNEL, function="scaled_sub"), "no Triton function scaled_sub"),
        (replace(SMALL_KERNEL, constants=(("BLOCK", 100),)), r"sm_90 \(BLOCK=100\) does not compile"),
        (
            replace(
                SMALL_KERNEL,
                parameters=(*SMALL_KERNEL.parameters[:2], ("scale", "fp16"), ("num_elements", "i32")),
            ),
            "parameter of type fp16",
        ),
        (
            Kernel(
                operator="kernel_harness.descriptor",
                function="copy_tile",
                parameters=(("out", "*fp16"), ("x", "*fp16"), ("num_rows", "i32")),
                constants=(("BLOCK", 64),),
                num_warps=4,
                num_stages=1,
            ),
            "bytes of scratch memory",
        ),
        (
            Kernel(
                operator="kernel_harness.small_gemm",
                function="small_gemm",
                parameters=(
                    *((name, "*fp32") for name in ("out", "a", "b")),
                    ("num_columns", "i32"),
                    ("num_steps", "i32"),
                ),
                constants=(("BLOCK_M", 128), ("BLOCK_N", 128), ("BLOCK_K", 64)),
                num_warps=8,
                num_stages=5,
            ),
            "bytes of shared memory, and a block has at most 232448",
        ),
    ],
)
def test_a_kernel_that_cannot_be_launched(kernel_compiler: Executor, kernel: Kernel, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        kernel_compiler.submit(compile_kernel, kernel, 90).result()


def test_ptx_has_the_parameters_that_launches_pass() -> None:
    check_ptx_parameters(SMALL_KERNEL, 90, PTX.format(scale="f32"))
    with pytest.raises(
        PluginError, match=r"\[64, 64, 64, 32, 64, 64\] bits, but launches pass \[64, 64, 32, 32"
    ):
        check_ptx_parameters(SMALL_KERNEL, 90, PTX.format(scale="b64"))
    left_out = PTX.format(scale="f32").replace("	.param .u32 scaled_add_param_3,\n", "")
    with pytest.raises(PluginError, match=r"\[64, 64, 32, 64, 64\] bits"):
        check_ptx_parameters(SMALL_KERNEL, 90, left_out)


def test_a_failure_leaves_what_was_there(folder: Path) -> None:
    before = Bundle.load(folder).manifest
    broken = replace(SMALL_KERNEL, constants=(("BLOCK", 100),))
    with pytest.raises(PluginError, match="does not compile"):
        write_bundle({90: [LARGE_KERNEL, broken]}, folder, num_processes=1)
    assert Bundle.load(folder).manifest == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_compiler_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "crashing" / "operator"
    package.mkdir(parents=True)
    (package / "kernel.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    kernel = replace(SMALL_KERNEL, operator="crashing.operator", function="multiply")
    with pytest.raises(PluginError, match=r"compiled one of: crashing\.operator\.kernel\.multiply for sm_90"):
        write_bundle({90: [kernel]}, tmp_path / "kernels", num_processes=1)


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "kernels"):
        with pytest.raises(ConfigError, match=f"{folder} (is there and is no bundle|cannot be made)"):
            write_bundle({80: [SMALL_KERNEL]}, folder, num_processes=1)


def test_kernels_are_replaced_and_nothing_else_is(folder: Path, tmp_path: Path) -> None:
    write_bundle({80: [SMALL_KERNEL]}, folder, num_processes=1)
    assert len(Bundle.load(folder).manifest.cubins) == len(list(folder.rglob("*.cubin"))) == 1
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").touch()
    with pytest.raises(ConfigError, match="thesis is there and is no bundle of kernels"):
        write_bundle({80: [SMALL_KERNEL]}, other, num_processes=1)
    assert [path.name for path in other.iterdir()] == ["chapter.tex"]
