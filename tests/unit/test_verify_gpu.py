"""The GPU verification, as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable}


def run_python(program: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'benchmarks')\n{program}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_it_needs_a_gpu_and_says_so() -> None:
    script = ROOT / "scripts" / "verify_gpu.sh"
    done = subprocess.run([script], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr


def test_an_unknown_part_is_refused() -> None:
    script = ROOT / "scripts" / "verify_gpu.sh"
    done = subprocess.run([script, "atention"], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no part atention; there are rates, kernels" in done.stderr


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_every_operator_with_kernels_is_verified_on_every_arch(arch: int) -> None:
    program = f"""
from gpu.attention import ATTENTION_CALLS
from gpu.gemm import GEMM_CALLS
from gpu.samples import all_samples
from trtforge.plugins.graph_calls import kernels_for
from trtforge.plugins.operators import OPERATORS
calls = [(sample.operator, sample.call) for sample in all_samples()]
assert {{name for name, _ in calls}} == {{name for name, op in OPERATORS.items() if op.kernels is not None}}
print(len(kernels_for([*calls, *ATTENTION_CALLS, *GEMM_CALLS], {arch})))
"""
    assert int(run_python(program)) > 100


def test_the_report_holds_what_failed_and_what_did_not_run(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from gpu.part import Outcome, Table
from gpu.report import PartReport, write_report
table = Table("Rates", ("copy, GB/s", "note"), [(1234.567, None)])
reports = [
    PartReport("rates", "passed", 1.0, Outcome(tables=[table])),
    PartReport("gemm", "failed", 2.0, Outcome(problems=["two\\nlines"])),
    PartReport("model", "not run", 0.0, Outcome(facts=["It was not asked for."])),
]
write_report(Path({str(tmp_path)!r}), {{"name": "a card"}}, reports)
"""
    run_python(program)
    text = (tmp_path / "gpu.md").read_text()
    for line in (
        "- name: a card",
        "| gemm | failed | 2 |",
        "    lines",
        "| 1235 |  |",
        "| model | not run | 0 |",
    ):
        assert line in text.splitlines(), line
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["status"] for part in content["parts"]] == ["passed", "failed", "not run"]
    assert content["parts"][0]["outcome"]["tables"][0]["rows"] == [[1234.567, None]]
