"""The operators' cases again under compute-sanitizer's memcheck."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu.part import Outcome, Settings, run_part

SCRIPT = Path(__file__).with_name("check_operators.py")


def sanitize(settings: Settings) -> Outcome:
    """A problem if the tool is missing or finds something."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Outcome(["compute-sanitizer is not on PATH: memory accesses were not checked"])
    with tempfile.NamedTemporaryFile() as outcome:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(SCRIPT)]
        command += ["--bundle", str(settings.bundle), "--outcome", outcome.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Outcome(facts=["compute-sanitizer's memcheck finds nothing in any case."])
    return Outcome([f"compute-sanitizer ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"])


if __name__ == "__main__":
    run_part(__doc__, sanitize)
