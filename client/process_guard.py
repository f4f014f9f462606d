"""Run one command so that it cannot outlive the process that wants it.

    python process_guard.py DRAIN_TIMEOUT_S SHM_PREFIX WORK_FOLDER COMMAND...

A program of its own, started by `trtforge.client.triton_server`, that uses the standard library only.
Standard input is the lifeline and takes orders. STOP, or its end when the owner is gone however it died:
the command gets SIGTERM and has DRAIN_TIMEOUT_S to finish its requests. Those that are left then fail,
because their engines are ended, and the command can still stop in order. KILL: it ends at once. Nothing
of the command stays behind, neither processes nor shared memory. The guard ends with its exit status.
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

STOP = b"S"
KILL = b"K"
# What a server takes to stop when no request keeps it.
STOP_TIMEOUT_S = 10.0
ENGINE_MODULE = b"trtforge.runtime.engine.process"
# Ends an engine; its client knows from the signal that the time to finish is over.
CUT_OFF_SIGNAL = signal.SIGUSR1

# A server opens its ports a moment before it handles SIGTERM, which until then ends it out of order.
HANDLER_TIMEOUT_S = 0.5

ORDER_POLL_S = 0.02
REAP_TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Lifeline:
    """Standard input, the owner's orders."""

    def __init__(self) -> None:
        self.orders = b""
        self.owner_left = False

    def wait(self, timeout_s: float) -> None:
        """Wait for an order."""
        if self.owner_left:
            time.sleep(timeout_s)
        elif select.select([sys.stdin], [], [], timeout_s)[0]:
            received = os.read(sys.stdin.fileno(), 64)
            self.owner_left = not received
            self.orders += received or STOP


def _stop_with_guard() -> None:
    # In the child between fork and exec: safe because the guard has one thread, and armed as long as
    # that thread, so the guard, lives. SIGTERM: only a server that stops in order ends its own processes.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _has_exited(pid: int) -> bool:
    # Not reaped yet: until it is, neither its process id nor its group's can belong to anybody else.
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _wait_for_exit(pid: int, lifeline: Lifeline, timeout_s: float) -> bool:
    """Whether the process has ended: on its own, or because it was to be killed."""
    deadline = time.monotonic() + timeout_s
    while not _has_exited(pid):
        if KILL in lifeline.orders:
            os.kill(pid, signal.SIGKILL)
        elif time.monotonic() > deadline:
            return False
        lifeline.wait(ORDER_POLL_S)
    return True


def _handles_sigterm(pid: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "SigCgt":
            return bool(int(value, 16) >> (signal.SIGTERM - 1) & 1)
    return True  # a kernel that does not say, such as gVisor


def _stop(pid: int, lifeline: Lifeline, drain_timeout_s: float) -> None:
    deadline = time.monotonic() + HANDLER_TIMEOUT_S
    while not _has_exited(pid) and not _handles_sigterm(pid) and time.monotonic() < deadline:
        lifeline.wait(ORDER_POLL_S)
    os.kill(pid, signal.SIGTERM)
    # Without engines to end, requests that are left would keep the server for ever.
    if not _wait_for_exit(pid, lifeline, drain_timeout_s) and _cut_off_engines(session=pid):
        _wait_for_exit(pid, lifeline, STOP_TIMEOUT_S)


def _cut_off_engines(session: int) -> bool:
    """End the engines among the processes of `session`; whether there were any."""
    found = False
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if ENGINE_MODULE in (folder / "cmdline").read_bytes() and os.getsid(int(folder.name)) == session:
                os.kill(int(folder.name), CUT_OFF_SIGNAL)
                found = True
        except (OSError, ValueError):
            continue  # it has ended meanwhile
    return found


def _reap_adopted(pid: int) -> None:
    """All children that have ended but `pid`: each engine that dies can leave some, while the server runs."""
    while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if ended.si_pid == pid:
            return
        os.waitpid(ended.si_pid, 0)


def _reap_orphans() -> None:
    deadline = time.monotonic() + REAP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(ORDER_POLL_S)
        except ChildProcessError:
            return


def run(command: list[str], *, drain_timeout_s: float, shm_prefix: str, work_folder: Path) -> int:
    """Run `command` until it ends or the owner wants it to; return its exit status as a shell would.

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
    lifeline = Lifeline()
    while not lifeline.orders and not _has_exited(process.pid):
        _reap_adopted(process.pid)
        lifeline.wait(0.1)
    if lifeline.orders:
        _stop(process.pid, lifeline, drain_timeout_s)
    os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    _reap_orphans()
    for region in Path("/dev/shm").glob(f"{shm_prefix}*"):  # noqa: S108
        region.unlink(missing_ok=True)
    if lifeline.owner_left:
        shutil.rmtree(work_folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(
        run(
            sys.argv[4:],
            drain_timeout_s=float(sys.argv[1]),
            shm_prefix=sys.argv[2],
            work_folder=Path(sys.argv[3]),
        )
    )
