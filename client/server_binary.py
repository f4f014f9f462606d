"""Where a tritonserver comes from: one on PATH, or the one that the nvidia-pytriton wheel carries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from trtforge.errors import ConfigError, ServerError

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A tritonserver. `wheel_folder` is the wheel's folder, None for an installation on PATH."""

    path: Path
    wheel_folder: Path | None = None


def find_tritonserver() -> ServerBinary:
    """The tritonserver on PATH, else the embedded one; raises ServerError if there is neither."""
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return ServerBinary(Path(on_path))
    # Located without importing it: the package's own code is not used.
    spec = importlib.util.find_spec("pytriton")
    for package in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(package) / "tritonserver"
        if (folder / "bin" / "tritonserver").is_file():
            return ServerBinary(folder / "bin" / "tritonserver", folder)
    raise ServerError(
        "no tritonserver: none is on PATH and none is embedded. Install one with "
        "`pip install 'trtforge[server]'` or work inside Triton's image, nvcr.io/nvidia/tritonserver"
    )


def link_python_backend(wheel_folder: Path, backend_folder: Path) -> None:
    """Fill `backend_folder` with the wheel's python backend for the running Python version.

    The server runs whatever stub lies in the backend's folder. Links, not copies: both files find
    their own libraries relative to where they really are. Raises ConfigError for a Python version
    that the wheel has no stub for.
    """
    stubs = wheel_folder / "python_backend_stubs"
    stub = stubs / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        versions = ", ".join(sorted((path.name for path in stubs.iterdir()), key=lambda v: int(v[2:])))
        raise ConfigError(
            f"the embedded tritonserver runs models with Python {versions}, not with {_PYTHON}: "
            "make the environment with one of these versions"
        )
    folder = backend_folder / "python"
    folder.mkdir(parents=True)
    backend = wheel_folder / "backends" / "python"
    for source in (backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stub):
        (folder / source.name).symlink_to(source)


def link_libpython(library_folder: Path) -> None:
    """Fill `library_folder` with this interpreter's shared library, which the stub loads, and nothing else.

    Raises ConfigError if this Python has none.
    """
    name = f"libpython{_PYTHON}.so.1.0"
    base = Path(sys.base_prefix, "lib")
    # LIBDIR is where the interpreter was built to be; relocated ones have it beside themselves, and
    # distributions put it into a folder for the machine's architecture.
    folders = [Path(sysconfig.get_config_var("LIBDIR") or base), base]
    architecture: str = sysconfig.get_config_var("MULTIARCH") or "."
    for folder in [*folders, *(folder / architecture for folder in folders)]:
        if (folder / name).is_file():
            library_folder.mkdir()
            (library_folder / name).symlink_to(folder / name)
            return
    raise ConfigError(
        f"the Python in {sys.base_prefix} has no {name}, which the embedded tritonserver loads: on "
        f"Debian and Ubuntu install libpython{_PYTHON}, elsewhere use a Python built with --enable-shared"
    )


def stub_environment(library_folder: Path) -> dict[str, str]:
    """The environment in which the embedded server's stubs run this interpreter and its packages."""
    environment = dict(os.environ)
    # The stub takes the first python3 on PATH for its own, and so finds this virtual environment.
    environment["PATH"] = _prepend(Path(sys.executable).parent, environment.get("PATH"))
    # Another build of the same version, say the distribution's, would run its own standard library.
    # The folder has only that one library: the interpreter's own may have others that harm the server.
    environment["LD_LIBRARY_PATH"] = _prepend(library_folder, environment.get("LD_LIBRARY_PATH"))
    return environment


def _prepend(folder: Path, search_path: str | None) -> str:
    return f"{folder}{os.pathsep}{search_path}" if search_path else str(folder)
