"""Real tritonservers for the tests of this folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from google.protobuf import text_format

from trtforge.builder.build import build
from trtforge.builder.options import BuildOptions
from trtforge.builder.repository import triton_config
from trtforge.client.triton_server import Ports, TritonServer

# Tests import what they share from the folders beside this file.
sys.path.append(str(Path(__file__).parent))

CACHE = Path(__file__).parents[2] / ".cache"
ANY_FREE_PORTS = Ports(http=0, grpc=0, metrics=0)


@pytest.fixture(scope="session")
def triton_server() -> Iterator[Callable[[Path], TritonServer]]:
    """`triton_server(repository)`: a server of it that runs until the session ends, one per repository."""
    servers: dict[Path, TritonServer] = {}
    with ExitStack() as stack:

        def start(repository: Path) -> TritonServer:
            if repository not in servers:
                server = TritonServer(repository, ports=ANY_FREE_PORTS, exit_timeout_s=5.0)
                servers[repository] = stack.enter_context(server)
            return servers[repository]

        yield start


@pytest.fixture(scope="session")
def make_sharded_repository(demo_model: Path) -> Callable[[int], Path]:
    """`make_sharded_repository(tp)`: the demo model in float32 on ranks that share its 9 heads, 3 KV heads;
    built again only when what it is built from has changed."""

    def make(tp: int) -> Path:
        output = CACHE / f"repository-float32-tp{tp}"
        options = BuildOptions(model=str(demo_model), output=output, dtype="float32", tp=tp, force=True)
        return build(options).folder.parent

    return make


@pytest.fixture(scope="session")
def make_scripted_repository(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """`make_scripted_repository(start_up="")`: a new repository of the model in scripted_model.py, "llm"."""

    def make(start_up: str = "") -> Path:
        repository = tmp_path_factory.mktemp("scripted")
        version = repository / "llm" / "1"
        version.mkdir(parents=True)
        shutil.copyfile(Path(__file__).with_name("scripted_model.py"), version / "model.py")
        config = triton_config("llm")
        config.parameters["start_up"].string_value = start_up
        (repository / "llm" / "config.pbtxt").write_text(text_format.MessageToString(config))
        return repository

    return make


@pytest.fixture(scope="session")
def scripted_server(
    make_scripted_repository: Callable[..., Path], triton_server: Callable[[Path], TritonServer]
) -> TritonServer:
    """A running server of the scripted model, shared by all tests that leave it alive."""
    return triton_server(make_scripted_repository())
