"""An engine that cannot be loaded is refused before anything tries to, with the reason and the remedy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trtforge.engine_file import EngineHost, check_engine
from trtforge.errors import ConfigError
from trtforge.manifest import DimRange, EngineInfo, LayerCache, Manifest, Profile, Rank

CONTENT = bytes(range(256)) * 100
HOST = EngineHost("tensorrt_rtx", "1.7.1.116", "8.9")


@pytest.fixture
def manifest(make_manifest: Callable[..., Manifest], tmp_path: Path) -> Manifest:
    """Of two ranks in `tmp_path`, one with an engine and one without."""
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "model.engine").write_bytes(CONTENT)
    engine = EngineInfo(
        file="rank0/model.engine",
        size_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        package="tensorrt_rtx",
        version="1.7.1.116",
        compute_capabilities=("8.9", "12.0"),
        profiles=(Profile(name="mixed", dims={"T": DimRange(min=1, opt=2, max=3)}),),
    )
    made = make_manifest((LayerCache(num_kv_heads=1, head_dim=8),), vocab_size=128)
    halves = [
        Rank(onnx=f"rank{rank}/model.onnx", kv_layers=made.kv_cache.layers, logits_columns=columns)
        for rank, columns in enumerate([(0, 64), (64, 128)])
    ]
    ranks = (halves[0].model_copy(update={"engine": engine}), halves[1])
    return made.model_copy(update={"runtime": "tensorrt-rtx", "tp_size": 2, "ranks": ranks})


@pytest.mark.parametrize("compute_capability", ["8.9", "12.0"])
def test_an_engine_that_fits_is_found(compute_capability: str, manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    host = EngineHost("tensorrt_rtx", "1.7.1.116", compute_capability)
    assert check_engine(tmp_path, Manifest.load(tmp_path), 0, host) == tmp_path / "rank0" / "model.engine"


@pytest.mark.parametrize(
    ("rank", "host", "said"),
    [
        (2, HOST, r"has 2 ranks, and rank 2 was asked for: .* build-engine --tp 3"),
        (1, HOST, r"rank 1 of .* was built for tensorrt-rtx and has no engine: build it again"),
        (
            0,
            EngineHost("tensorrt", "11.4", "8.9"),
            r"was built by tensorrt_rtx, which tensorrt cannot load: .* --runtime tensorrt$",
        ),
        (
            0,
            EngineHost("tensorrt_rtx", "1.8.0.1", "8.9"),
            r"was built by tensorrt_rtx 1\.7\.1\.116, and 1\.8\.0\.1 is installed.*"
            r"pip install tensorrt_rtx==1\.7\.1\.116, or run the same build-engine",
        ),
        (
            0,
            EngineHost("tensorrt_rtx", "1.7.1.116", "9.0"),
            r"compute capability 8\.9, 12\.0, and this one has 9\.0: .* build-engine --gpu sm_90",
        ),
    ],
    ids=["no such rank", "no engine", "package", "version", "compute capability"],
)
def test_what_does_not_match_is_said(
    rank: int, host: EngineHost, said: str, manifest: Manifest, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_engine(tmp_path, manifest, rank, host)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", r"the engine .*model\.engine is missing: copy it here again, or run the same"),
        ("cut", r"model\.engine has 25599 bytes, and 25600 were built: copy"),
        ("changed", r"model\.engine is not what was built, its sha256 is another one: copy"),
    ],
)
def test_a_damaged_file_is_refused(damage: str, said: str, manifest: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "rank0" / "model.engine"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, len(CONTENT) - 1)
    else:
        file.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(ConfigError, match=said):
        check_engine(tmp_path, manifest, 0, HOST)
