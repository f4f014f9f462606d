"""The soak test in its short form: as much load as fits into less than a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

SOAK = Path(__file__).with_name("soak.py")
MIN_STREAMS = 200  # each place for a stream was used


def test_every_token_is_right_under_load_with_cancellations_and_killed_engines(tmp_path: Path) -> None:
    results = tmp_path / "soak.json"
    command = [sys.executable, str(SOAK), "--time-limit=20", "--kill-interval=6", f"--json={results}"]
    soak = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert soak.returncode == 0, soak.stdout + soak.stderr
    values = {figure["name"]: figure["value"] for figure in json.loads(results.read_text())["figures"]}
    assert values["soak_problems"] == 0
    assert values["soak_streams"] > MIN_STREAMS
    for name in ("completed", "cancelled", "failed_by_kills", "engine_kills"):
        assert values[f"soak_{name}"] > 0, f"no {name}: nothing was tested"
