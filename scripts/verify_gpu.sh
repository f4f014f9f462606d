#!/usr/bin/env bash
# Proves and measures on an NVIDIA GPU; needs torch with CUDA, and this project's dependencies or PYTHON with them.
#   scripts/verify_gpu.sh [--help] [PART ...] [--model HF_FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" benchmarks/gpu/verify.py "$@"
