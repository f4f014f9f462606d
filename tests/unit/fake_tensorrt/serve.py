"""Executes steps for a test where CUDA's driver and TensorRT are fake ones.

    serve.py FD

Over the connection FD comes (manifest, model_dir, options), then (method, arguments) as often as wanted; to
each there is an answer, (result, exception). The method "log" gives what was asked of TensorRT so far,
"fail" makes a function of the driver fail.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from trtforge.runtime.executors.create import create_executor
from trtforge.tensorrt_package import PACKAGES, load_package


def attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    manifest, model_dir, options = connection.recv()
    executor, problem = attempt(lambda: create_executor(manifest, model_dir, options))
    modules = {name for name in ("torch", "onnxscript", "transformers") if name in sys.modules}
    connection.send((modules, problem))
    # Not in the thread that has made it, as the engine core does it.
    with ThreadPoolExecutor(1) as pool:
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                return
            if method == "log":
                connection.send((list(load_package(PACKAGES[manifest.runtime]).LOG), None))
            elif method == "fail":
                (os.environ["FAKE_CUDA_FAIL"],) = arguments
                connection.send((None, None))
            else:
                work = pool.submit(attempt, lambda: getattr(executor, method)(*arguments))  # noqa: B023
                connection.send(work.result())


if __name__ == "__main__":
    main()
