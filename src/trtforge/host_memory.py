"""How much memory a process may still take on the machine that it runs on."""

from __future__ import annotations

from pathlib import Path

from trtforge.errors import ConfigError

_MEMINFO = Path("/proc/meminfo")
# A container's own cgroup, of version 2, is the root of what it sees there.
_CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """What this process may still allocate: memory that the machine has left, or `cgroup` if that is less.

    Files in memory that the system would give up count as left (proc(5), MemAvailable; the kernel's
    documentation of cgroup v2, memory.stat). Raises ConfigError if the system does not say how much there is.
    """
    available = _read_field(_MEMINFO, "MemAvailable:") * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        reclaimable = _read_field(cgroup / "memory.stat", "inactive_file")
    except OSError:
        return available  # not in a cgroup of its own, or version 1
    return available if limit == "max" else min(available, max(int(limit) - used + reclaimable, 0))


def _read_field(path: Path, field: str) -> int:
    """The number behind a name at the beginning of a line."""
    for line in path.read_text().splitlines():
        name, value, *_ = line.split()
        if name == field:
            return int(value)
    raise ConfigError(f"{path} has no {field}: how much memory is free cannot be told on this system")
