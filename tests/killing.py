"""Kill runs at named moments, and compare what they leave with an undisturbed run.

The moments are functions that are wrapped in the process which `tests.command_server` forks, never in the product.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Moment -> the function at whose nth call (`before`, or once it has returned: `after`) the process is killed.
MOMENTS: dict[str, tuple[str, str]] = {
    "rollout": ("grpo_lite.engine.decode:GroupDecoder.__call__", "before"),
    "after rollout": ("grpo_lite.engine.decode:GroupDecoder.__call__", "after"),
    "forward": ("transformers.models.llama.modeling_llama:LlamaModel.forward", "before"),
    "reset": ("grpo_lite.task.tool_guard:ToolGuard.reset", "before"),
    "tool call": (
        "grpo_lite.task.tool_guard:ToolGuard._text",
        "before",
    ),  # the tool has run, and its caller does not know yet
    "between turns": ("grpo_lite.trainer.rollouts:Rollouts.tool_suffix", "before"),
    "reward": ("grpo_lite.task.guard:GuardedReward.__call__", "before"),
    "after reward": ("grpo_lite.task.guard:GuardedReward.__call__", "after"),
    "backward": ("accelerate:Accelerator.backward", "before"),
    "after backward": ("accelerate:Accelerator.backward", "after"),
    "optimizer step": ("accelerate.optimizer:AcceleratedOptimizer.step", "before"),
    "after optimizer step": ("accelerate.optimizer:AcceleratedOptimizer.step", "after"),
    "log line": ("grpo_lite.session.records:MetricsFile.on_log", "after"),
    "checkpoint: weights": ("transformers:Trainer.save_model", "before"),
    "checkpoint: weights written": ("transformers:Trainer.save_model", "after"),
    "checkpoint: tensors": ("torch:save", "before"),
    "checkpoint: tensors written": ("torch:save", "after"),
    "checkpoint: manifest": ("grpo_lite.runs.checkpoints:write_manifest", "before"),
    "checkpoint: flush": ("grpo_lite.files.atomic:sync", "before"),
    "checkpoint: rename": ("grpo_lite.files.atomic:_swap", "before"),
    "checkpoint: renamed": ("grpo_lite.files.atomic:_swap", "after"),
    "checkpoint: older removed": ("grpo_lite.runs.checkpoints:rotate", "before"),
    "warm-up: ended": ("grpo_lite.session.warmup:_finish", "before"),
    "warm-up: adapter": ("grpo_lite.session.warmup:remove", "before"),
    "warm-up: done": ("grpo_lite.train:build_trainer", "before"),
    "adapter": ("grpo_lite.session.fit:save_adapter", "before"),
    "adapter written": ("grpo_lite.session.fit:save_adapter", "after"),
    "run.json": ("grpo_lite.runs.run_dir:RunDir.update_run", "before"),
    "report": ("grpo_lite.report.page:write_report", "before"),
    "evaluation": ("grpo_lite.evaluation.evaluate:score_model", "before"),
    "evaluation: written": ("grpo_lite.evaluation.evaluate:_write_records", "after"),
    "merge: a block": ("grpo_lite.export.merge.merge:ShardWriter._put", "before"),
    "merge: a shard": ("grpo_lite.export.merge.merge:ShardWriter.write", "after"),
    "merge: swap": ("grpo_lite.export.folder:publish", "before"),
    "merge: verify": ("grpo_lite.export.stages:verify_merge", "before"),
}

# Moments of `export --nf4 --gguf q8_0`, after training.
EXPORT_MOMENTS: dict[str, tuple[str, str]] = {
    "nf4: quantised": ("grpo_lite.export.nf4:_quantise", "after"),
    "nf4: manifest": ("grpo_lite.export.nf4:write_manifest", "before"),
    "nf4: in its place": ("grpo_lite.export.stages:export_nf4", "after"),
    "nf4: score": ("grpo_lite.evaluation.evaluate:score_model", "before"),
    "gguf: a tensor": ("grpo_lite.export.gguf.tensors:_encode", "before"),
    "gguf: manifest": ("grpo_lite.export.gguf.file:write_manifest", "before"),
    "gguf: proof": ("grpo_lite.export.stages:_prove", "before"),
    "gguf: record": ("grpo_lite.export.stages:write_atomic", "after"),
    "gguf: recorded": ("grpo_lite.export.stages:update_manifest", "after"),
    "export: flushed": ("grpo_lite.files.atomic:flush", "after"),
    "export: swap": ("grpo_lite.files.atomic:_swap", "before"),
    "export: swapped": ("grpo_lite.files.atomic:_swap", "after"),
    "export: a rename of the swap": ("os:rename", "after"),
}

# Recipe overrides of runs that have every kind of state.
REWARD = f"rewards=[{{function: '{Path(__file__).resolve()}:uneven'}}]"
FAST = ("model.load_in=32bit", "eval.limit=2", "eval.samples=0", "check.enabled=false", "grpo.beta=0.0", REWARD)
ALONE = ("eval.enabled=false", "merge=false")
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "to the merge": ("grpo.max_steps=4", "grpo.save_steps=1"),
    # 12 prompts, 4 a round: a round serves 2 iterations × 2 optimizer steps, 3 rounds an epoch; saves fall inside them
    "reused rounds": (
        "data.train.limit=20", "grpo.num_iterations=2", "grpo.steps_per_generation=4",
        "grpo.gradient_accumulation_steps=2", "grpo.per_device_train_batch_size=4", "grpo.max_steps=14",
        "grpo.save_steps=3", "grpo.logging_steps=2", *ALONE,
    ),
    "later epochs, 4-bit": (
        "data.train.limit=14", "grpo.max_steps=11", "grpo.save_steps=2", "model.load_in=4bit", *ALONE,
    ),
    "refill": (
        "data.train.limit=16", "grpo.max_steps=9", "grpo.save_steps=2", "sampling.refill=2",
        *ALONE,
    ),
    "all at once": (
        "data.train.limit=20", "grpo.num_iterations=2", "grpo.steps_per_generation=4", "sampling.refill=2",
        "grpo.gradient_accumulation_steps=2", "grpo.per_device_train_batch_size=4", "grpo.max_steps=15",
        "grpo.save_steps=3", "grpo.logging_steps=2", *ALONE,
    ),
    "scored on the way": ("grpo.max_steps=5", "grpo.save_steps=2", "eval.every=2", "eval.limit=4", "merge=false"),
    # some seven rows a step; saves in both stages fall between the moments
    "warm-up": (
        "warmup={data: {generator: sums, kwargs: {low: 1, high: 9}}, completion: '{answer}', steps: 5, "
        "learning_rate: 0.001, tokens_per_step: 200}",
        "grpo.beta=0.05", "reference=start", "grpo.max_steps=3", "grpo.save_steps=2", "merge=false",
    ),
    # a model that calls a tool in most turns; rounds are reused, and saves fall inside them
    "environment": (
        "model.id=TOOL_MODEL", "data={train: {path: TOOL_MODEL/rows.jsonl}, format: chat, prompt: '{question}', "
        "answer: null, holdout: 0}", f"environment={Path(__file__).with_name('tool_model.py')}:Ledger",
        "grpo.max_tool_calling_iterations=3", "grpo.max_completion_length=200", "grpo.steps_per_generation=2",
        "grpo.max_steps=7", "grpo.save_steps=3", *ALONE,
    ),
    "plain TRL": (
        "compute=plain", "rollout=generate", "grpo.max_steps=5", "grpo.save_steps=2", "data.train.limit=14", *ALONE,
    ),
}  # fmt: skip


def uneven(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Pay what differs within most groups and not all: there is a gradient, and something to refill."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def train(run: Path, configuration: str, *more: str) -> list[str]:
    """Return the command line of a run."""
    settings = CONFIGURATIONS[configuration]
    if any("TOOL_MODEL" in setting for setting in settings):
        folder = str(_tool_model(run.parent / "tool-model"))
        settings = tuple(setting.replace("TOOL_MODEL", folder) for setting in settings)
    return ["train", "smoke", "--run", str(run), *FAST, *settings, *more]


def _tool_model(folder: Path) -> Path:
    from tests.tool_model import write_tool_model

    return folder if folder.is_dir() else write_tool_model(folder)


def outcome(run: Path) -> dict[str, Any]:
    """Return all of a finished run that has to be equal, bit for bit, however often it was killed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in [key for key in line if key.startswith(("step_time", "time/", "memory/"))]:
            del line[key]  # the clock's and the machine's, not the run's
    completions = {path.name: path.read_text() for path in sorted((run / "completions").glob("*.jsonl"))}
    merged, warm = run / "merged" / "model.safetensors", run / "warmup" / "adapter" / "adapter_model.safetensors"
    return {
        "warm-up: ended": ("grpo_lite.session.warmup:_finish", "before"),
        "warm-up: adapter": ("grpo_lite.session.warmup:remove", "before"),
        "warm-up: done": ("grpo_lite.train:build_trainer", "before"),
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "warm adapter": warm.read_bytes() if warm.is_file() else None,
        "metrics": [json.dumps(line) for line in lines],
        "completions": completions,
        "merged": merged.read_bytes() if merged.is_file() else None,
        "report": (run / "report.html").is_file(),
        "findings": (run / "findings.jsonl").read_text() if (run / "findings.jsonl").is_file() else "",
        "faults": json.loads((run / "run.json").read_text()).get("faults"),
        "strangers": [path.name for path in run.rglob(".*") if path.name != ".lock"],
    }


