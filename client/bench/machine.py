"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import trtforge


def describe_machine() -> dict[str, str | int]:
    """Processor, cores, memory and system of the machine that sends the load."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with + if files differ from it; else None."""
    git = shutil.which("git")
    source = Path(trtforge.__file__).resolve()

    def run(*arguments: str) -> str | None:
        result = subprocess.run(
            [str(git), "-C", str(source.parent), *arguments], capture_output=True, text=True, check=False
        )
        return result.stdout.strip() if result.returncode == 0 else None

    # An environment inside somebody else's checkout is not part of it: this file has to be tracked.
    if git is None or run("ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = run("rev-parse", "--short=12", "HEAD")
    changed = run("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit
