"""What TensorRT and bundles rely on in the plans of the operators that have kernels, searched at random."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from trtforge.plugins.launch import Call, Gpu, workspace_layout
from trtforge.plugins.op import AttributeValue
from trtforge.plugins.operators import OPERATORS
from trtforge.plugins.signature import Signature

Shape = tuple[str | int, ...]
TOKENS = "num_tokens"


@dataclass(frozen=True)
class Node:
    """Inputs of a call whose sizes vary, by the names of the dims."""

    operator: str
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    attributes: Mapping[str, AttributeValue]

    def call(self, sizes: Mapping[str, int]) -> Call:
        shapes = {
            name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)
            for name, dims in self.shapes.items()
        }
        signature = Signature(OPERATORS[self.operator].spec, list(shapes))
        return signature.call(list(shapes.values()), [self.dtypes[name] for name in shapes], self.attributes)


def attention(cache: str, heads: int, kv_heads: int, window: int = 0) -> Node:
    shapes: dict[str, Shape] = {
        "q": (TOKENS, heads, 128),
        "k": (TOKENS, kv_heads, 128),
        "v": (TOKENS, kv_heads, 128),
        "kv_cache": ("num_blocks", 2, 32, kv_heads, 128),
        "block_tables": ("num_seqs", "max_blocks"),
        "cu_seqlens": ("num_seqs + 1",),
        "context_lens": ("num_seqs",),
        "slot_mapping": (TOKENS,),
    }
    dtypes = dict.fromkeys(shapes, "int32") | dict.fromkeys("qkv", "bfloat16") | {"kv_cache": cache}
    if cache != "bfloat16":
        shapes |= {"k_scale": (1,), "v_scale": (1,)}
        dtypes |= {"k_scale": "float32", "v_scale": "float32"}
    return Node("PagedAttention", shapes, dtypes, {"scale": 0.125, "window": window, "softcap": 0.0})


def int4(out_features: int, in_features: int, *, perm: bool) -> Node:
    shapes: dict[str, Shape] = {
        "x": (TOKENS, in_features),
        "weight": (out_features // 64, in_features // 128, 64, 16),
        "scales": (in_features // 128, out_features, 2),
    }
    dtypes = {"x": "bfloat16", "weight": "int32", "scales": "bfloat16", "perm": "int32"}
    return Node("Int4Gemm", shapes | ({"perm": (in_features,)} if perm else {}), dtypes, {})


def fp8(out_features: int, in_features: int, activation: str) -> Node:
    shapes: dict[str, Shape] = {
        "x": (TOKENS, in_features),
        "weight": (out_features, in_features),
        "scale": (out_features, 1),
    }
    dtypes = {"x": "bfloat16", "weight": "float8_e4m3fn", "scale": "float32"}
    return Node("Fp8Gemm", shapes, dtypes, {"scales": "channel", "activation": activation})


def bfloat16(operator: str, attributes: Mapping[str, AttributeValue], **shapes: Shape) -> Node:
    return Node(operator, shapes, dict.fromkeys(shapes, "bfloat16"), attributes)


NODES = {
    "attention": attention("bfloat16", 32, 8),
    "attention-one-kv-head": attention("bfloat16", 8, 1),
    "attention-window-e4m3": attention("float8_e4m3fn", 32, 32, window=1024),
    "int4": int4(4096, 4096, perm=False),
    "int4-small-perm": int4(512, 2048, perm=True),
    "int4-long": int4(1024, 14336, perm=False),
    "fp8": fp8(4096, 4096, "none"),
    "fp8-dynamic": fp8(1024, 14336, "dynamic"),
    "norm": bfloat16("AddRmsNorm", {"eps": 1e-5}, x=(TOKENS, 4096), residual=(TOKENS, 4096), weight=(4096,)),
    "gate": bfloat16("SiluMul", {"activation": "silu"}, gate_up=(TOKENS, 2, 14336)),
    "head-norm": bfloat16(
        "QkNorm",
        {"eps": 1e-6, "unit_offset": 0},
        q=(TOKENS, 32, 128),
        k=(TOKENS, 8, 128),
        q_weight=(128,),
        k_weight=(128,),
    ),
    "rope": bfloat16(
        "Rope",
        {"interleaved": 0, "rotary_dim": 0},
        q=(TOKENS, 32, 128),
        k=(TOKENS, 8, 128),
        cos=(TOKENS, 64),
        sin=(TOKENS, 64),
    ),
}
GPUS = (Gpu(80, 108), Gpu(89, 58), Gpu(90, 132), Gpu(120, 188))
LARGEST = {TOKENS: 8192, "num_seqs": 256, "max_blocks": 4096, "num_blocks": 10_000}


def sizes_up_to(rng: random.Random, largest: Mapping[str, int]) -> dict[str, int]:
    """Small ones as often as large ones, and every sequence has room for a token."""
    sizes = {name: round(size ** rng.random()) for name, size in largest.items() if name != "num_seqs + 1"}
    sizes["num_seqs"] = min(sizes["num_seqs"], sizes[TOKENS])
    return sizes | {"num_seqs + 1": sizes["num_seqs"] + 1}


def growing(seed: int, number: int) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    rng = random.Random(seed)
    for _ in range(number):
        large = sizes_up_to(rng, LARGEST)
        yield sizes_up_to(rng, large), large


@pytest.fixture(params=NODES)
def node(request: pytest.FixtureRequest) -> Node:
    node = NODES[request.param]
    operator = OPERATORS.get(node.operator)
    if operator is None or operator.kernels is None:
        pytest.skip(f"{node.operator} has no kernels yet")
    return node


def test_every_operator_with_kernels_is_searched() -> None:
    with_kernels = {name for name, operator in OPERATORS.items() if operator.kernels is not None}
    assert with_kernels <= {node.operator for node in NODES.values()}


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_nothing_is_planned_that_is_not_a_choice(node: Node, gpu: Gpu) -> None:
    kernels = OPERATORS[node.operator].kernels
    unknown = dict.fromkeys((*LARGEST, "num_seqs + 1"), -1)
    choices = set(kernels.choices(node.call(unknown), gpu.arch))
    for sizes, _ in growing(2, 100):
        planned = {launch.kernel for launch in kernels.plan(node.call(sizes), gpu).launches}
        assert planned <= choices, f"{sizes} need {[kernel.name for kernel in planned - choices]}"


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_a_larger_call_needs_no_less_workspace(node: Node, gpu: Gpu) -> None:
    plan = OPERATORS[node.operator].kernels.plan
    for small, large in growing(0, 150):
        needed = [workspace_layout(plan(node.call(sizes), gpu))[1] for sizes in (small, large)]
        assert needed[0] <= needed[1], f"{small} needs {needed[0]} bytes, {large} {needed[1]}"


def test_launches_use_tensors_and_workspaces_that_there_are(node: Node) -> None:
    operator = OPERATORS[node.operator]
    there = {tensor.name for tensor in operator.spec.outputs} | node.shapes.keys()
    for sizes, _ in growing(1, 100):
        plan = operator.kernels.plan(node.call(sizes), Gpu(90, 132))
        used: set[Any] = {
            launch.arguments[name]
            for launch in plan.launches
            for name, type_ in launch.kernel.parameters
            if type_.startswith("*")
        }
        assert used - {None} <= there | plan.workspace.keys()
