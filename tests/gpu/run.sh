#!/usr/bin/env bash
# GPU tests and benchmark within 9 minutes; gpu.json, gpu.md and gpu.log go to $OUT.
# Wants PyTorch with CUDA, Triton, CuPy, safetensors and transformers, and installs nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:?set OUT to the folder for the report}
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "tests/gpu/run.sh: PyTorch sees no CUDA device here" >&2
  exit 1
fi
export PYTHONPATH=$PWD
exec timeout --signal=TERM 538 "$PYTHON" -m loadtest.gpu --out "$OUT" "$@"
