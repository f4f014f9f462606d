"""TensorRT's Python packages, `tensorrt` and `tensorrt_rtx`, imported only when they are wanted, by name.

Their interfaces are one. Engines are built and loaded through what is here.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from trtforge.errors import ConfigError

# By the runtime of a manifest.
PACKAGES: Mapping[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS: Mapping[str, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}

logger = logging.getLogger(__name__)


def load_package(package: str) -> Any:
    """The module; raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:  # of the package itself, or of libraries that it loads
        raise ConfigError(
            f"an engine needs the package {package}, which cannot be imported ({error}): "
            f"pip install 'trtforge[{_EXTRAS[package]}]'"
        ) from error


def with_reasons(headline: str, reasons: Iterable[str]) -> str:
    """The text of an error: what failed, and line by line what TensorRT says about it."""
    return "\n  ".join([f"{headline}:", *reasons])


@functools.cache  # TensorRT keeps the first logger of a process
def package_logger(package: str) -> Any:
    """TensorRT's logger of this process. Its `errors` are the messages of errors, oldest first."""
    trt = load_package(package)
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.INFO,  # errors end up in exceptions
        trt.ILogger.Severity.ERROR: logging.INFO,
        trt.ILogger.Severity.WARNING: logging.INFO,  # mostly about TensorRT's own choices
        trt.ILogger.Severity.INFO: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Passes TensorRT's messages on to `logging`, and remembers errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in levels:
                logger.log(levels[severity], "%s: %s", package, message)
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)

    return Logger()
