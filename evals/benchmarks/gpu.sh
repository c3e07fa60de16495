#!/usr/bin/env bash
# Everything a machine with a GPU is asked, in one call: are the primitives right there, and what do they cost.
#   usage: evals/benchmarks/gpu.sh [RESULTS_DIR]      (runs on a CPU too, which is how it is tested)
# Needs only torch, transformers and this checkout; installs and fetches nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
results=${1:-evals/benchmarks/results}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
mkdir -p "$results"
"$python" -m patchattn_kernels.check --json "$results/check.json"
"$python" evals/benchmarks/dispatch_overhead.py | tee "$results/dispatch_overhead.json"
"$python" evals/benchmarks/duo_decode.py | tee "$results/duo_decode.json"
