"""An engine process whose steps never end, with the interpreter lock held, once a prompt starts with HANG."""

import ctypes

from trtforge.runtime.engine import process as engine_process
from trtforge.runtime.executors.fake_executor import FakeExecutor

HANG = 7

execute = FakeExecutor.execute


def execute_or_hang(self, inputs):
    if ((inputs.input_ids == HANG) & (inputs.position_ids == 0)).any():
        ctypes.PyDLL(None).sleep(3600)
    return execute(self, inputs)


if __name__ == "__main__":
    FakeExecutor.execute = execute_or_hang
    engine_process.main()
