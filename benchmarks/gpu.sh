#!/usr/bin/env bash
# The GPU check in one command: needs torch and this checkout, nothing else.
#
#   benchmarks/gpu.sh                       small, bf16, batch 8, 50 steps; table, JSON in benchmarks/results
#   benchmarks/gpu.sh --model xl --batch 32
#   benchmarks/gpu.sh --device cpu --model tiny --steps 6 --rounds 1     a dry run without a GPU
#
# Exit codes: 0 measured and checked; 1 a check failed; 2 it could not run (no GPU).
set -euo pipefail
cd "$(dirname "$0")/.."
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" benchmarks/gpu.py "$@"
