#!/usr/bin/env bash
# Everything that can be checked without a GPU, on a real tritonserver where a test needs one.
#   scripts/test.sh [PYTEST ARGUMENTS]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_environment
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
.venv/bin/python -m pytest -m "not gpu" "$@"
