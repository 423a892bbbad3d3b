"""The planner against reality: counted tensor bytes on any machine, `torch.cuda.max_memory_allocated` on a GPU.

Usage: python bench/planner.py [--measure] [--models qwen2.5-0.5b …] [--json FILE]
Models have random weights of the real shapes; nothing is downloaded. Prints Markdown tables of planned over found.
With --measure (needs CUDA) each row runs the largest wave and the largest micro-batch of the real trainer once.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import nn  # noqa: E402

from grpo_lite.memory import (  # noqa: E402
    WORKSPACE_BYTES,
    Job,
    rollout_phase,
    trained_parameters,
    training_phase,
)
from grpo_lite.model_shapes import KNOWN, read_shape  # noqa: E402
from grpo_lite.out_of_memory import is_out_of_memory  # noqa: E402

GIB = 1 << 30
LENGTHS = [(200, 256, 4), (200, 512, 8), (400, 1024, 8), (200, 4096, 1)]  # prompt, completion, completions at once
WAVES = [(200, 256, 8), (200, 512, 32), (200, 4096, 8)]


def job(name: str, prompt: int, completion: int, rows: int, load_in: str, group: int) -> Job:
    """Return the planner's job for a row of the grid."""
    shape = read_shape(KNOWN[name], name)
    return Job(shape, load_in, prompt=prompt, completion=completion, rows=rows, batch=rows, group=group)


def counted(models: list[str]) -> list[dict[str, Any]]:
    """Compare with counted bytes; what cannot be counted there (optimizer, workspace) is left out of the plan."""
    from memory_trace import trace_rollout, trace_training

    records = []
    for name in models:
        for load_in in ("4bit", "16bit"):
            for prompt, completion, rows in LENGTHS:
                traced = trace_training(KNOWN[name], prompt, completion, rows, load_in=load_in)
                planned = job(name, prompt, completion, rows, load_in, rows)
                without = WORKSPACE_BYTES + int(8 * trained_parameters(planned))
                found = traced.static + max(traced.forward, traced.backward)
                records.append(row("training", planned, training_phase(planned).total - without, found))
        for prompt, completion, rows in WAVES:
            planned = job(name, prompt, completion, rows, "4bit", 8)
            without = WORKSPACE_BYTES + int(8 * trained_parameters(planned))
            found = trace_rollout(KNOWN[name], prompt, completion, rows, 8)
            records.append(row("rollout", planned, rollout_phase(planned).total - without, found))
    return records


def measured(models: list[str]) -> list[dict[str, Any]]:
    """Compare with what the CUDA allocator gave out in a rehearsal of the real trainer."""
    records = []
    for name in models:
        for load_in in ("4bit", "16bit"):
            for prompt, completion, rows in LENGTHS:
                planned = job(name, prompt, completion, rows, load_in, max(rows, 2))
                try:
                    rollout, training, seconds = rehearse(planned, KNOWN[name])
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    records.append({"shape": name, "load_in": load_in, "error": str(error).splitlines()[0]})
                    continue
                without = int(8 * trained_parameters(planned))  # no optimizer yet while the wave is rehearsed
                records.append(row("rollout", planned, rollout_phase(planned).total - without, rollout))
                records.append(row("training", planned, training_phase(planned).total, training) | seconds)
                print(json.dumps(records[-2:]), flush=True)
    return records


