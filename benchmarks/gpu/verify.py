"""Proves and measures on this NVIDIA GPU: kernels, operators, a whole model. Writes docs/gpu.md and gpu.json.

Each part runs in a process of its own and has a time limit. Nothing is skipped silently: a part that could
not run is in the report as that, and in the exit code.

Exit codes: 0 every part passed, 1 one failed, 2 wrong option or no GPU, 3 none failed, but one did not run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from gpu.part import Outcome, Table  # noqa: E402
from gpu.report import PartReport, write_report  # noqa: E402

# Name -> module and seconds; in order: what fails early spares the time of what builds on it.
PARTS = {
    "rates": ("rates", 30),
    "kernels": ("compile_kernels", 150),
    "operators": ("check_operators", 120),
    "attention": ("attention", 60),
    "gemm": ("gemm", 90),
    "model": ("model", 120),
    "large-model": ("large_model", 180),
    "tests": ("gpu_tests", 120),
    "sanitizer": ("sanitizer", 120),
    "tensorrt": ("tensorrt_probe", 60),
}
BUDGET_S = 530


def main() -> None:
    """Run the parts and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"all of them by default: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder of a small model, such as SmolLM2-135M"
    )
    parser.add_argument(
        "--bundle", type=Path, help="kernels that were compiled before, see benchmarks/gpu/compile_kernels.py"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of gpu.md and gpu.json")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything (%(default)s)")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - PARTS.keys()
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    try:
        machine = _machine()
    except (ImportError, RuntimeError, AssertionError) as error:
        print(f"error: no NVIDIA GPU that torch can use: {error}", file=sys.stderr)
        sys.exit(2)
    begin = time.monotonic()
    reports = []
    with tempfile.TemporaryDirectory() as work:
        options = ["--bundle", str((arguments.bundle or Path(work) / "bundle").resolve())]
        options += ["--model", str(arguments.model.resolve())] if arguments.model else []
        for name in PARTS:
            compiles = name == "kernels" and not arguments.bundle  # which others need
            if arguments.parts and name not in arguments.parts and not compiles:
                report = PartReport(name, "not run", 0.0, Outcome(facts=["It was not asked for."]))
            else:
                report = _run(name, options, arguments.budget - (time.monotonic() - begin))
            print(f"{name:<10} {report.status:<8} {report.seconds:6.1f} s", flush=True)
            for problem in report.outcome.problems:
                print(f"  {problem}", flush=True)
            reports.append(report)
            write_report(arguments.output, machine, reports)  # what there is, should the rest be cut off
    statuses = {report.status for report in reports}
    sys.exit(1 if "failed" in statuses else 3 if "not run" in statuses else 0)


def _machine() -> dict[str, object]:
    """Card, driver, versions, commit and date."""
    from gpu.machine import machine_dict

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    return machine_dict() | {"date": today, "commit": commit or "unknown"}


def _run(name: str, options: list[str], seconds_left: float) -> PartReport:
    module, limit = PARTS[name]
    if seconds_left < 10:
        return PartReport(name, "not run", 0.0, Outcome(["no time was left"]))
    begin = time.monotonic()
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", f"gpu.{module}", *options, "--outcome", file.name]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=min(limit, seconds_left),
            )
        except subprocess.TimeoutExpired as error:
            problem = f"not finished after {error.timeout:.0f} s"
            return PartReport(name, "failed", time.monotonic() - begin, Outcome([problem]))
        seconds = time.monotonic() - begin
        if done.returncode != 0:
            return PartReport(name, "failed", seconds, Outcome([done.stderr.strip()[-2000:]]))
        content = json.loads(Path(file.name).read_text())
    outcome = Outcome(
        content["problems"],
        [Table(table["title"], tuple(table["columns"]), table["rows"]) for table in content["tables"]],
        content["facts"],
    )
    return PartReport(name, "failed" if outcome.problems else "passed", seconds, outcome)


if __name__ == "__main__":
    main()
