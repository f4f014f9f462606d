"""The operators' function bodies, run by ONNX Runtime, compute what their references compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from trtforge.errors import PluginError
from trtforge.plugins.all_reduce.op import ALL_REDUCE
from trtforge.plugins.all_reduce.reference import all_reduce
from trtforge.plugins.body import STANDARD_OPSET
from trtforge.plugins.function_bodies import add_function_bodies
from trtforge.plugins.int4_gemm.cases import CASES as INT4_CASES
from trtforge.plugins.int4_gemm.cases import exact_inputs as exact_int4_inputs
from trtforge.plugins.int4_gemm.op import INT4_GEMM
from trtforge.plugins.int4_gemm.reference import int4_gemm
from trtforge.plugins.linear.op import LINEAR
from trtforge.plugins.linear.reference import linear
from trtforge.plugins.moe_experts.op import MOE_EXPERTS
from trtforge.plugins.moe_experts.reference import moe_experts
from trtforge.plugins.op import DOMAIN, OPSET_VERSION, OpSpec
from trtforge.plugins.paged_attention.cases import CASES, TOLERANCE, make_inputs
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION
from trtforge.plugins.paged_attention.reference import paged_attention

Arrays = dict[str, np.ndarray]


def model_of(spec: OpSpec, calls: list[tuple[Arrays, dict]]) -> onnx.ModelProto:
    """A model with one node for each call; its tensors are called name.index."""
    spec.register_schema()
    nodes, inputs, outputs = [], [], []
    for index, (arrays, attributes) in enumerate(calls):
        names = [f"{t.name}.{index}" if t.name in arrays else "" for t in spec.inputs]
        results = [f"{t.name}.{index}" for t in spec.outputs]
        while not names[-1]:
            names.pop()
        nodes.append(
            helper.make_node(spec.name, names, results, domain=DOMAIN, **spec.node_attributes(**attributes))
        )
        for name, array in arrays.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(f"{name}.{index}", kind, array.shape))
        kinds = {t.dtype: arrays[t.name].dtype for t in spec.inputs if t.name in arrays}
        outputs += [
            helper.make_tensor_value_info(r, helper.np_dtype_to_tensor_dtype(kinds[t.dtype]), t.dims)
            for r, t in zip(results, spec.outputs, strict=True)
        ]
    opsets = [helper.make_opsetid("", STANDARD_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    graph = helper.make_graph(nodes, "test", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)  # against the registered schema
    return model


def run(spec: OpSpec, *calls: tuple[Arrays, dict]) -> list[np.ndarray]:
    model = add_function_bodies(model_of(spec, list(calls)))
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        f"{name}.{i}": ort_value(array)
        for i, (arrays, _) in enumerate(calls)
        for name, array in arrays.items()
    }
    return [value.numpy() for value in session.run_with_ort_values(None, feeds)]


def ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    """Also of float8, which ONNX Runtime takes and gives as bytes."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    array = np.ascontiguousarray(array)
    data = array.view(np.uint8) if kind == TensorProto.FLOAT8E4M3FN else array
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(data, kind)


