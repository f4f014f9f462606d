"""The key of a build: equal keys mean the same output, so that nothing has to be built again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import trtforge
from trtforge.builder.plan import BuildPlan

# The packages that shape the graph and the tokenizer's files.
_TOOLS = ("onnx", "onnx-ir", "onnxscript", "tokenizers", "torch", "transformers")
# What of this package ends up in the output, by writing it or as a copy.
_SOURCES = ("builder", "plugins", "model_repository", "engine_options.py", "manifest.py", "wire.py")


def build_key(content_key: str, plan: BuildPlan) -> str:
    """Hex sha256 over the checkpoint's content, the plan, and the versions of everything that builds."""
    # Kernels are part of an engine's build.
    tools = (*_TOOLS, "triton") if plan.runtime == "tensorrt" else _TOOLS
    parts = {
        "content": content_key,
        "plan": {**asdict(plan), "limits": plan.limits.model_dump()},
        "trtforge": trtforge.__version__,
        "sources": sources_digest(Path(trtforge.__file__).parent),
        "tools": {name: metadata.version(name) for name in tools},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sources_digest(package: Path) -> str:
    """Hex sha256 over the files of the package at `package` that shape a build."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        source = package / name
        # The folders are symlinks in a checkout, which rglob does not follow unless resolved first.
        root = source.resolve()
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            relative = path.relative_to(root)
            digest.update(f"{name}/{relative}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
