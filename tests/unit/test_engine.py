"""The layer over TensorRT: what it builds, and how it says no. TensorRT-RTX builds without a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trtforge.builder.engine import Network, choose_target
from trtforge.builder.engine_progress import BuildPhases
from trtforge.builder.lower import lower
from trtforge.builder.profiles import make_profiles
from trtforge.builder.token_rows import drop_unit_axis
from trtforge.errors import ConfigError, EngineBuildError
from trtforge.manifest import DimRange, DType, KVCacheLayout, LayerCache, Limits, Manifest, Profile

PACKAGE = "tensorrt_rtx"


def small_model(*op_types: str) -> bytes:
    """x [N] int32 -> one output for each operator of one input."""
    nodes = [helper.make_node(op, ["x"], [f"y{i}"], name=f"my_{op}") for i, op in enumerate(op_types)]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.INT32, None) for i in range(len(op_types))]
    x = helper.make_tensor_value_info("x", TensorProto.INT32, ["N"])
    graph = helper.make_graph(nodes, "small", [x], outputs)
    opset = helper.make_opsetid("", 23)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


def profile(smallest: int, typical: int, largest: int, dim: str = "N") -> Profile:
    return Profile(name="test", dims={dim: DimRange(min=smallest, opt=typical, max=largest)})


# --------------------------------------------------------------------------- the package and the target


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        ("tensorrt", "needs the package tensorrt,.*pip install 'trtforge\\[tensorrt\\]'"),
        ("tensorrt-rtx", "needs the package tensorrt_rtx,.*pip install 'trtforge\\[rtx\\]'"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(runtime: str, said: str) -> None:
    code = f"""
import re, sys
from trtforge.builder.engine import choose_target
from trtforge.errors import ConfigError
sys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = None  # importing them fails
try:
    choose_target({runtime!r})
except ConfigError as error:
    sys.exit(None if re.search({said!r}, str(error)) else str(error))
sys.exit("nothing was raised")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_option_engines_are_for_all_gpus_with_bfloat16(tensorrt_rtx: ModuleType) -> None:
    target = choose_target("tensorrt-rtx")
    assert (target.package, target.version) == (PACKAGE, tensorrt_rtx.__version__)
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(target.compute_capabilities)
    assert "7.5" not in target.compute_capabilities


def test_the_gpus_that_are_asked_for_are_the_target(tensorrt_rtx: ModuleType) -> None:
    assert choose_target("tensorrt-rtx", ["sm_120", "sm_89"]).compute_capabilities == ("12.0", "8.9")
    with pytest.raises(ConfigError, match=r"--gpu sm_90 is not possible .* for sm_80, .*sm_89, sm_120"):
        choose_target("tensorrt-rtx", ["sm_89", "sm_90"])


# --------------------------------------------------------------------------- parsing and building


def test_every_node_that_the_parser_refuses_is_named_with_its_reason(
    tensorrt_rtx: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(EngineBuildError) as refused:
        Network(small_model("Neg", "Unique", "BitwiseNot"), tmp_path / "model.onnx", PACKAGE)
    assert str(refused.value).splitlines() == [
        f"tensorrt_rtx {tensorrt_rtx.__version__} does not take the graph:",
        "  node 1 my_Unique (Unique): UNSUPPORTED_NODE, false",
        "  node 2 my_BitwiseNot (BitwiseNot): UNSUPPORTED_NODE, false",
    ]


def test_a_profile_has_to_have_every_dim_in_order(tensorrt_rtx: ModuleType, tmp_path: Path) -> None:
    network = Network(small_model("Neg"), tmp_path / "model.onnx", PACKAGE)
    target = choose_target("tensorrt-rtx")
    with pytest.raises(EngineBuildError, match=r"input x has the dims \('N',\), .* the profile test has no"):
        network.build(target, [profile(1, 2, 3, dim="M")])
    with pytest.raises(EngineBuildError, match=r"take the profile test:\n  .*ensure that .* MIN<=OPT<=MAX"):
        network.build(target, [profile(3, 2, 1)])
    assert network.build(target, [profile(1, 2, 3), profile(1, 8, 64)]).nbytes > 0


def test_ranks_add_up_what_they_have_computed(tensorrt_rtx: ModuleType, tmp_path: Path) -> None:
    """TensorRT's own operator, in rows of tokens as all that is around it."""
    h, y, weight = "h", "y", numpy_helper.from_array(np.ones((8, 8), np.float32), "weight")
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["x3"]),
        helper.make_node("MatMul", ["x3", "weight"], [h]),
        helper.make_node(
            "DistCollective",
            [h],
            ["sum"],
            domain="trt",
            collective_operation="all_reduce",
            reduce_op="sum",
            nb_rank=2,
            root=-1,
            group_size=0,
        ),
        helper.make_node("Add", ["x3", "sum"], ["y3"]),
        helper.make_node("Squeeze", ["y3", "axis"], ["y2"]),
        helper.make_node("Neg", ["y2"], [y]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in ("x", y)]
    inner = [helper.make_tensor_value_info(v, TensorProto.FLOAT, ["N", 1, 8]) for v in ("x3", h, "sum", "y3")]
    constants = [weight, numpy_helper.from_array(np.array([1]), "axis")]
    graph = helper.make_graph(nodes, "rank", values[:1], values[1:], constants, value_info=inner)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    drop_unit_axis(model)
    RemoveUnusedNodesPass()(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "DistCollective", "Add", "Neg"]
    network = Network(ir.to_proto(model).SerializeToString(), tmp_path / "model.onnx", PACKAGE)
    assert network.outputs()[0].dims == (-1, 8)
    assert network.build(choose_target("tensorrt-rtx"), [profile(1, 8, 64)]).nbytes > 0


