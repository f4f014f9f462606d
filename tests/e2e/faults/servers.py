"""Real servers that tests break, and how to see that."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from asking import wait_until
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from trtforge.client.streaming import Client, SamplingOptions

TIMEOUT_S = 60
NUM_BLOCKS = 8192
MAX_MODEL_LEN = NUM_BLOCKS * 16
ENDLESS = SamplingOptions(max_tokens=100_000)
TRTFORGE = (sys.executable, "-m", "trtforge")
SHM = Path("/dev/shm")
HANGING_ENGINE = Path(__file__).with_name("hanging_engine.py")
# With the option -X, which nobody reads, the guard knows it for an engine.
USE_HANGING_ENGINE = f"""
import trtforge.runtime.engine.handle
trtforge.runtime.engine.handle.ENGINE_PROGRAM = (
    "-X", "trtforge.runtime.engine.process", {str(HANGING_ENGINE)!r}
)
"""

MakeRepository = Callable[..., Path]


@dataclass
class Served:
    """A running `trtforge serve`."""

    process: subprocess.Popen[str]
    ready_message: str
    repository: Path

    def url(self, name: str) -> str:
        found = re.search(rf"{name} +(\S+)", self.ready_message)
        assert found is not None, self.ready_message
        return found[1]

    def client(self) -> Client:
        return Client(self.url("gRPC"))

    def find(self, what: str) -> psutil.Process:
        """The process with this in its command line: tritonserver, python_backend_stub, engine."""
        descendants = psutil.Process(self.process.pid).children(recursive=True)
        pattern = {"engine": "--model-dir=", "guard": "process_guard"}.get(what, what)
        (found,) = [p for p in descendants if _command(p, what).count(pattern)]
        return found

    def shm_regions(self) -> list[Path]:
        prefix = re.search(r"shm-region-prefix-name=(\S+)", " ".join(self.find("guard").cmdline()))
        assert prefix is not None
        return list(SHM.glob(f"{prefix[1]}*"))

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(self.url("metrics"), timeout=TIMEOUT_S) as page:
            lines = re.findall(r"^trtforge_(\w+)\{.*\} (\S+)$", page.read().decode(), re.MULTILINE)
        return {name: float(value) for name, value in lines}

    def wait_until_idle(self) -> None:
        """Until no request holds anything."""
        idle = {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_free_blocks": NUM_BLOCKS}
        wait_until(lambda: idle.items() <= self.metrics().items())

    def status_of(self, path: str) -> int:
        """HTTP status of a GET; 0 without a server."""
        try:
            with urllib.request.urlopen(self.url("HTTP") + path, timeout=TIMEOUT_S) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


def _command(process: psutil.Process, what: str) -> str:
    try:
        return process.name() if what == "tritonserver" else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@contextmanager
def serving(repository: Path, *options: str) -> Iterator[Served]:
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    process = subprocess.Popen(
        [*TRTFORGE, "serve", str(repository), *ports, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    else:
        raise AssertionError(process.communicate(timeout=TIMEOUT_S))
    try:
        yield Served(process, "".join(lines), repository)
    finally:
        for _ in range(2):
            process.terminate()
            time.sleep(0.1)
        process.communicate(timeout=TIMEOUT_S)


def set_parameters(repository: Path, **parameters: object) -> None:
    path = repository / "llm" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    for name, value in parameters.items():
        config.parameters[name].string_value = str(value)
    path.write_text(text_format.MessageToString(config))


def assert_gone(processes: list[psutil.Process], shm_regions: list[Path]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    assert alive == []
    # The guard removes them, some moments after the last process.
    wait_until(lambda: not any(region.exists() for region in shm_regions))
