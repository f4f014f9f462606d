"""The operators that run on GPUs, and how. Needs neither a compiler nor the tools that graphs are built with:
it is what a serving machine imports."""

from __future__ import annotations

from collections.abc import Mapping

from trtforge.plugins.fp8_gemm import launch as fp8_gemm
from trtforge.plugins.fp8_gemm.op import FP8_GEMM
from trtforge.plugins.int4_gemm import launch as int4_gemm
from trtforge.plugins.int4_gemm.op import INT4_GEMM
from trtforge.plugins.launch import Kernels
from trtforge.plugins.op import OpSpec
from trtforge.plugins.paged_attention import launch as paged_attention
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION
from trtforge.plugins.qk_norm import launch as qk_norm
from trtforge.plugins.qk_norm.op import QK_NORM
from trtforge.plugins.rms_norm import launch as rms_norm
from trtforge.plugins.rms_norm.op import ADD_RMS_NORM
from trtforge.plugins.rope import launch as rope
from trtforge.plugins.rope.op import ROPE
from trtforge.plugins.silu_mul import launch as silu_mul
from trtforge.plugins.silu_mul.op import SILU_MUL

KERNELS: Mapping[OpSpec, Kernels] = {
    ADD_RMS_NORM: Kernels(rms_norm.plan, rms_norm.choices),
    FP8_GEMM: Kernels(fp8_gemm.plan, fp8_gemm.choices),
    INT4_GEMM: Kernels(int4_gemm.plan, int4_gemm.choices),
    PAGED_ATTENTION: Kernels(paged_attention.plan, paged_attention.choices),
    QK_NORM: Kernels(qk_norm.plan, qk_norm.choices),
    ROPE: Kernels(rope.plan, rope.choices),
    SILU_MUL: Kernels(silu_mul.plan, silu_mul.choices),
}
