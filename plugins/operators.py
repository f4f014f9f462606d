"""The operators that exist, with all that there is of each."""

from __future__ import annotations

from collections.abc import Mapping

from trtforge.plugins.all_reduce import function as all_reduce
from trtforge.plugins.all_reduce.op import ALL_REDUCE
from trtforge.plugins.all_reduce.reference import all_reduce as all_reduce_reference
from trtforge.plugins.fp8_gemm import function as fp8_gemm
from trtforge.plugins.fp8_gemm.op import FP8_GEMM
from trtforge.plugins.fp8_gemm.reference import fp8_gemm as fp8_gemm_reference
from trtforge.plugins.int4_gemm import function as int4_gemm
from trtforge.plugins.int4_gemm.op import INT4_GEMM
from trtforge.plugins.int4_gemm.reference import int4_gemm as int4_gemm_reference
from trtforge.plugins.kernels import KERNELS
from trtforge.plugins.linear import function as linear
from trtforge.plugins.linear.op import LINEAR
from trtforge.plugins.linear.reference import linear as linear_reference
from trtforge.plugins.moe_experts import function as moe_experts
from trtforge.plugins.moe_experts.op import MOE_EXPERTS
from trtforge.plugins.moe_experts.reference import moe_experts as moe_experts_reference
from trtforge.plugins.operator import Operator
from trtforge.plugins.paged_attention import function as paged_attention
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION
from trtforge.plugins.paged_attention.reference import paged_attention as paged_attention_reference
from trtforge.plugins.qk_norm import function as qk_norm
from trtforge.plugins.qk_norm.op import QK_NORM
from trtforge.plugins.qk_norm.reference import qk_norm as qk_norm_reference
from trtforge.plugins.rms_norm import function as rms_norm
from trtforge.plugins.rms_norm.op import ADD_RMS_NORM
from trtforge.plugins.rms_norm.reference import add_rms_norm as add_rms_norm_reference
from trtforge.plugins.rope import function as rope
from trtforge.plugins.rope.op import ROPE
from trtforge.plugins.rope.reference import rope as rope_reference
from trtforge.plugins.silu_mul import function as silu_mul
from trtforge.plugins.silu_mul.op import SILU_MUL
from trtforge.plugins.silu_mul.reference import silu_mul as silu_mul_reference

_PARTS = (
    (ADD_RMS_NORM, add_rms_norm_reference, rms_norm.write_body),
    (ALL_REDUCE, all_reduce_reference, all_reduce.write_body),
    (FP8_GEMM, fp8_gemm_reference, fp8_gemm.write_body),
    (INT4_GEMM, int4_gemm_reference, int4_gemm.write_body),
    (LINEAR, linear_reference, linear.write_body),
    (MOE_EXPERTS, moe_experts_reference, moe_experts.write_body),
    (PAGED_ATTENTION, paged_attention_reference, paged_attention.write_body),
    (QK_NORM, qk_norm_reference, qk_norm.write_body),
    (ROPE, rope_reference, rope.write_body),
    (SILU_MUL, silu_mul_reference, silu_mul.write_body),
)
OPERATORS: Mapping[str, Operator] = {
    spec.name: Operator(spec, reference, write_body, KERNELS.get(spec))
    for spec, reference, write_body in _PARTS
}
