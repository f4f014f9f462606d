"""What calibration needs before any model is loaded: its package, and the texts that a model reads."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import random
from pathlib import Path

from trtforge.errors import ConfigError

MODELOPT = "nvidia-modelopt"
_SEED = 0
# Modules of the standard library with long docstrings.
_MODULES = (
    "argparse",
    "asyncio",
    "collections",
    "datetime",
    "decimal",
    "difflib",
    "email.message",
    "fractions",
    "http.client",
    "json",
    "logging",
    "optparse",
    "pathlib",
    "pickle",
    "random",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "typing",
    "unittest",
    "zipfile",
)
_MIN_LENGTH = 200  # characters


def check_modelopt() -> None:
    """Raises ConfigError if ModelOpt, which calibrates, is not installed."""
    if importlib.util.find_spec("modelopt") is None:
        raise ConfigError(
            f"--calibrate awq and --activations static need the package {MODELOPT}: pip install "
            "'trtforge[quantize]'"
        )


def calibration_texts(file: Path | None) -> list[str]:
    """The lines of `file` that are not empty; without one, docstrings of Python's standard library, in an
    order that a seed decides.

    Raises ConfigError for a file that is not text.
    """
    if file is None:
        return _docstrings()
    try:
        return [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration-text {file} cannot be read: {error}") from None


def texts_digest(texts: list[str]) -> str:
    """Hex sha256 of the texts in their order."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _docstrings() -> list[str]:
    found = set()
    for name in _MODULES:
        module = importlib.import_module(name)
        for member in (module, *vars(module).values()):
            text = inspect.getdoc(member) if inspect.isclass(member) or inspect.ismodule(member) else None
            if text is not None and len(text) >= _MIN_LENGTH:
                found.add(text)
    ordered = sorted(found)
    random.Random(_SEED).shuffle(ordered)  # noqa: S311
    return ordered
