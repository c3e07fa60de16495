#!/usr/bin/env bash
# Everything a machine with a GPU is asked, in one call: are the primitives right there, and what do they cost.
#   usage: evals/benchmarks/gpu.sh [RESULTS_DIR]
# Needs torch, triton, transformers and this checkout; installs and fetches nothing. Peers are timed where they can be
# imported (put flash_sparse_attn on PYTHONPATH, for one). Without a GPU it checks the kernels in Triton's interpreter,
# runs the benchmarks that a CPU can run, and says so. What fails is told at the end, and makes the exit code 1.
set -uo pipefail
cd "$(dirname "$0")/../.."
results=${1:-evals/results/gpu}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
mkdir -p "$results"
failed=()

step() { # name, command...: run it, keep what it prints
  local name=$1 started=$SECONDS
  shift
  echo "== $name"
  "$@" > "$results/$name.out" 2> "$results/$name.err" || failed+=("$name")
  tail -n 3 "$results/$name.out"
  echo "   $((SECONDS - started)) s"
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "NO GPU HERE: nothing below says how fast the Triton kernels are, or that they are right on a GPU."
fi
step check "$python" -m patchattn_kernels.check --json "$results/check.json"
step static "$python" -m patchattn_kernels.check --static --json "$results/static.json"
for benchmark in sink_window grouped routed block_sparse linear longheads_decode duo_decode dispatch_overhead head_search; do
  if [ -f "evals/benchmarks/$benchmark.py" ]; then
    step "$benchmark" "$python" "evals/benchmarks/$benchmark.py"
    mv "$results/$benchmark.out" "$results/$benchmark.json"
  fi
done
find "$results" -name '*.err' -empty -delete
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]} (see $results/NAME.err)"
  exit 1
fi
