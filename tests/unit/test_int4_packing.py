"""Four-bit weights: Int4Gemm's own layout, and the layouts of checkpoints."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.errors import PluginError
from trtforge.plugins.int4_gemm.formats import read_awq, read_compressed_tensors, read_gptq, read_modelopt
from trtforge.plugins.int4_gemm.packing import Int4Weight, pack, unpack

# The order of columns in AutoAWQ's words, as its packer lists it.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
OUT, IN, GROUP = 16, 96, 32


def some_weight(
    out_features: int, in_features: int, num_groups: int, act_order: bool = False, seed: int = 0
) -> Int4Weight:
    rng = np.random.default_rng(seed)
    shape = (out_features, num_groups)
    return Int4Weight(
        values=rng.integers(0, 16, (out_features, in_features), np.uint8),
        scales=rng.normal(size=shape).astype(np.float16),
        zeros=rng.integers(0, 17, shape, np.uint8),
        perm=rng.permutation(in_features).astype(np.int32) if act_order else None,
    )


def assert_equal(got: Int4Weight, expected: Int4Weight) -> None:
    np.testing.assert_array_equal(got.values, expected.values)
    np.testing.assert_array_equal(got.scales, expected.scales)
    np.testing.assert_array_equal(got.zeros, expected.zeros)
    np.testing.assert_array_equal(got.perm, expected.perm)


@settings(deadline=None)
@given(
    out_features=st.integers(1, 200),
    groups=st.tuples(st.sampled_from([32, 64, 128]), st.integers(1, 9)),
    act_order=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unpack_undoes_pack(out_features: int, groups: tuple[int, int], act_order: bool, seed: int) -> None:
    size, num_groups = groups
    weight = some_weight(out_features, size * num_groups, num_groups, act_order, seed)
    packed = pack(weight, np.float16)
    assert_equal(unpack(packed["weight"], packed["scales"], packed.get("perm"), size * num_groups), weight)


def test_a_nibble_is_where_the_operator_says() -> None:
    weight = some_weight(70, 160, 5)
    words = pack(weight, np.float16)["weight"]
    assert words.shape == (2, 2, 64, 16)
    for output, column in product(range(70), range(160)):
        tile, row = divmod(output, 64)
        step, rest = divmod(column, 128)
        shift, pair = divmod(rest, 32)
        word = int(words[tile, step, row, pair // 2])
        assert word >> (4 * shift + 16 * (pair % 2)) & 15 == weight.values[output, column]


def test_dequantized_columns_are_in_the_order_of_the_inputs() -> None:
    weight = some_weight(3, 64, 2, act_order=True)
    expected = np.zeros((3, 64), np.float32)
    for output, column in product(range(3), range(64)):
        group = column // 32
        number = int(weight.values[output, column]) - int(weight.zeros[output, group])
        expected[output, weight.perm[column]] = number * np.float32(weight.scales[output, group])
    np.testing.assert_array_equal(weight.dequantize(), expected)


def naive_gptq(qweight, qzeros, scales, g_idx, added):
    """[out, in]: eight inputs a word of qweight, eight outputs a word of qzeros, the lowest first."""
    weight = np.zeros((OUT, IN), np.float32)
    for output, column in product(range(OUT), range(IN)):
        group = g_idx[column]
        value = int(qweight[column // 8, output]) >> 4 * (column % 8) & 15
        zero = (int(qzeros[group, output // 8]) >> 4 * (output % 8) & 15) + added
        weight[output, column] = np.float32(scales[group, output]) * (value - zero)
    return weight


def naive_awq(qweight, qzeros, scales):
    """[out, in]: eight outputs a word of both, in the order of AWQ_ORDER."""
    weight = np.zeros((OUT, IN), np.float32)
    for output, column in product(range(OUT), range(IN)):
        group, shift = column // GROUP, 4 * AWQ_ORDER.index(output % 8)
        value = int(qweight[column, output // 8]) >> shift & 15
        zero = int(qzeros[group, output // 8]) >> shift & 15
        weight[output, column] = np.float32(scales[group, output]) * (value - zero)
    return weight


def naive_compressed_tensors(packed, scale, zero_point, g_idx):
    """[out, in]: eight inputs a word of the weight, eight outputs a word of the zero points."""
    weight = np.zeros((OUT, IN), np.float32)
    for output, column in product(range(OUT), range(IN)):
        group = g_idx[column]
        value = (int(packed[output, column // 8]) >> 4 * (column % 8) & 15) - 8
        zero = 0
        if zero_point is not None:
            zero = (int(zero_point[output // 8, group]) >> 4 * (output % 8) & 15) - 8
        weight[output, column] = np.float32(scale[output, group]) * (value - zero)
    return weight


def naive_modelopt(packed, scale):
    """[out, in]: two outputs a byte, two's complement."""
    weight = np.zeros((OUT, IN), np.float32)
    for output, column in product(range(OUT), range(IN)):
        value = int(packed[output // 2, column]) >> 4 * (output % 2) & 15
        value = value - 16 if value >= 8 else value
        weight[output, column] = np.float32(scale[output, column // GROUP]) * value
    return weight


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-(2**31), 2**31, shape, np.int32)


def act_order(rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.arange(IN) // GROUP).astype(np.int32)


@pytest.mark.parametrize("minus_one", [True, False])
@pytest.mark.parametrize("order", ["none", "sorted", "act-order"])
def test_gptq(minus_one: bool, order: str) -> None:
    rng = np.random.default_rng(1)
    qweight, qzeros = words(rng, IN // 8, OUT), words(rng, IN // GROUP, OUT // 8)
    scales = rng.normal(size=(IN // GROUP, OUT)).astype(np.float16)
    in_order = (np.arange(IN) // GROUP).astype(np.int32)
    g_idx = {"none": None, "sorted": in_order, "act-order": act_order(rng)}[order]
    weight = read_gptq(qweight, qzeros, scales, g_idx, zeros_minus_one=minus_one)
    assert (weight.perm is not None) == (order == "act-order")
    expected = naive_gptq(qweight, qzeros, scales, in_order if g_idx is None else g_idx, int(minus_one))
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_awq() -> None:
    rng = np.random.default_rng(2)
    qweight, qzeros = words(rng, IN, OUT // 8), words(rng, IN // GROUP, OUT // 8)
    scales = rng.normal(size=(IN // GROUP, OUT)).astype(np.float16)
    np.testing.assert_array_equal(
        read_awq(qweight, qzeros, scales).dequantize(), naive_awq(qweight, qzeros, scales)
    )


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("reordered", [False, True])
def test_compressed_tensors(zeros: bool, reordered: bool) -> None:
    rng = np.random.default_rng(3)
    packed, scale = words(rng, OUT, IN // 8), rng.normal(size=(OUT, IN // GROUP)).astype(np.float32)
    zero_point = words(rng, OUT // 8, IN // GROUP) if zeros else None
    g_idx = act_order(rng) if reordered else None
    weight = read_compressed_tensors(packed, scale, zero_point, g_idx)
    expected = naive_compressed_tensors(
        packed, scale, zero_point, np.arange(IN) // GROUP if g_idx is None else g_idx
    )
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_modelopt() -> None:
    rng = np.random.default_rng(4)
    packed = rng.integers(0, 256, (OUT // 2, IN), np.uint8)
    scale = rng.normal(size=(OUT, IN // GROUP)).astype(np.float32)
    np.testing.assert_array_equal(read_modelopt(packed, scale).dequantize(), naive_modelopt(packed, scale))


def test_groups_of_unequal_size_are_refused() -> None:
    rng = np.random.default_rng(5)
    g_idx = act_order(rng)
    g_idx[g_idx == 0] = 1
    with pytest.raises(PluginError, match=r"groups of g_idx have \[0, 64, 32\] columns"):
        read_gptq(
            words(rng, IN // 8, OUT), words(rng, IN // GROUP, OUT // 8), np.ones((IN // GROUP, OUT)), g_idx
        )


@pytest.mark.parametrize(
    ("in_features", "num_groups", "message"),
    [
        (100, 1, "in_features is 100, which is no multiple of 32"),
        (96, 2, "2 groups do not divide in_features = 96"),
        (320, 3, "3 groups do not divide in_features = 320"),
        (512, 2, "2 groups do not divide in_features = 512"),
    ],
)
def test_groups_that_the_layout_cannot_hold_are_refused(
    in_features: int, num_groups: int, message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        some_weight(8, in_features, num_groups)


def test_a_weight_that_contradicts_itself_is_refused() -> None:
    weight = some_weight(8, 64, 2)
    with pytest.raises(PluginError, match="values must be 0 to 15"):
        Int4Weight(weight.values + np.uint8(1), weight.scales, weight.zeros)
    with pytest.raises(PluginError, match="do not fit together"):
        Int4Weight(weight.values, weight.scales, weight.zeros[:, :1])
    with pytest.raises(PluginError, match="no permutation of 64 columns"):
        Int4Weight(weight.values, weight.scales, weight.zeros, np.zeros(64, np.int32))
    packed = pack(weight, np.float16)
    with pytest.raises(PluginError, match=r"is stored as \(1, 2, 64, 16\), not \(1, 1, 64, 16\)"):
        unpack(packed["weight"], packed["scales"], None, 192)
