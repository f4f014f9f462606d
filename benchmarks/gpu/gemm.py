"""Weight-only and 8-bit projections with the shapes of Llama 3.1 8B and 70B: against the copy bandwidth where
there are few tokens, beside torch's own products everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from gpu.machine import measure_rates
from gpu.part import Cell, Outcome, Settings, Table, run_part
from gpu.timing import num_copies, time_each

from trtforge.plugins.bundle import Bundle
from trtforge.plugins.examples import GROUP_SIZE, fp8_call, int4_call
from trtforge.plugins.int4_gemm.op import packed_shape
from trtforge.plugins.launcher import Launcher
from trtforge.plugins.op import AttributeValue
from trtforge.plugins.operators import OPERATORS
from trtforge.runtime.executors.kernel_calls import KernelCalls

SHAPES = {  # outputs, inputs
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate and up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B down": (8192, 28672),
}
NUM_TOKENS = (1, 4, 16, 64, 128, 512, 2048)
FEW_TOKENS = 16  # and fewer: memory bounds the product


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to compute x @ weight^T."""

    name: str
    operator: str
    weight_bytes: float  # of an element, scales included
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)

    def weights(self, out_features: int, in_features: int) -> list[torch.Tensor]:
        """The inputs after x."""
        if self.operator == "Int4Gemm":
            bits = torch.iinfo(torch.int32)
            shape = packed_shape(out_features, in_features)
            words = torch.randint(bits.min, bits.max, shape, device="cuda", dtype=torch.int32)
            scales = torch.rand(in_features // GROUP_SIZE, out_features, 2, device="cuda") * 0.01
            return [words, scales.to(torch.bfloat16)]
        weight = torch.randn(out_features, in_features, device="cuda").to(torch.float8_e4m3fn)
        return [weight, torch.rand(out_features, 1, device="cuda") * 0.01]


VARIANTS = (
    Variant("int4, groups of 128", "Int4Gemm", 0.5 + 4 / GROUP_SIZE),
    Variant("e4m3 weight", "Fp8Gemm", 1.0, {"scales": "channel", "activation": "none"}),
    Variant("e4m3 both", "Fp8Gemm", 1.0, {"scales": "channel", "activation": "dynamic"}),
)


GEMM_CALLS = (
    *(("Int4Gemm", int4_call(*shape)) for shape in SHAPES.values()),
    *(
        ("Fp8Gemm", fp8_call(*shape, str(variant.attributes["activation"])))
        for shape in SHAPES.values()
        for variant in VARIANTS
        if variant.operator == "Fp8Gemm"
    ),
)


def bench_gemm(settings: Settings) -> Outcome:
    """All variants over all shapes."""
    launcher = Launcher(Bundle.load(settings.bundle))
    copy_bytes_per_s = measure_rates().copy_bytes_per_s
    rows: list[tuple[Cell, ...]] = []
    for name, shape in SHAPES.items():
        for num_tokens in NUM_TOKENS:
            bf16_us, scaled_mm_us = (
                1e6 * _time_matmul(num_tokens, *shape),
                _time_scaled_mm(num_tokens, *shape),
            )
            for variant in VARIANTS:
                seconds = time_variant(variant, launcher, num_tokens, *shape)
                rate = shape[0] * shape[1] * variant.weight_bytes / seconds
                share = 100 * rate / copy_bytes_per_s if num_tokens <= FEW_TOKENS else None
                tflops = 2 * num_tokens * shape[0] * shape[1] / seconds / 1e12
                figures = 1e6 * seconds, share, tflops, bf16_us / (1e6 * seconds), bf16_us, scaled_mm_us
                rows.append((name, num_tokens, variant.name, *figures))
    columns = (
        "weight",
        "tokens",
        "kind",
        "µs",
        "% of copy",
        "TFLOP/s",
        "times bf16",
        "bf16, µs",
        "_scaled_mm, µs",
    )
    return Outcome(tables=[Table("Projections", columns, rows)])


def time_variant(
    variant: Variant, launcher: Launcher, num_tokens: int, out_features: int, in_features: int
) -> float:
    """Seconds of one product."""
    operator = OPERATORS[variant.operator]
    if operator.kernels is None:
        raise TypeError(f"{variant.operator} has no kernels")
    node = KernelCalls(operator.spec, operator.kernels, variant.attributes, launcher)
    x = torch.randn(num_tokens, in_features, device="cuda", dtype=torch.bfloat16)

    def make() -> Callable[[], object]:
        weights = variant.weights(out_features, in_features)
        return lambda: node(x, *weights)

    weight_bytes = int(out_features * in_features * variant.weight_bytes)
    return time_each([make() for _ in range(num_copies(weight_bytes, limit=32))], min_seconds=0.005)


def _time_matmul(num_tokens: int, out_features: int, in_features: int) -> float:
    x = torch.randn(num_tokens, in_features, device="cuda", dtype=torch.bfloat16)

    def make() -> Callable[[], object]:
        weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
        return lambda: torch.nn.functional.linear(x, weight)

    copies = num_copies(2 * out_features * in_features, limit=16)
    return time_each([make() for _ in range(copies)], min_seconds=0.005)


def _time_scaled_mm(num_tokens: int, out_features: int, in_features: int) -> float | None:
    """µs of torch's own product of two e4m3 matrices, already quantized; None where it has none."""
    if num_tokens % 16 or torch.cuda.get_device_capability() < (8, 9):
        return None
    x = torch.randn(num_tokens, in_features, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")

    def make() -> Callable[[], object]:
        weight = torch.randn(out_features, in_features, device="cuda").to(torch.float8_e4m3fn)
        return lambda: torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16)

    copies = num_copies(out_features * in_features, limit=32)
    return 1e6 * time_each([make() for _ in range(copies)], min_seconds=0.005)


if __name__ == "__main__":
    run_part(__doc__, bench_gemm)
