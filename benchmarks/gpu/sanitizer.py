"""The operators' cases again under compute-sanitizer's memcheck, which starts this file with the bundle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from gpu.check_operators import node_of, run
from gpu.part import Outcome, Settings, run_part
from gpu.samples import all_samples

from trtforge.plugins.bundle import Bundle
from trtforge.plugins.launcher import Launcher


def sanitize(settings: Settings) -> Outcome:
    """A problem if the tool is missing or finds something."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Outcome(["compute-sanitizer is not on PATH: memory accesses were not checked"])
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "gpu.sanitizer", "run", str(settings.bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Outcome(facts=["compute-sanitizer's memcheck finds nothing in any case."])
    return Outcome([f"compute-sanitizer ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"])


def run_cases(bundle: Path) -> None:
    """All of them, once."""
    launcher = Launcher(Bundle.load(bundle))
    for sample in all_samples():
        run(sample, node_of(sample, launcher))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run_cases(Path(sys.argv[2]))
    else:
        run_part(__doc__, sanitize)
