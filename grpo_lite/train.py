"""train: the straight line from a recipe to a trained, evaluated and merged model. Reads top to bottom."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

from grpo_lite.errors import NothingToMerge
from grpo_lite.memory.fit import fit_to_device
from grpo_lite.models.config import positions_note
from grpo_lite.models.device import detect_device, peak_memory_bytes
from grpo_lite.models.load import load_tokenizer, load_trained
from grpo_lite.processes import agree, this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.provenance import keep_sums
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show, steadfast
from grpo_lite.session.build import build_trainer, device_line, grpo_config, load_base, make_trainer, record_start
from grpo_lite.session.fit import TrainResult, deadline_of, fit, require_room_for
from grpo_lite.session.preflight import add_preflight
from grpo_lite.session.views import ViewKind, make_view
from grpo_lite.task.check import require_paid_gold
from grpo_lite.task.prompts import Prompts, load_prompts, longest_prompt
from grpo_lite.task.rewards import load_rewards
from grpo_lite.units import now


def train_run(
    recipe: Recipe, run: RunDir, show: Show, view: ViewKind = "plain", begun: float | None = None
) -> TrainResult:
    """Train a recipe in a run directory, then evaluate, merge and report; resume if it was interrupted.

    Args:
        show: called with lines for people.
        view: how training is watched: "plain" lines, a "live" board in a terminal, or one in a "notebook" cell.
        begun: `time.monotonic()` at the start of the command, from where `limits.max_minutes` counts; None: now.

    Raises:
        GRPOLiteError: any fault that is the user's to mend; nothing already saved is lost.
    """
    begun = time.monotonic() if begun is None else begun
    ranks = this_process()
    show = steadfast(show if ranks.is_first else partial(_show_faults, show, ranks.rank + 1))
    with run.locked() if ranks.is_first else nullcontext():
        if recipe.push_checkpoints and ranks.is_first:
            from grpo_lite.runs.remote import fetch_checkpoint

            fetch_checkpoint(run, recipe.push_checkpoints, show)
        state = agree(run.prepare(recipe) if ranks.is_first else None, ranks)
        if state == "report":
            show("the run is finished; its report is made up for")
            return _report(run, TrainResult(run, run.read_run()["steps"]), show)
        recipe = run.with_base_commit(recipe)
        if ranks.is_first:
            keep_sums(run, recipe, state != "new", show)
        device = detect_device()
        show(device_line(recipe, device))
        tokenizer = load_tokenizer(recipe)
        prompts = load_prompts(recipe, tokenizer)
        for note in prompts.notes:
            show(f"data: {note}")
        show(f"data: {len(prompts.train)} training prompts, {len(prompts.eval)} held out")
        if state == "finish" and not ranks.is_first:
            return TrainResult(run, 0)
        if state == "finish":
            show("training had ended; evaluation and merge are made up for")
            result = TrainResult(run, run.read_run()["steps"])
            model = load_trained(recipe, device, run.adapter)
        else:
            rewards, weights = load_rewards(recipe, _columns(prompts), prompts.lead_in)
            if recipe.check.enabled:
                require_paid_gold(recipe, prompts, show)
            longest = longest_prompt(prompts.train, tokenizer, recipe)
            if beyond := positions_note(recipe, len(longest)):
                show(beyond)
            fitted = fit_to_device(recipe, device, len(longest), show)
            args = grpo_config(recipe, run, device, weights, fitted)
            base = load_base(recipe, device, len(longest))
            watched = make_view(view if ranks.is_first else "plain", recipe, show)
            make = partial(make_trainer, recipe, fitted, device, longest)
            trainer = build_trainer(recipe, run, watched, make, base, tokenizer, prompts, rewards, args)
            if ranks.is_first:
                require_room_for(recipe, run, trainer)
                record_start(recipe, run, device, state)
                add_preflight(recipe, run, device, trainer, tokenizer, prompts, watched.show)
            result = fit(run, watched, trainer, deadline_of(recipe, run, show, prompts, begun))
            if result.stopped_by or not ranks.is_first:
                return result
            model = trainer.model
            del trainer, base  # the optimizer's memory
        _evaluate(recipe, run, show, model, prompts)
        del model
        gc.collect()
        _merge(recipe, run, show, prompts)
        run.update_run(
            **{"paused_at" if result.paused else "finished_at": now()}, peak_memory_bytes=peak_memory_bytes(device)
        )
        return _report(run, result, show)


def _report(run: RunDir, result: TrainResult, show: Show) -> TrainResult:
    """Write the report in the first process; `train` again makes up for one that a kill prevented."""
    if this_process().is_first:
        from grpo_lite.report.page import finish_with_report

        finish_with_report(run, show)
    return result


def _show_faults(show: Show, process: int, line: str) -> None:
    """Show what the first process cannot know: that a reward failed in another one."""
    if line.startswith("reward "):
        show(f"process {process}: {line}")


def _evaluate(recipe: Recipe, run: RunDir, show: Show, model: Any, prompts: Prompts) -> None:
    if recipe.eval.enabled:
        from grpo_lite.evaluation.evaluate import evaluate_run

        begun = time.monotonic()
        evaluate_run(run, show, model, prompts)
        run.update_run(evaluation_seconds=round(time.monotonic() - begun, 1))


def _merge(recipe: Recipe, run: RunDir, show: Show, prompts: Prompts) -> None:
    if recipe.merge:
        from grpo_lite.export.stages import merge_and_score

        begun = time.monotonic()
        try:
            merge_and_score(run, show, prompts, overwrite=True)
        except NothingToMerge as error:  # an honest outcome of a short run, not a fault of it
            run.update_run(merge={"skipped": str(error)})
        run.update_run(merge_seconds=round(time.monotonic() - begun, 1))


def _columns(prompts: Prompts) -> list[str]:
    return sorted({key for row in prompts.train for key in row if key != "prompt"})
