"""What leads from GPU to GPU, here from process to process: with gloo in the place of NCCL."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trtforge.runtime.parallel.communicator import GroupShape
from trtforge.runtime.parallel.memory_communicator import communicator_bytes
from trtforge.runtime.parallel.shared_memory import SharedMemory

TIMEOUT_S = 120
PROGRAM = """
import sys, torch
from trtforge.runtime.executors.torch_links import DeviceLinks
from trtforge.runtime.parallel.communicator import GroupShape
from trtforge.runtime.parallel.memory_communicator import MemoryCommunicator
from trtforge.runtime.parallel.shared_memory import SharedMemory
fd, rank, tp_size, pp_size = map(int, sys.argv[1:])
communicator = MemoryCommunicator(SharedMemory(fd), GroupShape(tp_size, pp_size), rank, timeout_s=60)
links = DeviceLinks(communicator, torch.device("cpu"), timeout_s=60, backend="gloo")
x = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3) * (rank + 1)
total = links.all_reduce(x)
if not communicator.is_first:
    x = links.receive((2, 3), torch.bfloat16)
if not communicator.is_last:
    links.send(x)
print(total.flatten().tolist(), x.flatten().tolist())
"""


@pytest.mark.parametrize("shape", [GroupShape(2, 1), GroupShape(1, 2)])
def test_ranks_meet_add_up_and_hand_on(shape: GroupShape) -> None:
    _, fd = SharedMemory.create(communicator_bytes(shape))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (fd, rank, shape.tp_size, shape.pp_size))],
            pass_fds=[fd],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    os.close(fd)
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    total = [3 * number for number in first]
    if shape.tp_size == 2:
        assert outputs == [f"{total} {first}\n", f"{total} {second}\n"]
    else:
        assert outputs == [f"{first} {first}\n", f"{second} {first}\n"]
