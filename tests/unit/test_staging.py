"""One build at a time, and what killed ones leave behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trtforge.builder.build import build
from trtforge.builder.options import BuildOptions
from trtforge.builder.staging import staging
from trtforge.errors import CapacityError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_and_kill(target: Path, body: str) -> None:
    """Run `body` in a process that holds `area = staging(target)` and is killed at its end."""
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from trtforge.builder.staging import staging\n"
        "target = Path(sys.argv[1])\n"
        f"with staging(target) as area:\n    {body}\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert ended.returncode == -signal.SIGKILL


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "repository" / "llm"


def test_the_repository_holds_nothing_before_publishing_and_only_the_model_after(
    target: Path, tmp_path: Path
) -> None:
    with staging(target) as area:
        (area.folder / "file").write_text("new")
        assert not target.parent.exists()
        area.publish()
        assert names(target.parent) == ["llm"]
    assert (target / "file").read_text() == "new"
    assert names(tmp_path) == ["repository"]


def test_publishing_replaces_what_was_there(target: Path, tmp_path: Path) -> None:
    target.mkdir(parents=True)
    (target / "old").write_text("")
    with staging(target) as area:
        (area.folder / "new").write_text("")
        area.publish()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["repository"]


def test_a_second_build_of_the_same_folder_is_refused_while_one_runs(target: Path, tmp_path: Path) -> None:
    with staging(target) as area:
        (area.folder / "half").write_text("")
        with pytest.raises(CapacityError, match=f"process {os.getpid()} is building"):
            build(BuildOptions(model="any", output=target.parent))
        assert (area.folder / "half").exists()
        with staging(target.with_name("other")):
            pass
    assert names(tmp_path) == []


def test_a_lock_file_stops_a_build_only_while_it_is_held(target: Path, tmp_path: Path) -> None:
    area = tmp_path / ".llm@repository.build"
    area.mkdir()
    (area / "lock").write_text("12345")
    with (area / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CapacityError, match="process 12345"), staging(target):
            pass
    with staging(target):
        pass
    assert names(tmp_path) == []


def test_what_a_killed_build_left_is_cleaned_up_by_the_next(target: Path, tmp_path: Path) -> None:
    run_and_kill(target, "(area.folder / 'half').write_text('x')")
    assert names(tmp_path) == [".llm@repository.build"]
    with staging(target) as area:
        assert names(area.folder) == []
    assert names(tmp_path) == []


def test_a_replacement_killed_between_its_renames_is_undone(target: Path, tmp_path: Path) -> None:
    target.mkdir(parents=True)
    (target / "file").write_text("old")
    run_and_kill(target, "target.rename(area.old)")
    assert not target.exists()
    with staging(target):
        assert (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["repository"]


def test_a_replacement_that_fails_keeps_the_old_folder(target: Path, tmp_path: Path) -> None:
    target.mkdir(parents=True)
    (target / "file").write_text("old")
    with staging(target) as area:
        area.folder.rmdir()
        with pytest.raises(FileNotFoundError):
            area.publish()
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["repository"]