@pytest.fixture
def tiny_network(
    tensorrt_rtx: ModuleType, export_tiny_llama: Callable[[DType], tuple[Path, Manifest]]
) -> tuple[Network, Profile]:
    folder, manifest = export_tiny_llama("bfloat16")
    graph = folder / "model.onnx"
    lowered = ir.to_proto(lower(graph, manifest.kv_cache.block_size)).SerializeToString()
    return Network(lowered, graph, PACKAGE), make_profiles(PACKAGE, manifest.limits, manifest.kv_cache)[0]


def test_progress_rises_and_an_interrupt_ends_the_build(tiny_network: tuple[Network, Profile]) -> None:
    network, limits = tiny_network
    fractions: list[float] = []

    def interrupt(fraction: float, phase: str) -> None:
        assert phase
        fractions.append(fraction)
        if fraction > 0.2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        network.build(choose_target("tensorrt-rtx"), [limits], interrupt)
    assert fractions == sorted(fractions)
    assert sum(fraction > 0.2 for fraction in fractions) < 50  # it does not go on for long
    assert network.build(choose_target("tensorrt-rtx", weight_streaming=True), [limits]).nbytes > 100_000


def test_what_tensorrt_says_about_a_failed_build_is_in_the_error(
    tiny_network: tuple[Network, Profile],
) -> None:
    network, limits = tiny_network
    with pytest.raises(EngineBuildError, match=r"cannot build the engine:\n  .*(workspace|OutOfMemory)"):
        network.build(choose_target("tensorrt-rtx", workspace_bytes=1), [limits])


# --------------------------------------------------------------------------- profiles and progress


def test_profiles_cover_the_limits() -> None:
    limits = Limits(max_model_len=100, max_num_seqs=4, max_num_batched_tokens=64)
    layers = (LayerCache(num_kv_heads=1, head_dim=8),)
    kv_cache = KVCacheLayout(dtype="bfloat16", block_size=32, num_blocks=7, layers=layers)
    # 100 tokens take 4 blocks; slots are numbered with 32 bits.
    blocks = {"max_blocks": 4, "num_blocks": 2**26 - 1}
    mixed = {"T": 64, "B": 4, "B_plus_1": 5, "R": 64, **blocks}
    decode = {"T": 4, "B": 4, "B_plus_1": 5, "R": 4, **blocks}

    def largest(package: str) -> list[dict[str, int]]:
        profiles = make_profiles(package, limits, kv_cache)
        return [{name: dim.max for name, dim in profile.dims.items()} for profile in profiles]

    assert largest("tensorrt") == [decode, mixed]
    assert largest(PACKAGE) == [mixed]


@given(
    max_model_len=st.integers(1, 4096),
    max_num_seqs=st.integers(1, 600),
    max_num_batched_tokens=st.integers(1, 5000),
    block_size=st.integers(1, 256),
)
def test_ranges_are_ordered_whatever_the_limits(
    max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int, block_size: int
) -> None:
    limits = Limits(
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
    )
    layers = (LayerCache(num_kv_heads=1, head_dim=8),)
    kv_cache = KVCacheLayout(dtype="float32", block_size=block_size, num_blocks=5, layers=layers)
    for made in make_profiles("tensorrt", limits, kv_cache):
        assert all(1 <= dim.min <= dim.opt <= dim.max for dim in made.dims.values())


def test_nested_phases_add_up_and_never_fall() -> None:
    phases = BuildPhases()
    phases.start("all", None, 4)
    phases.step("all", 0)
    assert phases.fraction == 0.25
    phases.start("part", "all", 5)
    phases.step("part", 1)
    assert phases.fraction == pytest.approx(0.25 + 0.25 * 2 / 5)
    assert phases.innermost == "part"
    phases.finish("part")  # before all of its steps were done
    assert phases.fraction == pytest.approx(0.35)
    phases.step("all", 0)
    assert phases.fraction == pytest.approx(0.35)
    phases.step("all", 3)
    assert phases.fraction == 1.0
