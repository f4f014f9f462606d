"""The guard with commands that are not a server."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from trtforge.client import process_guard

TIMEOUT_S = 30
# Says when it has started, and only then handles SIGTERM, as tritonserver does.
LATE_HANDLER = """
import signal, sys, time
print("started", flush=True)
time.sleep(0.2)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
time.sleep(60)
"""


# Says which process it has left behind, as an engine that is killed leaves its ranks; that one ends at once.
LEAVES_AN_ORPHAN = """
import subprocess, sys, time
parent = "import subprocess; print(subprocess.Popen(['true']).pid, flush=True)"
subprocess.run([sys.executable, "-c", parent])
time.sleep(60)
"""


@contextmanager
def guarded(program: str, work_folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], bytes]]:
    """The guard of a Python program, and the first line that it prints."""
    guard = [sys.executable, "-I", "-S", process_guard.__file__, "1", "no-regions-of-this-name_"]
    command = [*guard, str(work_folder), sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process, process.stdout.readline()
        process.stdin.write(process_guard.STOP)
        process.stdin.flush()


def test_a_command_that_handles_sigterm_late_stops_in_order(tmp_path: Path) -> None:
    with guarded(LATE_HANDLER, tmp_path) as (process, line):
        assert line == b"started\n"
    assert process.returncode == 7


def test_orphans_are_reaped_while_the_command_runs(tmp_path: Path) -> None:
    with guarded(LEAVES_AN_ORPHAN, tmp_path) as (process, line):
        deadline = time.monotonic() + TIMEOUT_S
        while psutil.pid_exists(int(line)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert process.poll() is None
