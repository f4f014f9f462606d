"""The guard with commands that are not a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_a_command_that_handles_sigterm_late_stops_in_order(tmp_path: Path) -> None:
    guard = [
        sys.executable,
        "-I",
        "-S",
        process_guard.__file__,
        "1",
        "no-regions-of-this-name_",
        str(tmp_path),
    ]
    command = [sys.executable, "-c", LATE_HANDLER]
    with subprocess.Popen([*guard, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        process.stdin.write(process_guard.STOP)
        process.stdin.flush()
        assert process.wait(TIMEOUT_S) == 7
