"""A run's folder as `train` leaves it, written file by file: recipe, metrics, completions, scores; no model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from grpo_lite.evaluation.evaluate import compare
from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir, dump_recipe

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def write_run(
    folder: Path,
    steps: int = 12,
    group: int = 8,
    solved: tuple[int, ...] = (5, 15),
    overrides: tuple[str, ...] = (),
    also: bool = False,
) -> RunDir:
    """Write a run of sums that learns; of 20 held-out prompts `solved` are right before and after.

    Three numbers of `solved` are those of base, warm and trained: the run had a warm-up.

    Args:
        group: completions a step.
        also: score a further set of rows, where one more is right with each model.
    """
    rng = random.Random(0)
    warmed = len(solved) == 3
    own = ["data.holdout=20", *(["warmup={source: self}"] if warmed else [])]
    recipe = load_recipe(str(ROOT / "recipes" / "smoke.yaml"), [*own, *overrides])
    run = RunDir(folder)
    (run.path / "completions").mkdir(parents=True)
    run.recipe_file.write_text(dump_recipe(recipe))
    lines = [_warmup_metrics(step) for step in range(1, 7)] if warmed else []
    for step in range(1, steps + 1):
        rate = step / steps
        rows = [_row(step, i, rng.random() < rate, rng) for i in range(group)]
        path = run.path / "completions" / f"step_{step:06d}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines.append(_metrics(step, rows))
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _write_evaluation(run, recipe, solved, also)
    if warmed:
        run.update_run(
            warmup={
                "began_at": "2026-01-01T00:00:00Z", "done_at": "2026-01-01T00:00:20Z", "steps": 6, "max_steps": 6,
                "rows": 40, "seconds": 20.0, "loss_first": 2.0, "loss_last": 0.5,
            }
        )  # fmt: skip
    run.update_run(
        steps=steps, seed=42, versions={"torch": "2.13.0", "trl": "1.16.0"}, python="3.11.7", training_seconds=30.0,
        evaluation_seconds=5.0, merge_seconds=3.0, peak_memory_bytes=3 << 30, max_steps=steps, first_step=0,
        device={"kind": "cpu", "name": "a CPU of 2 cores", "memory_bytes": 24 << 30}, merge={"passed": True},
        started_at="2026-01-01T00:00:00Z", trained_at="2026-01-01T00:01:00Z", finished_at="2026-01-01T00:02:00Z",
    )  # fmt: skip
    return run


def _row(step: int, index: int, right: bool, rng: random.Random) -> dict[str, Any]:
    a, b = index % 4 + 1, 3
    text = f"{a + b}" if right else HOSTILE if index == 0 else f"{a + b + rng.randint(1, 9)}, no doubt"
    rewards = {"accuracy_reward": float(right), "soft_overlong_punishment": 0.0}
    prompt = [{"role": "user", "content": f"{a}+{b}="}]
    return {
        "step": step, "prompt": prompt, "completion": text, "rewards": rewards, "reward": float(right),
        "advantage": 0.5, "tokens": 4, "truncated": False, "answer": str(a + b),
    }  # fmt: skip


def _metrics(step: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    mean = sum(row["reward"] for row in rows) / len(rows)
    held = dict.fromkeys(("heldout/lenient", "heldout/strict"), step / 20) if step % 3 == 0 else {}
    return {
        "step": step, "reward": mean, "reward_std": 0.3, "loss": 0.0, "grad_norm": 1.0 + 0.1 * (step % 3),
        "rewards/accuracy_reward/mean": mean, "rewards/soft_overlong_punishment/mean": 0.0,
        "completions/mean_length": 4.0, "completions/min_length": 2.0, "completions/max_length": 6.0,
        "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.25, "entropy": 2.0 - step / 100, "step_time": 2.0,
        "num_tokens": 500.0 * step, "time/rollout_s": 1.0 * step, "time/reward_s": 0.1 * step, "kl": 0.01 * step,
        "time/heldout_s": 0.25 * step, "memory/peak_gib": 2.5, **held,
    }  # fmt: skip


def _warmup_metrics(step: int) -> dict[str, Any]:
    held = {"heldout_loss": 2.5 / step} if step % 3 == 0 else {}
    return {
        "step": step, "stage": "warmup", "loss": 2.0 - 0.3 * (step - 1), "mean_token_accuracy": 0.5 + step / 20,
        "entropy": 1.0, "num_tokens": 400.0 * step, "grad_norm": 1.0, "learning_rate": 1e-3, "step_time": 3.0, **held,
    }  # fmt: skip


def _write_evaluation(run: RunDir, recipe: Any, solved: tuple[int, ...], also: bool) -> None:
    def records(count: int) -> list[dict[str, Any]]:
        return [
            {"lenient": i < count, "strict": i < count, "honest": i < count, "samples_right": int(i < count),
             "truncated": i == 19, "completion": str(i) if i < count else HOSTILE}
            for i in range(20)
        ]  # fmt: skip

    names = ("base", "warm", "trained") if len(solved) == 3 else ("base", "trained")
    columns = {name: records(count) for name, count in zip(names, solved, strict=True)}
    cause = "Warm-up and GRPO together" if len(solved) == 3 else ""
    scores = compare(recipe, columns, cause)
    if also:
        further = {name: records(i + 1) for i, name in enumerate(names)}
        greedy = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"samples": 0})})
        scores["also"] = {"three digits": compare(greedy, further, cause, "three digits")}
    run.scores_file.write_text(json.dumps(scores))
    run.evaluation.mkdir()
    rows = [
        {"prompt": [{"role": "user", "content": f"held out {i}"}], "answer": str(i)}
        | {name: of_column[i] for name, of_column in columns.items()}
        for i in range(20)
    ]
    (run.evaluation / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
