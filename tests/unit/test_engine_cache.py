"""Engines are kept, found, checked and removed; processes that want the same one build it once."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from trtforge.builder.engine_cache import BuiltEngine, EngineCache, EngineRecipe, default_cache_folder
from trtforge.builder.engine_facts import EngineFacts, EngineLayers, read_facts
from trtforge.errors import ConfigError
from trtforge.manifest import DimRange, Profile

FACTS = EngineFacts(inputs=(), outputs=(), layers=(EngineLayers(type="shuffle", dtype="bfloat16", count=3),))


def recipe(**changes: object) -> EngineRecipe:
    values = {
        "graph_sha256": "00",
        "weights_sha256": {"model.safetensors": "11"},
        "package": "tensorrt_rtx",
        "version": "1.7",
        "compute_capabilities": ("8.9",),
        "profiles": (Profile(name="mixed", dims={"T": DimRange(min=1, opt=2, max=3)}),),
        "workspace_bytes": None,
        "weight_streaming": False,
    }
    return EngineRecipe.model_validate(values | changes)


class Builder:
    """Builds engines of `size` bytes and counts them."""

    def __init__(self, size: int = 1000) -> None:
        self.count = 0
        self._size = size

    def __call__(self) -> BuiltEngine:
        self.count += 1
        return BuiltEngine(memoryview(os.urandom(self._size)), FACTS)


def engines(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"locks"}


def test_the_second_time_an_engine_comes_from_the_cache(tmp_path: Path) -> None:
    builder = Builder()
    first = EngineCache(tmp_path / "new" / "cache").write(recipe(), tmp_path / "a", builder)
    second = EngineCache(tmp_path / "new" / "cache").write(recipe(), tmp_path / "b", builder)
    assert (first.cached, second.cached, builder.count) == (False, True, 1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (first.sha256, first.size_bytes) == (second.sha256, second.size_bytes)
    assert second.size_bytes == 1000
    assert read_facts(tmp_path / "a") == read_facts(tmp_path / "b") == FACTS


@pytest.mark.parametrize(
    "change",
    [
        {"graph_sha256": "01"},
        {"weights_sha256": {"model.safetensors": "12"}},
        {"package": "tensorrt"},
        {"version": "1.8"},
        {"compute_capabilities": ("8.9", "12.0")},
        {"profiles": (Profile(name="mixed", dims={"T": DimRange(min=1, opt=2, max=4)}),)},
        {"workspace_bytes": 1},
        {"weight_streaming": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_engine_of_anything_else_is_another_one(change: dict[str, object], tmp_path: Path) -> None:
    cache, builder = EngineCache(tmp_path / "cache"), Builder()
    cache.write(recipe(), tmp_path / "a", builder)
    assert not cache.write(recipe(**change), tmp_path / "b", builder).cached
    assert builder.count == 2


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "no engine", "no record", "half a record"])
def test_a_damaged_entry_is_built_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, builder = EngineCache(tmp_path / "cache"), Builder()
    cache.write(recipe(), tmp_path / "a", builder)
    entry = tmp_path / "cache" / recipe().key
    if damage == "cut":
        os.truncate(entry / "model.engine", 999)
    elif damage == "flipped bit":
        data = bytearray((entry / "model.engine").read_bytes())
        data[500] ^= 1
        (entry / "model.engine").write_bytes(data)
    elif damage == "no engine":
        (entry / "model.engine").unlink()
    elif damage == "no record":
        (entry / "engine.json").unlink()
    else:
        os.truncate(entry / "engine.json", 20)
    again = cache.write(recipe(), tmp_path / "b", builder)
    assert (again.cached, builder.count) == (False, 2)
    assert f"{entry} is damaged" in caplog.text
    assert cache.write(recipe(), tmp_path / "c", builder).sha256 == again.sha256
    assert (tmp_path / "c").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_engine_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache, builder = EngineCache(tmp_path / "cache", max_bytes=3000), Builder(1000)
    recipes = [recipe(version=str(number)) for number in range(4)]
    assert len({made.key[:2] for made in recipes}) == 4  # none of them holds the lock of another
    for age, made in zip((30, 20, 10), recipes[:3], strict=True):
        cache.write(made, tmp_path / "engine", builder)
        os.utime(tmp_path / "cache" / made.key / "engine.json", (time.time() - age,) * 2)
    assert engines(tmp_path / "cache") == {made.key for made in recipes[:3]}
    assert cache.write(recipes[0], tmp_path / "engine", builder).cached  # used now
    cache.write(recipes[3], tmp_path / "engine", builder)
    assert engines(tmp_path / "cache") == {recipes[number].key for number in (0, 2, 3)}


def test_an_engine_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache", max_bytes=999)
    written = cache.write(recipe(), tmp_path / "engine", Builder(1000))
    assert written.size_bytes == (tmp_path / "engine").stat().st_size == 1000
    assert engines(tmp_path / "cache") == set()


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache", max_bytes=1500)
    for left in (recipe(), recipe(version="other")):
        partial = tmp_path / "cache" / f"{left.key}.partial"
        partial.mkdir()
        (partial / "model.engine").write_bytes(bytes(1000))
    cache.write(recipe(), tmp_path / "engine", Builder(1000))
    assert engines(tmp_path / "cache") == {recipe().key}


def _write_slowly(folder: Path, file: Path, log: Path, building: Event) -> None:
    def build() -> BuiltEngine:
        with log.open("a") as stream:
            stream.write("built\n")
        building.set()
        time.sleep(0.5)  # the other process arrives meanwhile
        return BuiltEngine(memoryview(os.urandom(1000)), FACTS)

    EngineCache(folder).write(recipe(), file, build)


def test_two_processes_build_an_engine_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    building = context.Event()
    files = [tmp_path / "a", tmp_path / "b"]
    arguments = [(tmp_path / "cache", file, tmp_path / "log", building) for file in files]
    processes = [context.Process(target=_write_slowly, args=each) for each in arguments]
    processes[0].start()
    assert building.wait(60)
    processes[1].start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n"
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_place_that_cannot_hold_a_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"--engine-cache .*file cannot be used: .*give another folder, or none"
    ):
        EngineCache(tmp_path / "file")


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_folder() == tmp_path / ".cache" / "trtforge" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert default_cache_folder() == tmp_path / ".cache" / "trtforge" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "trtforge" / "engines"
