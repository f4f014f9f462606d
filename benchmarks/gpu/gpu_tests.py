"""The project's tests that need a GPU: launcher, CUDA graphs, executors, TensorRT where it is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gpu.part import Outcome, Settings, run_part

ROOT = Path(__file__).parents[2]
TESTS = ("tests/gpu", "tests/unit/test_executor_conformance.py")
ALL_PASSED = 0


def run_gpu_tests(_: Settings) -> Outcome:
    """Problems are failures and errors; what was skipped is a fact, with its reason."""
    if find_spec("pytest") is None:
        return Outcome(["pytest is not installed: the tests that need a GPU were not run"])
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfEs", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    facts = [f"{line.strip('= ')}." for line in lines[-1:]]
    facts += [f"{line}." for line in lines if line.startswith("SKIPPED")]
    problems = [line for line in lines if re.match("(FAILED|ERROR) ", line)]
    if done.returncode != ALL_PASSED and not problems:
        problems = [f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"]
    return Outcome(problems, facts=facts)


if __name__ == "__main__":
    run_part(__doc__, run_gpu_tests)
