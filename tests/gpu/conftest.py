"""What tests on a GPU share: the operators that tests of kernels have."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
