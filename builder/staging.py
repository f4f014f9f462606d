"""A model's folder appears in the repository whole or not at all.

It is prepared in a hidden folder beside the repository, not inside it: tritonserver takes every folder
of its repository for a model, hidden or not, and does not start if one of them is not a whole model.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from trtforge.errors import CapacityError, ConfigError


@dataclass(frozen=True, slots=True)
class Staging:
    """The only build of `target` that is running. `folder` is empty at first; fill it, then publish."""

    target: Path
    folder: Path
    old: Path  # where what is replaced goes, to be removed

    def flush(self) -> None:
        """Bring what is in `folder` to the disk: the slow part of publishing."""
        for root, _, files in os.walk(self.folder):
            for name in files:
                _sync(Path(root, name))
            _sync(Path(root))

    def publish(self) -> None:
        """Move `folder` to `target`, in place of what is there; durable once this returns.

        Between the two renames of a replacement `target` is missing for a moment; a build killed there is
        undone by the next one.
        """
        # Without it a power failure after the rename could leave whole-looking files of zeros.
        self.flush()
        self.target.parent.mkdir(exist_ok=True)
        if self.target.exists():
            self.target.rename(self.old)
        self.folder.rename(self.target)
        _sync(self.target.parent)
        _sync(self.target.parent.parent)

    def _tidy(self) -> None:
        """Undo a half replacement and remove what was not published."""
        if self.old.exists() and not self.target.exists():
            self.old.rename(self.target)
        for folder in (self.folder, self.old):
            if folder.exists():
                shutil.rmtree(folder)


@contextmanager
def staging(target: Path) -> Iterator[Staging]:
    """Hold the lock on building `target` (REPOSITORY/NAME, absolute); clean up what killed builds left.

    Raises CapacityError at once if another build of `target` is running, ConfigError if nothing can be
    prepared beside the repository.
    """
    repository = target.parent
    _check_place(repository)
    repository.parent.mkdir(parents=True, exist_ok=True)
    area = repository.parent / f".{target.name}@{repository.name}.build"  # no model's name has an @
    with _locked(area):
        result = Staging(target, area / "new", area / "old")
        result._tidy()
        result.folder.mkdir()
        try:
            yield result
        finally:
            result._tidy()


def _check_place(repository: Path) -> None:
    parent = repository.parent
    if parent == repository:
        raise ConfigError("--output / cannot be a model repository: use a folder in it")
    existing = [path for path in (repository, *repository.parents) if path.exists()]
    if not existing[0].is_dir():
        raise ConfigError(f"--output {repository} is not possible: {existing[0]} is not a folder")
    # A rename, which makes the build appear at once, neither crosses filesystems nor copies.
    if repository in existing and repository.stat().st_dev != parent.stat().st_dev:
        problem = f"it is another filesystem than {parent}, where builds are prepared"
    elif not os.access(existing[0], os.W_OK):
        raise ConfigError(f"--output {repository} is not possible: {existing[0]} cannot be written to")
    elif repository in existing and not os.access(parent, os.W_OK):
        problem = f"{parent}, where builds are prepared, cannot be written to"
    else:
        return
    raise ConfigError(
        f"--output {repository} is not possible: {problem}; use a subfolder, such as "
        f"{repository / 'repository'}"
    )


@contextmanager
def _locked(area: Path) -> Iterator[None]:
    """Hold the lock file in `area`; the folder exists only while somebody holds it or was killed."""
    while True:
        area.mkdir(exist_ok=True)
        path = area / "lock"
        try:
            lock = path.open("a+")
        except FileNotFoundError:  # its last holder has just removed the folder
            continue
        with lock:
            _lock(lock, area)
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                try:
                    yield
                finally:
                    path.unlink()
                    with suppress(OSError):  # not empty: the next build has put its own lock there
                        area.rmdir()
                return


def _lock(lock: TextIO, area: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise CapacityError(
            f"process {lock.read().strip() or 'unknown'} is building the same model right now ({area}): wait "
            "for it to end, or give another --name or --output"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
