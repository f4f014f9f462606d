"""The two rates that all other figures are held against."""

from __future__ import annotations

from gpu.machine import measure_rates
from gpu.part import Outcome, Settings, Table, run_part


def rates(_: Settings) -> Outcome:
    """Measured on this card."""
    found = measure_rates()
    row = (found.copy_bytes_per_s / 1e9, found.matmul_flops / 1e12)
    return Outcome(tables=[Table("Rates", ("copy, GB/s", "bfloat16 matmul, TFLOP/s"), [row])])


if __name__ == "__main__":
    run_part(__doc__, rates)
