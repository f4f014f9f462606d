"""What is in the repository already under the name of a new build."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trtforge.builder.repository import VERSION_FOLDER
from trtforge.errors import ConfigError
from trtforge.manifest import MANIFEST_FILE, Manifest


@dataclass(frozen=True, slots=True)
class ExistingBuild:
    """A model's folder that some version of this package has built."""

    folder: Path
    build_key: str

    def is_intact(self) -> bool:
        """Whether every file is there with its size. Raises ConfigError if another version built it.

        config.pbtxt may have been edited, as operators do to it; it only has to be there.
        """
        version = self.folder / VERSION_FOLDER
        sizes = {version / name: size for name, size in Manifest.load(version).files.items()}
        return (self.folder / "config.pbtxt").is_file() and all(
            path.is_file() and path.stat().st_size == size for path, size in sizes.items()
        )


def find_existing(folder: Path) -> ExistingBuild | None:
    """The build in `folder`; None if there is nothing.

    Raises ConfigError if something else is there: that is never replaced.
    """
    if not folder.exists() and not folder.is_symlink():
        return None
    try:
        manifest = json.loads((folder / VERSION_FOLDER / MANIFEST_FILE).read_text())
        return ExistingBuild(folder, manifest["build_key"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder} was not made by build-engine, so it is never replaced: give another --name or "
            "--output, or move it away"
        ) from None
