"""fit_to_budget: what `train --budget` does before a run begins: measure if need be, choose, and say so.

What is chosen goes into the run's recipe and run.json, once. A resumed run takes it from there, so its schedule and the
order of its data stay the same. `limits.max_minutes` holds the time where a step takes longer than was measured.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from grpo_lite.commands import either, hint
from grpo_lite.errors import GRPOLiteError
from grpo_lite.evaluation.probe import probe_base, probe_lines
from grpo_lite.evaluation.statistics import power_line
from grpo_lite.memory.budget import budget_lines, choose
from grpo_lite.memory.times import Times, keep_times, measured_times
from grpo_lite.models.base import Base, weights_bytes
from grpo_lite.models.driver import usable_device
from grpo_lite.models.load import load_tokenizer
from grpo_lite.models.unsloth import uses_unsloth
from grpo_lite.processes import this_process
from grpo_lite.recipe.load import apply_override, build_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.runs.start import fetch_if_new
from grpo_lite.screen import Show
from grpo_lite.task.prompts import Prompts, load_prompts
from grpo_lite.task.traces import load_traces


def fit_to_budget(
    recipe: Recipe, run: RunDir, limit_s: float, given: Collection[str], begun: float, show: Show
) -> tuple[Recipe, dict[str, Any] | None]:
    """Return the recipe with what the budget chooses, and the record for run.json; None: the run has one.

    Args:
        recipe: as the user gave it.
        run: the run directory; one that has begun keeps its numbers.
        limit_s: the budget, in seconds.
        given: keys that the user has set, which win.
        begun: `time.monotonic()` at the start of the command, from where the budget counts.
        show: gets lines for people.

    Raises:
        GRPOLiteError: the budget is too small, or nothing can be planned here.
    """
    fetch_if_new(run, recipe, show)
    record = run.read_run()
    if record.get("budget") or record.get("started_at"):
        return _as_it_began(recipe, record, limit_s, given, show), None
    option = either("BUDGET", "--budget")
    if this_process().world > 1 or uses_unsloth(recipe.model):
        what = "the backend unsloth" if uses_unsloth(recipe.model) else f"GPUS={this_process().world}"
        raise GRPOLiteError(
            f"{option}: is planned for one process and the backend hf, and {what} is given. Set grpo.max_steps "
            f"yourself, and limits.max_minutes={limit_s / 60:g}, which stops in time to evaluate and merge."
        )
    loading = time.monotonic()
    device = usable_device(recipe, show)
    base = Base.resolve(recipe.model, device)
    prompts = load_prompts(recipe, load_tokenizer(base))
    times = _times(recipe, base, prompts, device.name)
    if times is None:
        _measure(recipe, base, prompts, device.name, loading, show)
        times = _times(recipe, base, prompts, device.name)
    if times is None:
        raise GRPOLiteError(
            f"{option}: the speed of this machine was measured, and the cache cannot be read or written. Set "
            "GRPO_LITE_CACHE to a folder that can."
        )
    held_out = recipe.evaluated_rows(len(prompts.eval))
    whole = recipe.schedule.steps(len(prompts.train))
    budget = choose(recipe, times, limit_s, whole, held_out, given, time.monotonic() - begun)
    overrides = [*budget.overrides, *([] if recipe.log.preflight else ["log.preflight=false"])]
    for line in budget_lines(recipe, budget):
        show(line)
    if budget.rows:
        show(power_line(budget.rows))
    return with_overrides(recipe, overrides), budget.to_json()


def _as_it_began(recipe: Recipe, record: dict[str, Any], limit_s: float, given: Collection[str], show: Show) -> Recipe:
    """Return the recipe with the numbers that the run was started with, and the time of this session."""
    chosen = [text for text in (record.get("budget") or {}).get("overrides", []) if not text.startswith("limits.")]
    kept = [text for text in chosen if text.partition("=")[0] not in given]
    limit = [] if "limits.max_minutes" in given else [f"limits.max_minutes={limit_s / 60:g}"]
    what = f"what was chosen stays: {' '.join(kept)}" if kept else "its numbers stay"
    show(f"budget: this run has begun, so {what}; this session pauses training in time (limits.max_minutes)")
    return with_overrides(recipe, [*kept, *limit, *([] if recipe.log.preflight else ["log.preflight=false"])])


def with_overrides(recipe: Recipe, overrides: Collection[str]) -> Recipe:
    """Return a recipe with overrides applied and checked, as if they were given on the line."""
    raw = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(raw, override)
    return build_recipe(raw, recipe.name)


def _times(recipe: Recipe, base: Base, prompts: Prompts, device: str) -> Times | None:
    tokens = None
    if recipe.warmup and recipe.warmup.source != "self" and recipe.warmup.steps is None:
        tokens = round(sum(map(len, load_traces(recipe, prompts).rows)) * (recipe.warmup.epochs or 1))
    return measured_times(recipe, device, weights_bytes(base.weights), tokens, len(prompts.train))


def _measure(recipe: Recipe, base: Base, prompts: Prompts, device: str, loading: float, show: Show) -> None:
    """Sample two rounds as training samples them, compute a micro-step, and keep what that takes.

    Whole rounds, because reading weights takes as long for a few completions as for many.
    """
    schedule = recipe.schedule
    show(
        f"budget: no speed of {recipe.name} is known on {device}, so it is measured now: two rounds of "
        f"{schedule.batch} completions ({hint('probe', recipe=recipe.name)} measures more, once)"
    )
    count, before_s = max(1, schedule.prompts_per_round), time.monotonic() - loading
    probe, loaded_s = probe_base(recipe, base, prompts, count=count, samples=schedule.group)
    for line in probe_lines(probe):
        show(f"probe: {line.strip()}")
    keep_times(recipe, device, {**probe.to_json(), "start_s": before_s + loaded_s})
