"""Engines that were built before, by everything that makes them what they are.

A folder of the user's, shared by all builds:

    KEY/model.engine   the serialized engine
    KEY/engine.json    what it was built from, its facts, size and sha256; its time is that of the last use
    KEY.partial/       an entry that is being written, or was when its builder was killed
    locks/             one lock file for every first byte of a key; they stay
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trtforge.builder.engine_facts import EngineFacts, write_facts
from trtforge.errors import ConfigError
from trtforge.manifest import Profile

ENGINE_FILE = "model.engine"
RECORD_FILE = "engine.json"
DEFAULT_MAX_BYTES = 64 * 2**30
_CHUNK_BYTES = 2**22

logger = logging.getLogger(__name__)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineRecipe(_Frozen):
    """Everything that an engine depends on."""

    graph_sha256: str
    weights_sha256: Mapping[str, str]  # by the name under which the graph refers to the file
    package: str
    version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    workspace_bytes: int | None
    weight_streaming: bool

    @property
    def key(self) -> str:
        """Hex sha256 over all of it."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


class _Record(_Frozen):
    recipe: EngineRecipe
    size_bytes: int
    sha256: str
    facts: EngineFacts


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A serialized engine, and what was known of it before."""

    data: memoryview
    facts: EngineFacts


@dataclass(frozen=True, slots=True)
class WrittenEngine:
    """An engine file that has been written, and its facts beside it. `cached`: it was not built for that."""

    size_bytes: int
    sha256: str
    cached: bool


def default_cache_folder() -> Path:
    """The user's cache folder for engines, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "trtforge" / "engines"


def write_engine(engine: BuiltEngine, file: Path) -> WrittenEngine:
    """Write an engine that was just built."""
    file.write_bytes(engine.data)
    write_facts(engine.facts, file)
    return WrittenEngine(engine.data.nbytes, hashlib.sha256(engine.data).hexdigest(), cached=False)


class EngineCache:
    """Engines on disk, `max_bytes` of them at most: those not used for the longest time are removed."""

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """Raises ConfigError if `folder` cannot be written to."""
        self._folder = folder
        self._max_bytes = max_bytes
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--engine-cache {folder} cannot be used: {error}; give another folder, or none"
            ) from error
        if not os.access(folder / "locks", os.W_OK):
            raise ConfigError(f"--engine-cache {folder} cannot be written to: give another folder, or none")

    def write(self, recipe: EngineRecipe, file: Path, build: Callable[[], BuiltEngine]) -> WrittenEngine:
        """Make `file` the engine of `recipe`: from here, or else from `build`, and then it is kept.

        Of several processes that want the same engine one builds it and the others wait. An entry that is
        not what was stored is removed and built again.
        """
        with self._locked(recipe.key, wait=True):
            entry = self._folder / recipe.key
            found = self._copy(entry, file)
            if found is not None:
                return found
            engine = build()
            written = write_engine(engine, file)
            if written.size_bytes <= self._max_bytes:
                record = _Record(
                    recipe=recipe, size_bytes=written.size_bytes, sha256=written.sha256, facts=engine.facts
                )
                self._store(entry, file, record)
                self._evict(keep=entry)
            return written

    def _copy(self, entry: Path, file: Path) -> WrittenEngine | None:
        """Copy an entry's engine to `file`; None if there is none, or a damaged one, which is removed."""
        if not entry.exists():
            return None
        try:
            record = _Record.model_validate_json((entry / RECORD_FILE).read_text())
            digest = _copy_file(entry / ENGINE_FILE, file)
        except (FileNotFoundError, ValidationError):
            digest = None
        if digest is None or digest != record.sha256:
            logger.warning("the cached engine %s is damaged: it is removed and built again", entry)
            file.unlink(missing_ok=True)
            shutil.rmtree(entry)
            return None
        write_facts(record.facts, file)
        os.utime(entry / RECORD_FILE)
        return WrittenEngine(record.size_bytes, record.sha256, cached=True)

    def _store(self, entry: Path, file: Path, record: _Record) -> None:
        partial = entry.with_suffix(".partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        shutil.copyfile(file, partial / ENGINE_FILE)
        (partial / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n")
        partial.rename(entry)

    def _evict(self, keep: Path) -> None:
        """Remove entries, the one used longest ago first, until the rest fits; busy ones stay."""
        entries = [path for path in self._folder.iterdir() if path.name != "locks" and path.is_dir()]
        sizes = {entry: _size_bytes(entry / ENGINE_FILE) for entry in entries}
        total = sum(sizes.values())
        for entry in sorted(entries, key=_last_use):
            if total <= self._max_bytes:
                return
            if entry == keep:
                continue
            with self._locked(entry.name, wait=False) as owned:
                if owned and entry.exists():
                    shutil.rmtree(entry)
                    total -= sizes[entry]
                    logger.info("removed the cached engine %s, %d bytes", entry, sizes[entry])

    @contextmanager
    def _locked(self, key: str, wait: bool) -> Iterator[bool]:
        """Hold the lock on all keys that begin as `key` does; without `wait` it may be False: not held.

        Lock files are never removed, so that everybody locks the same file.
        """
        with (self._folder / "locks" / key[:2]).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                logger.info("waiting for another process, which may be building the same engine")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield True


def _copy_file(source: Path, target: Path) -> str:
    """Copy a file; the hex sha256 of its content."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()


def _size_bytes(file: Path) -> int:
    """0 for a file that another process has just removed."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _last_use(entry: Path) -> float:
    """Seconds since the epoch; 0 for an entry without a record, which nobody can use."""
    try:
        return (entry / RECORD_FILE).stat().st_mtime
    except FileNotFoundError:
        return 0.0
