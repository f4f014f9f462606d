"""The card, and the two rates that every other figure is held against."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict, dataclass

import torch
from gpu.timing import time_each

COPY_BYTES = 4 * 2**30
MATMUL_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Card:
    """What nvidia-smi and torch say."""

    name: str
    arch: int  # compute capability 9.0 is 90
    num_sms: int
    memory_bytes: int
    l2_bytes: int
    driver: str
    cuda: str


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured, not from a datasheet."""

    copy_bytes_per_s: float  # of a large copy on the device; bytes read and bytes written both count
    matmul_flops: float  # bfloat16, large, random data, per second


def describe_card() -> Card:
    """Of device 0."""
    properties = torch.cuda.get_device_properties(0)
    return Card(
        name=properties.name,
        arch=10 * properties.major + properties.minor,
        num_sms=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        driver=_driver_version(),
        cuda=str(torch.version.cuda),
    )


def _driver_version() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measure_rates() -> Rates:
    """Takes about two seconds and 8 GiB."""
    return Rates(2 * COPY_BYTES / _copy_seconds(), 2 * MATMUL_SIZE**3 / _matmul_seconds())


def _copy_seconds() -> float:
    source = torch.zeros(COPY_BYTES // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    # By a kernel: in a graph a plain copy is left to the copy engines, which are slower.
    return time_each([lambda: torch.neg(source, out=target)])


def _matmul_seconds() -> float:
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return time_each([lambda: torch.matmul(a, b, out=out)], min_seconds=0.1)


def machine_dict() -> dict[str, object]:
    """Card, driver and versions for a report."""
    from importlib.metadata import version

    return asdict(describe_card()) | {name: version(name) for name in ("torch", "triton", "transformers")}
