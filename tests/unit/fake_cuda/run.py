"""Runs launches where the CUDA driver is the fake one: a pickled scenario comes in, pickled errors go out.

A scenario has `cubins` (kernel -> how to launch it, image), `steps` (method of the launcher, arguments) and
`threads`, in how many of which steps run at the same time. There is one error, or None, for every step.
"""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trtforge.errors import PluginError
from trtforge.plugins.launch import Kernel
from trtforge.plugins.launcher import Launcher


class PickledCubins:
    def __init__(self, cubins: dict[Kernel, tuple[Any, bytes]]) -> None:
        self._cubins = cubins

    def cubin(self, kernel: Kernel, arch: int) -> tuple[Any, bytes]:
        return self._cubins[kernel]


def main() -> None:
    scenario = pickle.load(sys.stdin.buffer)
    sys.setswitchinterval(1e-6)
    launcher = Launcher(PickledCubins(scenario["cubins"]))

    def error(step: tuple[str, tuple[Any, ...]]) -> str | None:
        method, arguments = step
        try:
            getattr(launcher, method)(*arguments)
        except PluginError as refusal:
            return str(refusal)
        return None

    with ThreadPoolExecutor(scenario["threads"]) as pool:
        errors = list(pool.map(error, scenario["steps"]))
    pickle.dump(errors, sys.stdout.buffer)


if __name__ == "__main__":
    main()
