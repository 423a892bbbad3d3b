"""Compare the planner with counted tensor bytes on any machine, and with `torch.cuda.max_memory_allocated` on a GPU.

Usage: python bench/planner.py [--measure] [--models qwen2.5-0.5b …] [--phases training …] [--json FILE]
Models have random weights of the real shapes; nothing is downloaded. Prints Markdown tables of planned / counted.
With --measure (needs CUDA) each row runs the largest wave and the largest micro-batch of the real trainer once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

from bench.random_model import random_model  # noqa: E402
from grpo_lite.engine.out_of_memory import free_memory, is_out_of_memory  # noqa: E402
from grpo_lite.memory.evaluation import evaluation_phase  # noqa: E402
from grpo_lite.memory.phases import (  # noqa: E402
    WORKSPACE_BYTES,
    Job,
    PhaseBytes,
    rollout_phase,
    trained_parameters,
    training_phase,
)
from grpo_lite.models.config import KNOWN, known_config  # noqa: E402
from grpo_lite.models.shape import read_shape  # noqa: E402
from grpo_lite.recipe.recipe import TINY_MODEL  # noqa: E402

GIB = 1 << 30
LENGTHS = [(200, 256, 4), (200, 512, 8), (400, 1024, 8), (200, 4096, 1)]  # prompt, completion, completions at once
WAVES = [(200, 256, 8), (200, 512, 32), (200, 4096, 8)]
EVALUATIONS = [(200, 256, 64), (600, 64, 16), (200, 4096, 8)]  # prompt, completion, completions at once
SHAPES = KNOWN | {"tiny": known_config(TINY_MODEL) or {}}
PHASES = ("training", "rollout", "evaluation", "plain", "generate")


def job(name: str, prompt: int, completion: int, rows: int, load_in: str, group: int) -> Job:
    """Return the planner's job for a row of the grid."""
    shape = read_shape(SHAPES[name], name)
    return Job(shape, load_in, prompt=prompt, completion=completion, rows=rows, batch=rows, group=group)


def counted(models: list[str], phases: Sequence[str] = PHASES) -> list[dict[str, Any]]:
    """Compare with counted bytes; what cannot be counted there (optimizer, workspace) is left out of the plan."""
    from tests.memory.memory_trace import trace_evaluation, trace_rollout, trace_training
    from tests.memory.plain_trace import trace_generate, trace_plain_training

    records = []
    for name in models:
        config = SHAPES[name]
        if "training" in phases:
            for load_in, (prompt, completion, rows) in itertools.product(("4bit", "16bit"), LENGTHS):
                traced = trace_training(config, prompt, completion, rows, load_in=load_in)
                planned = job(name, prompt, completion, rows, load_in, rows)
                copy = 2 * trained_parameters(planned)  # of the adapter, for decoding
                records.append(row("training", planned, countable(planned, training_phase) - copy, total(traced)))
        if "plain" in phases:
            for prompt, completion, rows in LENGTHS:
                planned = replace(job(name, prompt, completion, rows, "4bit", rows), compute="plain")
                found = total(trace_plain_training(config, prompt, completion, rows))
                records.append(row("plain training", planned, countable(planned, training_phase), found))
        if "rollout" in phases:
            for prompt, completion, rows in WAVES:
                planned = job(name, prompt, completion, rows, "4bit", 8)
                found = trace_rollout(config, prompt, completion, rows, 8)
                records.append(row("rollout", planned, countable(planned, rollout_phase), found))
        if "generate" in phases:
            for prompt, completion, rows in WAVES:
                planned = replace(job(name, prompt, completion, rows, "4bit", 8), rollout="generate")
                found = trace_generate(config, prompt, completion, rows)
                records.append(row("rollout by generate", planned, countable(planned, rollout_phase), found))
        if "evaluation" in phases:
            for prompt, completion, rows in EVALUATIONS:
                planned = job(name, prompt, completion, rows, "4bit", rows)
                planned = replace(planned, eval_rows=rows, eval_completion=completion)
                found = trace_evaluation(config, prompt, completion, rows)
                plan = evaluation_phase(planned).total - WORKSPACE_BYTES
                records.append(row("evaluation", planned, plan, found))
    return records


def countable(planned: Job, phase: Callable[[Job], PhaseBytes]) -> int:
    """Return a planned phase without what cannot be counted: optimizer, workspace."""
    return phase(planned).total - WORKSPACE_BYTES - int(8 * trained_parameters(planned))


def total(traced: Any) -> int:
    """Return a traced micro-batch's peak in bytes."""
    return int(traced.static + max(traced.forward, traced.backward))


