"""Runs launches where the CUDA driver is the fake one: a pickled scenario comes in, pickled errors go out.

A scenario has the `bundle`'s folder, `steps` (method of the launcher, arguments) and `threads`, in how many
of which steps run at the same time. There is one error, or None, for every step; where no launcher can be
made, there is that one error.
"""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trtforge.errors import PluginError
from trtforge.plugins.bundle import Bundle
from trtforge.plugins.launcher import Launcher


def main() -> None:
    scenario = pickle.load(sys.stdin.buffer)
    sys.setswitchinterval(1e-6)
    try:
        launcher = Launcher(Bundle.load(scenario["bundle"]))
    except PluginError as refusal:
        pickle.dump([str(refusal)], sys.stdout.buffer)
        return

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