def export(run: Path) -> list[str]:
    """Return the command line that exports a run in 4 bits and as GGUF."""
    return ["export", str(run), "--nf4", "--gguf", "q8_0"]


def exported(run: Path) -> dict[str, Any]:
    """Return all of an exported run that has to be the same, however often the export was killed."""
    from grpo_lite.files.manifest import verify_manifest

    folders = {name: run / name for name in ("merged", "merged-nf4", "gguf/q8_0")}
    scores = json.loads((run / "metrics.json").read_text())
    record = json.loads((run / "run.json").read_text())
    proof = json.loads((run / "gguf" / "q8_0" / "gguf.json").read_text())["proof"]
    return {
        "files": {
            path.relative_to(run).as_posix(): path.read_bytes()
            for folder in folders.values()
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".gguf") or path.name in ("Modelfile", "config.json", "tokenizer.json")
        },
        "intact": {name: verify_manifest(folder) for name, folder in folders.items()},
        "score": scores["merged_nf4"],
        "loss": record["nf4"]["agreement"],
        "proof": {key: proof[key] for key in ("passed", "faults", "prompts")},
        "strangers": sorted(
            path.name
            for path in (*run.iterdir(), *(run / "gguf").iterdir())
            if path.name.startswith(".replaced-") or path.name.endswith((".partial", ".previous", ".tmp"))
        ),
    }


def kill_at(moment: str, call: int, number: int) -> None:
    """Wrap a moment's function so that its nth call sends this process a signal."""
    target, when = (MOMENTS | EXPORT_MOMENTS)[moment]
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if when == "before" and calls[0] == call:
            os.kill(os.getpid(), number)
        result = function(*args, **kwargs)
        if when == "after" and calls[0] == call:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, wrapped)