def attention_inputs(
    rng: np.random.Generator,
    new_lens: list[int],
    context_lens: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
) -> Arrays:
    """Sequences of `context_lens` tokens of which the last `new_lens` are new, in shuffled blocks of 4."""
    block_size, num_blocks = 4, 24
    blocks = iter(rng.permutation(num_blocks).tolist())
    tables = np.zeros((len(new_lens), 6), np.int32)
    slots = []
    for row, (new, context) in enumerate(zip(new_lens, context_lens, strict=True)):
        used = -(-context // block_size)
        tables[row, :used] = [next(blocks) for _ in range(used)]
        positions = np.arange(context - new, context)
        slots += (tables[row, positions // block_size] * block_size + positions % block_size).tolist()
    num_tokens = len(slots)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "q": normal(num_tokens, heads, dim),
        "k": normal(num_tokens, kv_heads, dim),
        "v": normal(num_tokens, kv_heads, dim),
        "kv_cache": normal(num_blocks, 2, block_size, kv_heads, dim),
        "block_tables": tables,
        "cu_seqlens": np.cumsum([0, *new_lens]).astype(np.int32),
        "context_lens": np.array(context_lens, np.int32),
        "slot_mapping": np.array(slots, np.int32),
    }


ATTENTION_CASES = {
    "prefill": ([5, 9], [5, 9], {}),
    "decode": ([1, 1, 1], [1, 8, 13], {}),
    "chunks-and-decode": ([4, 1, 7], [11, 5, 7], {}),
    "idle-sequence": ([3, 0, 2], [3, 6, 9], {}),
    "empty-context": ([2, 0], [2, 0], {}),
    "window": ([6, 1], [13, 17], {"window": 5}),
    "window-of-one": ([3, 1], [3, 9], {"window": 1}),
    "softcap": ([6, 1], [6, 9], {"softcap": 3.0}),
    "window-softcap": ([6, 1], [10, 9], {"softcap": 3.0, "window": 4}),
}


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_paged_attention_body_equals_reference(case: str, sinks: bool) -> None:
    new_lens, context_lens, attributes = ATTENTION_CASES[case]
    rng = np.random.default_rng(len(case))
    for heads, kv_heads, dim in ((4, 4, 8), (6, 2, 16), (5, 1, 24)):
        inputs = attention_inputs(rng, new_lens, context_lens, heads, kv_heads, dim)
        if sinks:
            inputs["sinks"] = rng.normal(size=heads).astype(np.float32)
        attributes = attributes | {"scale": 0.3}
        expected = paged_attention(*inputs.values(), **attributes)
        for got, want in zip(run(PAGED_ATTENTION, (inputs, attributes)), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(
    "name",
    [
        "alibi", "all-features", "e4m3", "e4m3-float16", "e4m3-features", "idle-sequences", "int8",
        "int8-float16", "e4m3-without-scales", "mixed-float16", "padded", "padded-prefill", "window-split",
    ],
)  # fmt: skip
def test_paged_attention_body_equals_reference_in_kernels_cases(name: str) -> None:
    """In the cases' dtypes where ONNX Runtime has them: it multiplies no bfloat16 on a CPU."""
    (case,) = (case for case in CASES if case.name == name)
    if case.dtype == "bfloat16":
        case = replace(case, dtype="float32")
    inputs = make_inputs(case)
    out, cache = run(PAGED_ATTENTION, (inputs, case.attributes))
    expected_out, expected_cache = paged_attention(**inputs, **case.attributes)
    np.testing.assert_allclose(out, expected_out, atol=TOLERANCE[case.dtype])
    # NaN may become another NaN.
    stored = ~np.isnan(expected_cache.astype(np.float32))
    got_cache = cache.view(expected_cache.dtype)
    np.testing.assert_array_equal(np.isnan(got_cache.astype(np.float32)), ~stored)
    np.testing.assert_array_equal(got_cache[stored], expected_cache[stored])


def test_negative_slots_are_not_stored_and_rows_outside_of_sequences_do_no_harm() -> None:
    rng = np.random.default_rng(0)
    inputs = attention_inputs(rng, [3, 2], [3, 6], 4, 2, 8)
    inputs["slot_mapping"][1] = -1
    padded = dict(inputs)
    for name in ("q", "k", "v"):
        padded[name] = np.concatenate([inputs[name], np.full((2, *inputs[name].shape[1:]), 1e6, np.float32)])
    padded["slot_mapping"] = np.append(inputs["slot_mapping"], [-1, -7]).astype(np.int32)
    expected_out, expected_cache = paged_attention(*inputs.values(), scale=0.5)
    out, cache = run(PAGED_ATTENTION, (padded, {"scale": 0.5}))
    np.testing.assert_allclose(out[:5], expected_out, atol=2e-6)
    np.testing.assert_array_equal(out[5:], 0)
    np.testing.assert_array_equal(cache, expected_cache)


def test_nothing_to_store() -> None:
    inputs = attention_inputs(np.random.default_rng(0), [2], [5], 4, 2, 8)
    inputs["slot_mapping"][:] = -1
    out, cache = run(PAGED_ATTENTION, (inputs, {"scale": 0.5}))
    np.testing.assert_array_equal(cache, inputs["kv_cache"])
    np.testing.assert_allclose(out, paged_attention(*inputs.values(), scale=0.5)[0], atol=2e-6)


def test_nodes_that_differ_get_bodies_that_differ() -> None:
    rng = np.random.default_rng(0)
    inputs = [attention_inputs(rng, [5], [9], 4, 2, 8) for _ in range(4)]
    inputs[2]["sinks"] = rng.normal(size=4).astype(np.float32)
    attributes = [{"scale": 0.5}, {"scale": 0.5, "window": 3}, {"scale": 0.5}, {"scale": 0.5}]
    calls = list(zip(inputs, attributes, strict=True))
    results = run(PAGED_ATTENTION, *calls)
    for index, (arrays, values) in enumerate(calls):
        np.testing.assert_allclose(
            results[2 * index], paged_attention(*arrays.values(), **values)[0], atol=2e-6
        )
    model = add_function_bodies(model_of(PAGED_ATTENTION, calls))
    assert [node.op_type for node in model.graph.node] == [
        "PagedAttention",
        "PagedAttention_2",
        "PagedAttention_3",
        "PagedAttention",
    ]
    assert len(model.functions) == 3


@pytest.mark.parametrize("shape", [(7, 6), (3, 1, 6)])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_linear_body_equals_reference(shape: tuple[int, ...], bias: bool) -> None:
    rng = np.random.default_rng(0)
    inputs = {"x": rng.normal(size=shape), "weight": rng.normal(size=(5, 6))}
    if bias:
        inputs["bias"] = rng.normal(size=5)
    inputs = {name: array.astype(np.float32) for name, array in inputs.items()}
    (y,) = run(LINEAR, (inputs, {}))
    np.testing.assert_allclose(y, linear(*inputs.values()), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_reduce_of_one_rank_gives_its_input_on(dtype: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, 1, 6)).astype(dtype)
    (y,) = run(ALL_REDUCE, ({"x": x}, {}))
    np.testing.assert_array_equal(y, all_reduce(x))
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", INT4_CASES)
def test_int4_gemm_body_equals_reference(case: str, dtype: type) -> None:
    inputs = exact_int4_inputs(INT4_CASES[case], dtype)
    (y,) = run(INT4_GEMM, (inputs, {}))
    expected = int4_gemm(*(inputs.get(tensor.name) for tensor in INT4_GEMM.inputs))
    # The body rounds its product and, again, the sum with the bias; in float32 these inputs need none.
    rounding = 0 if dtype == np.float32 else 2.0**-10 * np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
def test_moe_experts_body_equals_reference(
    activation: str, transposed: int, bias: bool, offset: bool
) -> None:
    rng = np.random.default_rng(0)
    tokens, experts, top_k, hidden, intermediate = 7, 5, 2, 6, 4
    first, second = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
    if transposed:
        first, second = (first[0], first[2], first[1]), (second[0], second[2], second[1])
    inputs = {
        "x": 2 * rng.normal(size=(tokens, hidden)),
        "router_indices": np.argsort(rng.random((tokens, experts)))[:, :top_k],
        "router_weights": rng.random((tokens, top_k)),
        "gate_up": rng.normal(size=first),
        "down": rng.normal(size=second),
    }
    if bias:
        inputs["gate_up_bias"] = rng.normal(size=(experts, 2 * intermediate))
        inputs["down_bias"] = rng.normal(size=(experts, hidden))
    if offset:  # in groups of two
        inputs["gate_up_offset"] = rng.normal(size=(experts, hidden // 2, 2 * intermediate))
        inputs["down_offset"] = rng.normal(size=(experts, intermediate // 2, hidden))
    inputs = {
        name: array if name == "router_indices" else array.astype(np.float32)
        for name, array in inputs.items()
    }
    # A limit that some values pass.
    attributes = {"activation": activation, "transposed": transposed, "alpha": 1.5, "limit": 2.0}
    (out,) = run(MOE_EXPERTS, (inputs, attributes))
    expected = moe_experts(**inputs, **attributes)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_offsets_of_experts_are_what_zero_points_take_away() -> None:
    rng = np.random.default_rng(0)
    zero, scale = rng.integers(0, 16, (3, 4, 6, 1)), rng.uniform(0.5, 1, (3, 4, 6, 1))
    codes = rng.integers(0, 16, (3, 4, 6, 2)) * scale
    wide, narrow = ((codes - minus * scale).reshape(3, 4, 12) for minus in (zero, 0))
    x, down = rng.normal(size=(5, 12)), rng.normal(size=(3, 12, 2))
    routing = rng.integers(3, size=(5, 2)), rng.random((5, 2))
    offset = (zero * scale)[..., 0].swapaxes(1, 2)
    out = moe_experts(x, *routing, narrow, down, gate_up_offset=offset, activation="silu")
    np.testing.assert_allclose(out, moe_experts(x, *routing, wide, down, activation="silu"), rtol=1e-9)


def test_references_refuse_what_contradicts_the_declaration() -> None:
    inputs = attention_inputs(np.random.default_rng(0), [3], [3], 4, 2, 8)
    with pytest.raises(PluginError, match=r"k has shape .* expected head_dim = 8"):
        paged_attention(*(inputs | {"k": inputs["k"][:, :, :4]}).values(), scale=1.0)
    with pytest.raises(PluginError, match="slot_mapping has shape"):
        paged_attention(*(inputs | {"slot_mapping": inputs["slot_mapping"][:2]}).values(), scale=1.0)


def test_node_attributes_are_checked_and_name_the_plugin() -> None:
    attributes = PAGED_ATTENTION.node_attributes(scale=0.5)
    assert attributes["plugin_namespace"] == "trtforge"
    assert attributes["plugin_version"] == "1"
    assert attributes["window"] == 0
    with pytest.raises(PluginError, match="needs the attribute scale"):
        PAGED_ATTENTION.node_attributes()
    with pytest.raises(PluginError, match="no attribute"):
        PAGED_ATTENTION.node_attributes(scale=0.5, windows=3)


def test_an_unknown_operator_gets_no_body() -> None:
    node = helper.make_node("Mystery", ["x"], ["y"], domain=DOMAIN)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    opsets = [helper.make_opsetid("", STANDARD_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    model = helper.make_model(helper.make_graph([node], "test", values[:1], values[1:]), opset_imports=opsets)
    with pytest.raises(PluginError, match="trtforge::Mystery"):
        add_function_bodies(model)
