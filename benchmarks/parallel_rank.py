"""One rank that adds up arrays with the others, started by parallel.py.

    parallel_rank.py ours FD RANK NUM_RANKS
    parallel_rank.py gloo FILE RANK NUM_RANKS

Rank 0 prints JSON: {size in bytes: median of a sum in µs}.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from trtforge.runtime.parallel.communicator import GroupShape
from trtforge.runtime.parallel.memory_communicator import MemoryCommunicator
from trtforge.runtime.parallel.shared_memory import SharedMemory

SIZES_BYTES = (2304, 16384, 262_144, 1 << 20, 1 << 22)
NUM_WARM_UPS = 20


def main() -> None:
    """Measure each size."""
    kind, meeting, rank, num_ranks = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    make = _ours if kind == "ours" else _gloo
    all_reduce = make(meeting, rank, num_ranks)
    medians = {}
    for size in SIZES_BYTES:
        values = np.zeros(size // 4, np.float32)
        times_us = []
        for number in range(NUM_WARM_UPS + (400 if size < 100_000 else 60)):
            started = time.perf_counter()
            all_reduce(values)
            if number >= NUM_WARM_UPS:
                times_us.append(1e6 * (time.perf_counter() - started))
        medians[size] = statistics.median(times_us)
    if rank == 0:
        print(json.dumps(medians), flush=True)


def _ours(meeting: str, rank: int, num_ranks: int) -> Callable[[np.ndarray], None]:
    communicator = MemoryCommunicator(SharedMemory(int(meeting)), GroupShape(num_ranks, 1), rank)
    communicator.barrier()
    return lambda values: communicator.all_reduce(values, values)


def _gloo(meeting: str, rank: int, num_ranks: int) -> Callable[[np.ndarray], None]:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_ranks)
    distributed.barrier()
    return lambda values: distributed.all_reduce(torch.from_numpy(values))


if __name__ == "__main__":
    main()