def measured(
    models: list[str], device: str, lengths: Sequence[tuple[int, ...]], write: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Compare with the CUDA allocator's peak in a rehearsal of the real trainer; on a CPU only check that it runs.

    `write` gets the records after each row.
    """
    records: list[dict[str, Any]] = []
    for name in models:
        for load_in in ("4bit", "16bit"):
            for prompt, completion, rows in lengths:
                # TRL's smallest group is two: a long completion is one of two micro-batches, and of a wave of two.
                planned = job(name, prompt, completion, rows, load_in, max(rows, 2))
                planned = replace(planned, batch=max(rows, 2))
                where = {"shape": name, "load_in": load_in, "prompt": prompt, "completion": completion, "rows": rows}
                try:
                    rollout, training, seconds = rehearse(planned, SHAPES[name], device)
                except Exception as error:  # one row less is no reason to leave a lent GPU
                    kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
                    said = (str(error).strip().splitlines() or [""])[0]
                    records.append({**where, "error": f"{kind}: {said}", "expected": is_out_of_memory(error)})
                else:
                    without = int(8 * trained_parameters(planned))  # no optimizer yet while the wave is rehearsed
                    records.append(row("rollout", planned, rollout_phase(planned).total - without, rollout))
                    records.append(row("training", planned, training_phase(planned).total, training) | seconds)
                print(json.dumps(records[-1]), flush=True)
                write(records)
    return records


def rehearse(planned: Job, config: dict[str, Any], device: str) -> tuple[int, int, dict[str, float]]:
    """Build a random model on the device and rehearse; returns the peaks of both phases in bytes, and seconds."""
    from peft import LoraConfig

    from grpo_lite.engine.options import EngineOptions
    from grpo_lite.models.load import lora_to_float32
    from grpo_lite.trainer.recovery import Recovery, longest_inputs, rehearse_rollout, rehearse_training
    from grpo_lite.trainer.trainer import PackedGRPOTrainer
    from tests.tiny import parity_reward, tiny_args, tiny_prompts, tiny_tokenizer

    class Measured(Exception):
        """The figures are there, and no step is wanted."""

    class Measuring(Recovery):
        """Measures where the real trainer rehearses: in its first step, everything set up as for training."""

        def rehearse(self, prompt: list[int]) -> None:
            trainer = self.trainer
            assert trainer.support.is_packable(trainer.model), "packed compute is off: see the warning above"
            layers = [module for module in trainer.model.modules() if hasattr(module, "gradient_checkpointing")]
            assert any(layer.gradient_checkpointing for layer in layers), "activations are not checkpointed"
            inputs = longest_inputs(trainer, prompt)
            peaks, seconds = [], {}
            for phase, run in (
                ("rollout", lambda: rehearse_rollout(trainer, prompt)),
                ("training", lambda: rehearse_training(trainer, inputs)),
            ):
                run()  # kernels are compiled and workspaces made the first time
                settle(device)
                begun = time.perf_counter()
                run()
                peaks.append(settle(device))
                seconds[f"{phase}_s"] = round(time.perf_counter() - begun, 3)
            raise Measured(peaks, seconds)

    free_memory()
    rows = max(planned.rows, 2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PackedGRPOTrainer(
            model=random_model(config, planned.load_in, device),
            args=tiny_args(
                folder,
                per_device_train_batch_size=rows,
                num_generations=rows,
                max_completion_length=planned.completion,
                bf16=True,
                use_cpu=device == "cpu",
                gradient_checkpointing=True,
            ),
            reward_funcs=parity_reward,
            train_dataset=tiny_prompts(8),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            options=EngineOptions(tokens_per_microbatch=planned.microbatch_tokens),
        )
        prompt = [5 + i % 200 for i in range(planned.prompt)]
        trainer.recovery = Measuring(trainer, recover=False, rehearsal=prompt)
        lora_to_float32(trainer.model)
        try:
            trainer.train()
        except Measured as done:
            (rollout, training), seconds = done.args
    reserved = torch.cuda.max_memory_reserved() if device == "cuda" else 0
    return rollout, training, {**seconds, "reserved_gib": round(reserved / GIB, 2)}


def settle(device: str) -> int:
    """Wait for the device; return the peak since the last call, in bytes (on a CPU: the process's resident set now)."""
    if device != "cuda":
        return psutil.Process().memory_info().rss
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def row(phase: str, planned: Job, plan: int, found: int) -> dict[str, Any]:
    """Return one comparison."""
    name = next(name for name, config in SHAPES.items() if read_shape(config, name) == planned.shape)
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
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=PHASES, help="of what is counted")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where --measure runs")
    parser.add_argument("--lengths", nargs="*", default=[], metavar="P,C,ROWS", help="of --measure")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.measure and arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--measure needs a CUDA device (--device cpu tries that it runs, and measures nothing)")
    lengths = [tuple(map(int, text.split(","))) for text in arguments.lengths] or LENGTHS

    def write(records: list[dict[str, Any]]) -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(records, indent=1) + "\n")

    records = (
        measured(arguments.models, arguments.device, lengths, write)
        if arguments.measure
        else counted(arguments.models, arguments.phases)
    )
    print(table(records, "measured" if arguments.measure else "counted"))
    device = (
        torch.cuda.get_device_name()
        if arguments.measure and arguments.device == "cuda"
        else platform.machine() + " CPU"
    )
    print(
        ", ".join([device, *(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))])
    )
    write(records)
    if any(not record.get("expected", True) for record in records):
        sys.exit("rows failed that memory does not explain: see above")


if __name__ == "__main__":
    main()
