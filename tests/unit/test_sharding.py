"""Parts of heads, features and weights: nothing is lost, and numbers stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.builder.checkpoint import Checkpoint, TensorEntry
from trtforge.builder.export import TracedModel, divide, trace_checkpoint
from trtforge.builder.quantization.policy import Lowering, Quantization
from trtforge.builder.quantization.slices import take as take_quantized
from trtforge.builder.quantization.weights import Fp8Weight, Int8Weight, QuantizedLinear, QuantizedWeight
from trtforge.builder.sharding.cut import Cut, combine
from trtforge.builder.sharding.split import (
    Parallelism,
    split_evenly,
    split_features,
    split_heads,
    split_layers,
)
from trtforge.builder.sharding.weights import take
from trtforge.builder.weights import WeightSource, make_tensor
from trtforge.errors import ConfigError, ExportError
from trtforge.plugins.int4_gemm.packing import Int4Weight

# --------------------------------------------------------------------------- arithmetic


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 40))
def test_heads_are_divided_with_the_kv_heads_that_they_attend_to(
    num_kv_heads: int, per_kv_head: int, tp: int
) -> None:
    num_heads = num_kv_heads * per_kv_head
    if tp > num_heads:
        with pytest.raises(ConfigError, match=f"--tp {tp} is more than the {num_heads} attention heads"):
            split_heads(num_heads, num_kv_heads, tp)
        return
    shares = split_heads(num_heads, num_kv_heads, tp)
    heads = [head for share in shares for head in range(*share.heads)]
    assert heads == list(range(num_heads))
    for share in shares:
        groups = {head // per_kv_head for head in range(*share.heads)}
        assert groups == set(range(*share.kv_heads))
        # A kernel finds a head's KV head by division.
        local = [
            (head - share.heads[0]) * len(groups) // len(range(*share.heads)) for head in range(*share.heads)
        ]
        assert [share.kv_heads[0] + group for group in local] == [
            head // per_kv_head for head in range(*share.heads)
        ]
    sizes = [share.heads[1] - share.heads[0] for share in shares]
    assert max(sizes) - min(sizes) <= per_kv_head


def test_nine_heads_on_two_ranks() -> None:
    first, second = split_heads(9, 3, 2)
    assert (first.heads, first.kv_heads) == ((0, 6), (0, 2))
    assert (second.heads, second.kv_heads) == ((6, 9), (2, 3))


@given(st.integers(1, 5000), st.integers(1, 16), st.sampled_from([(), (128, 64, 32), (16,)]))
def test_features_are_divided_at_multiples(size: int, tp: int, multiples: tuple[int, ...]) -> None:
    ranges = split_features(size, tp, multiples)
    if ranges is None:
        assert size < tp or all(size % multiple or size // multiple < tp for multiple in multiples)
        return
    assert [index for part in ranges for index in range(*part)] == list(range(size))
    lengths = [stop - start for start, stop in ranges]
    assert min(lengths) > 0
    if multiples:
        assert all(stop % min(multiples) == 0 for _, stop in ranges)
    else:  # nobody has much more than another one
        assert max(lengths) <= 1.07 * size / tp + 1


def test_the_first_stages_have_more_layers() -> None:
    assert split_layers(30, 4) == ((0, 8), (8, 16), (16, 23), (23, 30))
    assert split_evenly(96, 2, 32) == ((0, 64), (64, 96))
    with pytest.raises(ConfigError, match="--pp 31 is more than the 30 layers"):
        split_layers(30, 31)


def test_parts_of_fused_projections_are_put_together() -> None:
    """q, k and v of 4 + 2 + 2 heads of 8 in one tensor."""
    q = Cut.of(2, split_evenly(32, 2)).moved(2, 64, 0)
    k = Cut.of(2, split_evenly(16, 2)).moved(2, 64, 32)
    v = Cut.of(2, split_evenly(16, 2)).moved(2, 64, 48)
    whole = combine([v, q, k])
    assert whole is not None
    assert whole.ranges == (((0, 16), (32, 40), (48, 56)), ((16, 32), (40, 48), (56, 64)))
    assert [whole.local(1, index) for index in (0, 32, 48, 64)] == [0, 16, 24, 32]
    assert whole.within((32, 48)).ranges == k.ranges
    overlapping = Cut.of(2, split_evenly(16, 2)).moved(2, 64, 40)
    assert combine([k, overlapping]) is None


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("shape", [(12, 10), (3, 8, 10), (40,)])
def test_parts_of_weights_equal_numpy(shape: tuple[int, ...], stored: str, tmp_path: Path) -> None:
    """Of weights in several pieces too, as those of experts are."""
    dtype = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}[stored]
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    data = array.tobytes()
    half = len(data) // 2
    pieces = []
    for number, part in enumerate((data[:half], data[half:])):
        file = tmp_path / f"{number}"
        file.write_bytes(b"header" + part)
        pieces.append(TensorEntry(file, stored, (len(part) // dtype.itemsize,), 6, len(part)))
    source = WeightSource("w", shape, tuple(pieces))
    for axis in range(len(shape)):
        for ranges in [((0, 2),), ((1, shape[axis]),), ((0, 1), (2, 3))]:
            indices = [index for part in ranges for index in range(*part)]
            tensor = make_tensor(ir.DataType.FLOAT, take(source, axis, ranges))
            expected = np.take(array, indices, axis).astype(np.float32)
            np.testing.assert_array_equal(tensor.numpy(), expected)
            assert tensor.nbytes == expected.nbytes
            with (tmp_path / "written").open("wb") as stream:
                tensor.tofile(stream)
            assert (tmp_path / "written").read_bytes() == expected.tobytes()


def quantized(kind: str) -> QuantizedLinear:
    """A weight of 256 by 384 numbers."""
    rng = np.random.default_rng(0)
    shape = (256, 384)

    def scales(*dims: int) -> np.ndarray:
        return rng.uniform(0.5, 2, dims).astype(np.float32)

    weight: QuantizedWeight
    if kind.startswith("int4"):
        groups = int(kind.removeprefix("int4-"))
        zeros = rng.integers(0, 16, (256, groups)).astype(np.uint8)
        weight = Int4Weight(rng.integers(0, 16, shape).astype(np.uint8), scales(256, groups), zeros)
        return QuantizedLinear("int4", shape, "random", lambda: weight, 384 // groups)
    if kind == "int8":
        weight = Int8Weight(rng.integers(-127, 128, shape).astype(np.int8), scales(256, 1))
        return QuantizedLinear("int8", shape, "random", lambda: weight)
    dims = {"tensor": (1, 1), "channel": (256, 1), "block": (2, 3)}[kind]
    values = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    weight = Fp8Weight(values, scales(*dims), kind)  # type: ignore[arg-type]
    input_scale = scales(384)
    return QuantizedLinear(
        "fp8",
        shape,
        "random",
        lambda: weight,
        scales=kind,  # type: ignore[arg-type]
        read_input_scale=(lambda: input_scale) if kind == "channel" else None,
    )


@pytest.mark.parametrize("kind", ["int4-3", "int4-12", "int4-1", "int8", "tensor", "channel", "block"])
@pytest.mark.parametrize(
    ("axis", "ranges"), [(0, [(0, 128)]), (1, [(128, 384)]), (1, [(0, 128), (256, 384)])]
)
def test_quantized_parts_are_the_same_numbers(kind: str, axis: int, ranges: list[tuple[int, int]]) -> None:
    whole = quantized(kind)
    part = take_quantized("w", whole, axis, ranges)
    indices = [index for pair in ranges for index in range(*pair)]
    expected = np.take(whole.dequantize(), indices, axis)
    assert part.shape == expected.shape
    np.testing.assert_array_equal(part.dequantize(), expected)


@pytest.mark.parametrize(
    ("kind", "axis", "said"),
    [
        ("int4-3", 1, "--tp would cut w at input feature 64, within 128 that share a scale"),
        ("block", 0, "--tp would cut w at output feature 64, within 128 that share a scale"),
        ("block", 1, "--tp would cut w at input feature 64, within 128 that share a scale"),
    ],
)
def test_numbers_that_share_a_scale_are_not_parted(kind: str, axis: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        take_quantized("w", quantized(kind), axis, [(0, 64)])


# --------------------------------------------------------------------------- whole graphs


@pytest.fixture(scope="module")
def traced(tiny_llama: Path) -> TracedModel:
    """A llama of two layers with 4 heads and 2 KV heads of 16."""
    return trace_checkpoint(Checkpoint.open(str(tiny_llama)), "float32", lambda _: None)


@pytest.fixture
def run(
    make_threaded_ranks: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> Callable[..., np.ndarray]:
    """`run(traced, tp, pp, ...)`: the logits of a text in two steps; more arguments go to `divide`."""

    def run_ranks(model: TracedModel, tp: int, pp: int = 1, *options: Any) -> np.ndarray:
        folder = tmp_path / f"{tp}x{pp}"
        ranks = divide(model, Parallelism(tp, pp), *options).ranks
        driver = drive(make_threaded_ranks(ranks, tp, folder, 16, 8))
        text = np.random.default_rng(0).integers(3, 128, 12).tolist()
        return driver.run([{"a": text[:9]}, {"a": text[9:]}])["a"]

    return run_ranks


def assert_equal(logits: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("quantization", ["int4", "fp8"])
def test_ranks_have_the_quantized_numbers_of_one(
    quantization: Any, traced: TracedModel, run: Callable[..., np.ndarray]
) -> None:
    options = Quantization(quantization, 32), "plugin"
    expected = run(traced, 1, 1, *options)
    assert_equal(run(traced, 2, 1, *options), expected)
    assert_equal(run(traced, 2, 2, *options), expected)
    plain = run(traced, 1, 1)
    assert np.abs(expected - plain).max() > 1e-3 * np.abs(plain).max()  # they are rounded


@pytest.mark.parametrize("quantization", ["int4", "fp8", "int8"])
@pytest.mark.parametrize(
    ("name", "axis"),
    [("self_attn.k_proj", 0), ("self_attn.o_proj", 1), ("mlp.up_proj", 0), ("mlp.down_proj", 1)],
)
def test_scales_are_divided_with_their_weights(
    name: str, axis: int, quantization: Any, traced: TracedModel
) -> None:
    lowering: Lowering = "native"
    stored = f"model.layers.1.{name}.weight"
    parts = [f"{stored}{part}" for part in ("", "_scale", "_zero_point")]
    (whole,) = divide(traced, Parallelism(), Quantization(quantization, 32), lowering).ranks
    ranks = divide(traced, Parallelism(tp=2), Quantization(quantization, 32), lowering).ranks
    for part in parts:
        if part not in whole.model.graph.initializers:
            assert quantization != "int4"
            continue
        arrays = [rank.model.graph.initializers[part].const_value.numpy() for rank in ranks]
        expected = whole.model.graph.initializers[part].const_value.numpy()
        if expected.ndim <= axis:  # a scale a row
            for array in arrays:
                np.testing.assert_array_equal(array, expected)
        else:
            np.testing.assert_array_equal(np.concatenate(arrays, axis), expected)


@pytest.mark.parametrize(
    ("tp", "quantization", "said"),
    [
        (
            4,
            Quantization("int4"),
            r"--tp 4 cannot divide model.layers.1.mlp.down_proj.weight.* multiples of 32",
        ),
        (
            4,
            Quantization("int4", exclude=("*.down_proj.*",)),
            r"--int4 cannot be applied to .*\.o_proj\.weight",
        ),
    ],
)
def test_groups_that_a_rank_would_have_a_part_of_are_refused(
    tp: int, quantization: Quantization, said: str, traced: TracedModel
) -> None:
    with pytest.raises(ConfigError, match=said):
        divide(traced, Parallelism(tp), quantization, "plugin")


def test_patterns_of_weights_may_be_of_one_stage(traced: TracedModel) -> None:
    quantization = Quantization("fp8", exclude=("model.layers.1.*",))
    first, second = divide(traced, Parallelism(pp=2), Quantization("fp8"), "plugin").ranks
    assert any(choice.is_quantized for choice in second.weights)
    with pytest.raises(ConfigError, match="can be applied to no weight"):
        divide(traced, Parallelism(pp=2), quantization, "plugin")
    assert any(choice.is_quantized for choice in first.weights)


def changed(traced: TracedModel, change: Callable[[ir.Graph], None]) -> TracedModel:
    graph = traced.model.graph.clone()
    change(graph)
    return TracedModel(
        model=ir.Model(graph, ir_version=traced.model.ir_version),
        **{name: getattr(traced, name) for name in TracedModel.__slots__ if name != "model"},
    )


def put_behind(node: ir.Node, new: ir.Node) -> None:
    value, result = node.outputs[0], new.outputs[0]
    result.name, result.type, result.shape = f"{value.name}_behind", value.type, value.shape
    ir.convenience.replace_all_uses_with(value, result)
    new.replace_input_with(0, value)
    node.graph.insert_after(node, new)


def test_what_is_not_known_is_computed_whole(traced: TracedModel, run: Callable[..., np.ndarray]) -> None:
    """A query goes through an operator without a rule: each rank computes it whole and takes its heads."""

    def pad_queries(graph: ir.Graph) -> None:
        no_pads = ir.tensor(np.zeros(6, np.int64))
        pads = ir.Value(
            name="pads", type=ir.TensorType(no_pads.dtype), shape=no_pads.shape, const_value=no_pads
        )
        graph.register_initializer(pads)
        for node in [node for node in graph if node.op_type == "Linear"]:
            if "q_proj" in node.inputs[1].name:
                put_behind(node, ir.node("Pad", [None, pads]))

    padded = changed(traced, pad_queries)
    assert_equal(run(padded, 2), run(traced, 1))
    (rank, _) = divide(padded, Parallelism(2)).ranks
    assert rank.model.graph.initializers["model.layers.0.self_attn.q_proj.weight"].shape == (64, 64)
    assert rank.model.graph.initializers["model.layers.0.self_attn.k_proj.weight"].shape == (16, 64)


def test_attention_that_leads_to_no_projection_is_refused(traced: TracedModel) -> None:
    def hide_attention(graph: ir.Graph) -> None:
        (node, _) = [node for node in graph if node.op_type == "PagedAttention"]
        put_behind(node, ir.node("TopK", [None]))

    with pytest.raises(ExportError, match=r"attention node .* cannot be divided among ranks"):
        divide(changed(traced, hide_attention), Parallelism(2))


def test_more_ranks_than_layers_or_heads(traced: TracedModel) -> None:
    with pytest.raises(ConfigError, match="--pp 3 is more than the 2 layers"):
        divide(traced, Parallelism(pp=3))
    with pytest.raises(ConfigError, match="--tp 5 is more than the 4 attention heads"):
        divide(traced, Parallelism(tp=5))
