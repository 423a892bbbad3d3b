#!/usr/bin/env bash
# One go on a machine with an NVIDIA GPU: everything that this project wants to see there, in the order of its worth.
# Usage: bench/gpu_check.sh [OUT_DIR]
# What runs stands in bench/gpu_check.py: the first round needs no model file and about 5 minutes, the second one is run
# if time is left. OUT_DIR (or OUT) gets gpu_check.json, written after each part, and gpu_check.log; runs and random models
# stay in RUNS (runs/gpu_check). Parts that fail, hang or kill the process are named at the end, and the others still run.
# PARTS="smoke-float16 planner …" chooses parts (default: both rounds); SECONDS_LEFT (530) is for all of them together.
# Needs an environment with this project's dependencies (make setup), or PYTHONPATH set to wheels unpacked by hand
# (bench/gpu_bundle.sh). GPU_CHECK_DEVICE=cpu tries the script where there is no GPU, at a tiny size: it measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-runs/gpu_check}}
runs=${RUNS:-runs/gpu_check}
mkdir -p "$out" "$runs"
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

"$python" - <<'PY'
import importlib.util, sys
missing = [name for name in "torch transformers trl peft bitsandbytes datasets accelerate gguf pydantic click yaml psutil scipy".split()
           if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing here: {', '.join(missing)}")
PY
rm -f "$out/gpu_check.json" "$out/gpu_check.log"
for _ in 1 2 3 4 5 6; do # again where a part took the process with it; a finished part is not repeated
  set +e
  "$python" -u bench/gpu_check.py --out "$out" --runs "$runs" --device "${GPU_CHECK_DEVICE:-cuda}" --resume \
    --seconds "${SECONDS_LEFT:-530}" ${PARTS:+--parts $PARTS} 2>&1 | tee -a "$out/gpu_check.log"
  code=${PIPESTATUS[0]}
  set -e
  case $code in 0 | 2 | 3) exit "$code" ;; esac
  [ -e "$out/gpu_check.json" ] || exit "$code" # it did not even begin
done
exit "$code"
