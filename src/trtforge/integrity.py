"""Whether the files of a build are still what was built."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from trtforge.manifest import Manifest

_READ_BYTES = 1 << 20


def file_digest(file: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def damaged_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files of the build whose manifest is in `folder`; reads all of them."""
    for name, size_bytes in manifest.files.items():
        file = folder / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != size_bytes:
            yield f"{file} has {file.stat().st_size:,} bytes, the build wrote {size_bytes:,}"
        elif name in manifest.sha256 and file_digest(file) != manifest.sha256[name]:
            yield f"{file} has other bytes than the build wrote"
