from __future__ import annotations

import os
from pathlib import Path

import pytest

from trtforge.host_memory import available_memory_bytes

MIB = 2**20


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    """As Linux writes one of version 2: 40 MiB are in use, of which 30 MiB are files nobody uses."""
    (tmp_path / "memory.current").write_text(f"{40 * MIB}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon {5 * MIB}\nactive_file {5 * MIB}\ninactive_file {30 * MIB}\n"
    )
    return tmp_path


def test_free_memory_is_some_and_at_most_the_machines(tmp_path: Path) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert MIB < available_memory_bytes() < total
    assert MIB < available_memory_bytes(tmp_path / "no cgroup") < total


@pytest.mark.parametrize(("limit", "left"), [(50 * MIB, 40 * MIB), (10 * MIB, 0), (5 * MIB, 0)])
def test_a_cgroup_s_limit_is_less_than_the_machine_has(cgroup: Path, limit: int, left: int) -> None:
    (cgroup / "memory.max").write_text(f"{limit}\n")
    assert available_memory_bytes(cgroup) == left


@pytest.mark.parametrize("limit", ["max", str(2**60)])
def test_a_cgroup_without_a_limit_or_with_a_high_one_has_what_the_machine_has(
    cgroup: Path, limit: str
) -> None:
    (cgroup / "memory.max").write_text(f"{limit}\n")
    assert available_memory_bytes(cgroup) > 50 * MIB