def rehearse(planned: Job, config: dict[str, Any]) -> tuple[int, int, dict[str, float]]:
    """Build a random model on the GPU and rehearse; returns the peaks of both phases in bytes, and seconds."""
    from tiny import parity_reward, tiny_args, tiny_prompts, tiny_tokenizer

    from grpo_lite.engine_options import EngineOptions
    from grpo_lite.model import lora_to_float32
    from grpo_lite.rehearsal import longest_inputs, rehearse_rollout, rehearse_training
    from grpo_lite.trainer_memory import FittingGRPOTrainer

    gc.collect()
    torch.cuda.empty_cache()
    from peft import LoraConfig

    rows = max(planned.rows, 2)
    args = tiny_args(
        "runs/planner",
        per_device_train_batch_size=rows,
        num_generations=rows,
        max_completion_length=planned.completion,
        bf16=True,
        use_cpu=False,
        gradient_checkpointing=True,
    )
    trainer = FittingGRPOTrainer(
        model=random_model(config, planned.load_in),
        args=args,
        reward_funcs=parity_reward,
        train_dataset=tiny_prompts(8),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        options=EngineOptions(tokens_per_microbatch=planned.microbatch_tokens),
        recover=False,
    )
    lora_to_float32(trainer.model)
    trainer.create_optimizer()
    assert trainer._is_packable(trainer.model), "packed compute is off: see the warning above"
    prompt = [5 + i % 200 for i in range(planned.prompt)]
    peaks, seconds = [], {}
    inputs = longest_inputs(trainer, prompt)
    for phase, run in (
        ("rollout", lambda: rehearse_rollout(trainer, prompt)),
        ("training", lambda: rehearse_training(trainer, inputs)),
    ):
        run()  # kernels are compiled and workspaces made the first time
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds[f"{phase}_s"] = round(time.perf_counter() - begun, 3)
        peaks.append(torch.cuda.max_memory_allocated())
    return peaks[0], peaks[1], {**seconds, "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2)}


def random_model(config: dict[str, Any], load_in: str) -> nn.Module:
    """Return a model of random bfloat16 weights on the GPU, its linear layers in NF4 where asked for."""
    import bitsandbytes as bnb
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16, attn_implementation="sdpa")
    if load_in == "4bit":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                layer = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, module.bias is not None,
                    compute_dtype=torch.bfloat16, quant_type="nf4",
                )  # fmt: skip
                layer.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                layer.bias = module.bias
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], layer.to("cuda"))
        model.is_loaded_in_4bit = True
        model.is_quantized = True
        model.quantization_method = "bitsandbytes"
    return model


def row(phase: str, planned: Job, plan: int, found: int) -> dict[str, Any]:
    """Return one comparison."""
    name = next(name for name, config in KNOWN.items() if read_shape(config, name) == planned.shape)
    return {
        "phase": phase, "shape": name, "load_in": planned.load_in, "prompt": planned.prompt,
        "completion": planned.completion, "rows": planned.rows, "planned_gib": round(plan / GIB, 3),
        "found_gib": round(found / GIB, 3), "ratio": round(plan / found, 4),
    }  # fmt: skip


def table(records: list[dict[str, Any]], how: str) -> str:
    """Return the comparisons as Markdown, the worst ones in the last lines."""
    lines = [f"| phase | shape | base | prompt + completion × rows | planned GiB | {how} GiB | planned / {how} |"]
    lines.append("|---|---|---|---|---|---|---|")
    good = [record for record in records if "ratio" in record]
    for r in good:
        lines.append(
            f"| {r['phase']} | {r['shape']} | {r['load_in']} | {r['prompt']} + {r['completion']} × {r['rows']} "
            f"| {r['planned_gib']:.2f} | {r['found_gib']:.2f} | {r['ratio']:.3f} |"
        )
    lines += [f"| | {r['shape']} | {r['load_in']} | {r['error']} | | | |" for r in records if "error" in r]
    if good:
        ratios = [record["ratio"] for record in good]
        lines.append(f"\n{len(ratios)} rows: planned / {how} {min(ratios):.3f} to {max(ratios):.3f}")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU instead of counting")
    parser.add_argument("--models", nargs="*", default=[f"qwen2.5-{size}b" for size in ("0.5", "1.5", "3", "7")])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.measure and not torch.cuda.is_available():
        parser.error("--measure needs a CUDA device")
    records = measured(arguments.models) if arguments.measure else counted(arguments.models)
    print(table(records, "measured" if arguments.measure else "counted"))
    device = torch.cuda.get_device_name() if arguments.measure else platform.machine() + " CPU"
    print(
        ", ".join([device, *(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))])
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
