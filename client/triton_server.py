"""Start a tritonserver on a model repository, know when it really answers, and stop it cleanly."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO

from trtforge.client import process_guard
from trtforge.client.protocol import SamplingOptions
from trtforge.client.server_binary import (
    ServerBinary,
    find_tritonserver,
    link_libpython,
    link_python_backend,
    stub_environment,
)
from trtforge.client.streaming import Client
from trtforge.errors import ConfigError, ServerError, TrtforgeError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.pbtxt"
LOG_TAIL_LINES = 20
STDERR_FILENO = 2
POLL_INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ports:
    """The three ports of a server; 0 stands for a free one."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


class TritonServer:
    """A tritonserver that serves every model of `repository`, for use as a context manager.

    Entering starts it and returns when every model has answered a request. Leaving stops it: new requests
    are refused, those in flight have `exit_timeout_s` to finish before they are failed, and neither
    processes nor shared memory stay behind, not even when this process is killed. It may be entered again
    then, with the same ports. The server's log goes to `log_file`, or to standard error with
    `log_to_stderr`, else to a temporary file; its last lines are part of the error when it fails.

    The constructor raises ConfigError for a repository or a port that cannot work. Entering raises
    ServerError when there is no tritonserver, when it ends while starting, or when it does not answer
    within `start_timeout_s`.
    """

    def __init__(
        self,
        repository: Path,
        *,
        host: str = "127.0.0.1",
        ports: Ports = Ports(),
        log_file: Path | None = None,
        log_to_stderr: bool = False,
        start_timeout_s: float = 120.0,
        exit_timeout_s: float = 30.0,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.repository = Path(repository)
        self.models = find_models(self.repository)
        self.host = host
        self._log_file = log_file
        self._log_to_stderr = log_to_stderr
        self._start_timeout_s = start_timeout_s
        self._exit_timeout_s = exit_timeout_s
        self._environment = environment
        self.ports = ports
        self._was_started = False
        self._guard: subprocess.Popen[bytes] | None = None
        self._work_folder = Path()

    @property
    def grpc_url(self) -> str:
        """Where clients on this machine reach the server by gRPC."""
        return f"{self._local_host}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        """Where clients on this machine reach the server by HTTP."""
        return f"http://{self._local_host}:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus metrics are."""
        return f"http://{self._local_host}:{self.ports.metrics}/metrics"

    @property
    def _local_host(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host  # noqa: S104

    def __enter__(self) -> TritonServer:
        self.ports = reserve_ports(self.host, self.ports)
        self._work_folder = Path(tempfile.mkdtemp(prefix="trtforge-server-"))
        try:
            self._launch(find_tritonserver())
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return after `timeout_s`; raises ServerError with the end of its log if the server ends before."""
        if self._guard is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(timeout_s)
        self._check_alive()

    def stop(self) -> None:
        """Stop the server and wait until it is gone; idempotent."""
        if self._guard is not None:
            self._order(process_guard.STOP)
            logger.info("tritonserver ended with status %d", self._guard.wait())
            self._guard = None
        shutil.rmtree(self._work_folder, ignore_errors=True)

    def kill(self) -> None:
        """Have the server end at once, with all its requests, also while `stop` waits for them; does not
        wait. A signal handler may call it."""
        self._order(process_guard.KILL)

    def _order(self, order: bytes) -> None:
        # A guard that has ended takes no orders.
        with contextlib.suppress(BrokenPipeError):
            if self._guard is not None and self._guard.stdin is not None:
                self._guard.stdin.write(order)

    def _check_alive(self) -> None:
        if self._guard is not None and self._guard.poll() is not None:
            raise ServerError(f"tritonserver ended with status {self._guard.returncode}{self._log_tail()}")

    def _launch(self, binary: ServerBinary) -> None:
        # Names this server's regions, so that exactly they can be removed.
        shm_prefix = f"trtforge_{uuid.uuid4().hex[:12]}_"
        command = [str(binary.path), *self._options(shm_prefix)]
        environment = dict(os.environ)
        if binary.wheel_folder is not None:
            backends = self._work_folder / "backends"
            link_python_backend(binary.wheel_folder, backends)
            command.append(f"--backend-directory={backends}")
            link_libpython(self._work_folder / "lib")
            environment = stub_environment(self._work_folder / "lib")
        guard = [sys.executable, "-I", "-S", process_guard.__file__]
        guard += [str(self._exit_timeout_s), shm_prefix, str(self._work_folder)]
        logger.info("starting %s on %s", binary.path, self.repository)
        with self._open_log() as log:
            self._guard = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
                bufsize=0,
                stdout=log,
                stderr=log,
                env={**environment, **self._environment},
                # Ctrl-C in the terminal is for this process alone, which then stops the server.
                start_new_session=True,
            )
        self._was_started = True

    def _options(self, shm_prefix: str) -> list[str]:
        return [
            f"--model-repository={self.repository}",
            *(f"--{name}-address={self.host}" for name in ("http", "grpc", "metrics")),
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            # config.pbtxt is complete: what is missing in it is an error, not to be guessed.
            "--disable-auto-complete-config",
            # The guard's deadlines come first: past its own the server crashes instead of stopping.
            f"--exit-timeout-secs={math.ceil(self._exit_timeout_s + 2 * process_guard.STOP_TIMEOUT_S)}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        ]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        # The server opens its ports when its models are loaded.
        while not self._accepts_connections():
            self._check_alive()
            if time.monotonic() > deadline:
                raise ServerError(
                    f"tritonserver was not up after {self._start_timeout_s:g} s{self._log_tail()}"
                )
            time.sleep(POLL_INTERVAL_S)
        # Readiness says yes even when a model's process is dead: only an answer proves that it answers.
        for model in self.models:
            with Client(self.grpc_url, model) as client:
                timeout_s = max(deadline - time.monotonic(), 1.0)
                try:
                    client.generate("Hello", sampling=SamplingOptions(max_tokens=1), timeout_s=timeout_s)
                except TrtforgeError as error:
                    self._check_alive()
                    raise ServerError(
                        f"model {model!r} failed its first request: {error}{self._log_tail()}"
                    ) from error
        # Whoever answered was this server: one that could not get its ports is gone by now.
        self._check_alive()

    def _accepts_connections(self) -> bool:
        """On all ports: the server opens them one after the other."""
        try:
            for port in (self.ports.grpc, self.ports.http, self.ports.metrics):
                socket.create_connection((self._local_host, port), timeout=1).close()
        except OSError:
            return False
        return True

    def _open_log(self) -> BinaryIO:
        if self._log_to_stderr:
            return os.fdopen(os.dup(STDERR_FILENO), "wb")
        try:
            return self._log_path.open("ab") if self._was_started else self._log_path.open("wb")
        except OSError as error:
            raise ConfigError(f"cannot write the log file {self._log_path}: {error.strerror}") from error

    @property
    def _log_path(self) -> Path:
        return self._log_file or self._work_folder / "server.log"

    def _log_tail(self) -> str:
        if self._log_to_stderr:
            return "; its log is above"
        lines = self._log_path.read_text(errors="replace").splitlines()
        # Not the tables of models and options, which repeat at length what other lines say.
        lines = [line for line in lines if line.strip() and not line.startswith(("+", "|"))]
        return "\n".join(["; the end of its log:", *lines[-LOG_TAIL_LINES:]])


def find_models(repository: Path) -> tuple[str, ...]:
    """Names of the models in a Triton model repository; raises ConfigError if there are none."""
    if not repository.is_dir():
        raise ConfigError(f"model repository {repository} is not a folder: make one with build-engine")
    models = tuple(sorted(path.parent.name for path in repository.glob(f"*/{CONFIG_FILE}")))
    if not models:
        raise ConfigError(
            f"model repository {repository} holds no model, a folder with a {CONFIG_FILE}: "
            "make one with build-engine, and give the folder above the model's"
        )
    return models


def reserve_ports(host: str, ports: Ports) -> Ports:
    """The same ports with zeros replaced by free ones; raises ConfigError if one cannot be listened on."""
    with ExitStack() as stack:
        # All are held until all are known, so that no two are the same.
        found = {}
        for name in ("http", "grpc", "metrics"):
            port = getattr(ports, name)
            listener = stack.enter_context(socket.socket())
            # As servers do: a port that a stopped one held a moment ago is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen()
            except (OSError, OverflowError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                raise ConfigError(
                    f"cannot listen on {host}:{port}: {reason}; choose another port with --{name}-port "
                    "(0 takes a free one) or another address with --host"
                ) from error
            found[name] = listener.getsockname()[1]
        return Ports(**found)
