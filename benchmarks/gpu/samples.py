"""The cases of all operators in one form, on numpy arrays and on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from trtforge.plugins.fp8_gemm import cases as fp8_gemm
from trtforge.plugins.int4_gemm import cases as int4_gemm
from trtforge.plugins.launch import Call
from trtforge.plugins.op import Array, AttributeValue
from trtforge.plugins.operators import OPERATORS
from trtforge.plugins.paged_attention import cases as paged_attention
from trtforge.plugins.qk_norm import cases as qk_norm
from trtforge.plugins.rms_norm import cases as rms_norm
from trtforge.plugins.rope import cases as rope
from trtforge.plugins.silu_mul import cases as silu_mul

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Of operators that compute in float32 and round once: one spacing of the dtype, and where terms cancel.
SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
NEAR_ZERO = 1e-6
E4M3_SUM_PRECISION = 2.0**-13  # of the sum of magnitudes
# A torch tensor is made from the same bits in a type that numpy has.
_CARRIERS = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}


@dataclass(frozen=True, slots=True)
class Sample:
    """One call of an operator, and how far its outputs may be from the reference's."""

    operator: str
    name: str
    inputs: Mapping[str, Array]
    attributes: Mapping[str, AttributeValue]
    relative: float
    absolute: float

    @property
    def call(self) -> Call:
        """What kernels are chosen by."""
        return Call(
            shapes={name: array.shape for name, array in self.inputs.items()},
            dtypes={name: array.dtype.name for name, array in self.inputs.items()},
            attributes=self.attributes,
        )

    def reference(self) -> tuple[Array, ...]:
        """The outputs that the operator's reference computes."""
        operator = OPERATORS[self.operator]
        inputs = [self.inputs.get(tensor.name) for tensor in operator.spec.inputs]
        outputs = operator.reference(*inputs, **self.attributes)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def all_samples() -> Iterator[Sample]:
    """Every case of every operator that has kernels, in both 16-bit dtypes where a case leaves it open."""
    for case in paged_attention.CASES:
        inputs = paged_attention.make_inputs(case)
        tolerance = paged_attention.TOLERANCE[case.dtype]
        yield Sample("PagedAttention", case.name, inputs, case.attributes, tolerance, tolerance)
    for dtype_name, dtype in DTYPES.items():
        for name, int4_case in int4_gemm.CASES.items():
            inputs = int4_gemm.exact_inputs(int4_case, dtype)
            yield Sample("Int4Gemm", f"{name}-{dtype_name}", inputs, {}, 0.0, 0.0)
        for name, fp8_case in fp8_gemm.CASES.items():
            inputs = fp8_gemm.random_inputs(fp8_case, dtype, ml_dtypes.float8_e4m3fn)
            exact = Sample(
                "Fp8Gemm",
                f"{name}-{dtype_name}",
                inputs,
                fp8_case.attributes,
                fp8_gemm.RELATIVE[dtype_name],
                fp8_gemm.ABSOLUTE,
            )
            yield exact if fp8_case.activation == "none" else _with_e4m3_sums(exact)
        for operator, name, inputs, attributes in _fused(dtype):
            tolerances = SPACING[dtype_name], NEAR_ZERO
            yield Sample(operator, f"{name}-{dtype_name}", inputs, attributes, *tolerances)


def _with_e4m3_sums(sample: Sample) -> Sample:
    """As exact as Hopper's tensor cores add up products of e4m3 (arXiv 2412.19437, section 3.5.2)."""
    magnitudes = {
        name: array if "scale" in name else np.abs(array.astype(np.float32)).astype(array.dtype)
        for name, array in sample.inputs.items()
    }
    (largest,) = replace(sample, inputs=magnitudes).reference()
    return replace(sample, absolute=E4M3_SUM_PRECISION * float(largest.max()))


def _fused(
    dtype: npt.DTypeLike,
) -> Iterator[tuple[str, str, Mapping[str, Array], Mapping[str, AttributeValue]]]:
    """Operator, case, inputs and attributes."""
    for name, shape in rms_norm.CASES.items():
        yield "AddRmsNorm", name, rms_norm.inputs(shape, dtype), {"eps": rms_norm.EPS}
    for name, shape in silu_mul.CASES.items():
        for activation in ("silu", "gelu_tanh"):
            attributes = {"activation": activation}
            yield "SiluMul", f"{name}-{activation}", silu_mul.inputs(shape, dtype), attributes
    for name, case in rope.CASES.items():
        yield "Rope", name, rope.inputs(case, dtype), case.attributes
    for name, norm_case in qk_norm.CASES.items():
        yield "QkNorm", name, qk_norm.inputs(norm_case, dtype), norm_case.attributes


def to_device(array: Array) -> torch.Tensor:
    """The same values on the current GPU."""
    carrier, dtype = _CARRIERS.get(array.dtype.name, (None, None))
    if carrier is None or dtype is None:
        return torch.from_numpy(array).cuda()
    return torch.from_numpy(array.view(carrier)).cuda().view(dtype)


def to_float32(tensor: torch.Tensor) -> Array:
    """The same values on the host."""
    return tensor.float().cpu().numpy()
