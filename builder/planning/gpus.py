"""GPUs that a deployment can be planned for, as their vendors describe them.

Matrix rates are dense ones, with 32-bit accumulation where a vendor gives several. Links count one direction
of one GPU. Datasheets write memory in GB, but it is made in powers of two, and drivers report nearly as many
GiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtforge.errors import ConfigError

# Compute capability of the first GPUs that multiply FP8 matrices.
FP8_CAPABILITY = 89


@dataclass(frozen=True, slots=True)
class Compute:
    """What times are predicted from. Rates are operations a second, two for a multiplication and addition."""

    capability: int  # 90 is sm_90
    bandwidth_bytes_per_s: float  # of its memory
    link_bytes_per_s: float  # to another GPU of the machine, one way
    flops_16bit: float  # bfloat16 and float16
    flops_fp8: float | None  # None: it has none
    ops_int8: float


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Without `compute` only memory is planned."""

    title: str
    memory_bytes: int
    source: str
    compute: Compute | None


def _nvidia(
    title: str,
    source: str,
    *,
    memory_gib: int,
    capability: int,
    bandwidth_gb: float,
    link_gb: float,
    tera_16bit: float,
    tera_fp8: float | None,
    tera_int8: float,
) -> Gpu:
    compute = Compute(
        capability=capability,
        bandwidth_bytes_per_s=bandwidth_gb * 1e9,
        link_bytes_per_s=link_gb * 1e9,
        flops_16bit=tera_16bit * 1e12,
        flops_fp8=None if tera_fp8 is None else tera_fp8 * 1e12,
        ops_int8=tera_int8 * 1e12,
    )
    return Gpu(title, memory_gib * 2**30, source, compute)


GPUS: Mapping[str, Gpu] = {
    "a100-40gb": _nvidia(
        "NVIDIA A100 40GB SXM",
        "NVIDIA A100 Tensor Core GPU datasheet: 40 GB HBM2, 1,555 GB/s, NVLink 600 GB/s both ways",
        memory_gib=40,
        capability=80,
        bandwidth_gb=1555,
        link_gb=300,
        tera_16bit=312,
        tera_fp8=None,
        tera_int8=624,
    ),
    "a100-80gb": _nvidia(
        "NVIDIA A100 80GB SXM",
        "NVIDIA A100 Tensor Core GPU datasheet: 80 GB HBM2e, 2,039 GB/s, NVLink 600 GB/s both ways",
        memory_gib=80,
        capability=80,
        bandwidth_gb=2039,
        link_gb=300,
        tera_16bit=312,
        tera_fp8=None,
        tera_int8=624,
    ),
    "h100": _nvidia(
        "NVIDIA H100 SXM",
        "NVIDIA H100 Tensor Core GPU datasheet: 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways; half of the "
        "rates given with sparsity",
        memory_gib=80,
        capability=90,
        bandwidth_gb=3350,
        link_gb=450,
        tera_16bit=989.5,
        tera_fp8=1979,
        tera_int8=1979,
    ),
    "h100-pcie": _nvidia(
        "NVIDIA H100 PCIe",
        "NVIDIA H100 PCIe datasheet: 80 GB, 2.0 TB/s, PCIe 5.0 x16 128 GB/s both ways (a bridge joins two "
        "cards only and is left out); half of the rates given with sparsity",
        memory_gib=80,
        capability=90,
        bandwidth_gb=2000,
        link_gb=64,
        tera_16bit=756.5,
        tera_fp8=1513,
        tera_int8=1513,
    ),
    "h200": _nvidia(
        "NVIDIA H200 SXM",
        "NVIDIA H200 Tensor Core GPU datasheet: 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways; half of the "
        "rates given with sparsity",
        memory_gib=141,
        capability=90,
        bandwidth_gb=4800,
        link_gb=450,
        tera_16bit=989.5,
        tera_fp8=1979,
        tera_int8=1979,
    ),
    "b200": _nvidia(
        "NVIDIA HGX B200",
        "NVIDIA Blackwell datasheet, HGX B200: 180 GB, 7.7 TB/s, NVLink 1.8 TB/s both ways; half of the "
        "rates given with sparsity",
        memory_gib=180,
        capability=100,
        bandwidth_gb=7700,
        link_gb=900,
        tera_16bit=2250,
        tera_fp8=4500,
        tera_int8=4500,
    ),
    "l40s": _nvidia(
        "NVIDIA L40S",
        "NVIDIA L40S datasheet: 48 GB GDDR6, 864 GB/s, PCIe 4.0 x16 64 GB/s both ways",
        memory_gib=48,
        capability=89,
        bandwidth_gb=864,
        link_gb=32,
        tera_16bit=362.05,
        tera_fp8=733,
        tera_int8=733,
    ),
    "rtx4090": _nvidia(
        "NVIDIA GeForce RTX 4090",
        "NVIDIA Ada GPU architecture whitepaper: 24 GB, 1,008 GB/s, PCIe 4.0 x16; rates with FP32 accumulate",
        memory_gib=24,
        capability=89,
        bandwidth_gb=1008,
        link_gb=32,
        tera_16bit=165.2,
        tera_fp8=330.3,
        tera_int8=660.6,
    ),
    "rtx5090": _nvidia(
        "NVIDIA GeForce RTX 5090",
        "NVIDIA RTX Blackwell GPU architecture whitepaper: 32 GB, 1,792 GB/s, PCIe 5.0 x16; rates with FP32 "
        "accumulate",
        memory_gib=32,
        capability=120,
        bandwidth_gb=1792,
        link_gb=64,
        tera_16bit=209.5,
        tera_fp8=419,
        tera_int8=838,
    ),
    "mi300x": Gpu(
        "AMD Instinct MI300X",
        192 * 2**30,
        "AMD Instinct MI300X datasheet: 192 GB HBM3; trtforge does not run on it, so no times are predicted",
        None,
    ),
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`. Raises ConfigError, naming the known ones."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu {name} is not known: known are {', '.join(GPUS)}")
    return gpu
