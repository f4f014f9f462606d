# Sourced by the other scripts: goes to the checkout's root and keeps the environment in .venv.
# PYTHON: the interpreter to make it with; by default the first fitting one on PATH.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints the Python to make the environment with, or why there is none.
find_python() {
  local candidate problem first_problem=""
  local candidates=(python3 python3.12 python3.11 python3.10)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if problem=$(PYTHONPATH=src "$candidate" -B scripts/check_python.py 2>&1); then
      echo "$candidate"
      return
    fi
    first_problem=${first_problem:-$problem}
  done
  echo "error: $first_problem" >&2
  return 1
}

# Makes .venv if it is not there and installs again when the project's requirements have changed.
ensure_environment() {
  local python wanted stamp=.venv/installed
  wanted="$(sha256sum pyproject.toml) $PWD"
  [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]] || return 0
  if [[ ! -x .venv/bin/pip ]]; then
    python=$(find_python)
    echo "Making .venv with $python"
    "$python" -m venv .venv
  fi
  echo "Installing into .venv; the first time this takes some minutes."
  .venv/bin/python -m pip install -qq --disable-pip-version-check --editable '.[server,dev]'
  echo "$wanted" >"$stamp"
}
