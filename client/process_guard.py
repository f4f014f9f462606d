"""Run one command so that it cannot outlive the process that wants it.

    python process_guard.py STOP_TIMEOUT_S SHM_PREFIX WORK_FOLDER COMMAND...

A program of its own, started by `trtforge.client.triton_server`, that uses the standard library only.
Standard input is the lifeline: when it closes, because the owner asks for a stop or is gone however it
died, the command gets SIGTERM and later its whole process group SIGKILL. What the command left in
shared memory is removed. The guard ends with the command's exit status.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

OWNER_POLL_S = 0.1
EXIT_POLL_S = 0.02
REAP_TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def _stop_with_guard() -> None:
    # In the child between fork and exec: safe because the guard has one thread, and armed as long as
    # that thread, so the guard, lives. SIGTERM: only a server that stops in order ends its own processes.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _has_exited(pid: int) -> bool:
    # Not reaped yet: until it is, neither its process id nor its group's can belong to anybody else.
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _wait_for_exit(pid: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not _has_exited(pid) and time.monotonic() < deadline:
        time.sleep(EXIT_POLL_S)


def _reap_orphans() -> None:
    deadline = time.monotonic() + REAP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(EXIT_POLL_S)
        except ChildProcessError:
            return


def run(command: list[str], *, stop_timeout_s: float, shm_prefix: str, work_folder: Path) -> int:
    """Run `command` until it ends or standard input closes; return its exit status as a shell would.

    `work_folder` is removed when the owner left: it may not be there to do so.
    """
    # Handlers, not SIG_IGN, which the command would inherit: only the lifeline ends the guard.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    # Processes that the command leaves behind become the guard's, which reaps them.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_stop_with_guard,
    )
    owner_left = False
    while not owner_left and not _has_exited(process.pid):
        owner_left = bool(select.select([sys.stdin], [], [], OWNER_POLL_S)[0])
    if owner_left:
        os.kill(process.pid, signal.SIGTERM)
        _wait_for_exit(process.pid, stop_timeout_s)
    os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    _reap_orphans()
    for region in Path("/dev/shm").glob(f"{shm_prefix}*"):  # noqa: S108
        region.unlink(missing_ok=True)
    if owner_left:
        shutil.rmtree(work_folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(
        run(
            sys.argv[4:],
            stop_timeout_s=float(sys.argv[1]),
            shm_prefix=sys.argv[2],
            work_folder=Path(sys.argv[3]),
        )
    )
