"""train: the straight line from a recipe to a trained, evaluated and merged model. Reads top to bottom."""

from __future__ import annotations

import gc
import time
from typing import Any

from grpo_lite.engine.out_of_memory import free_memory
from grpo_lite.errors import NothingToMerge
from grpo_lite.memory.fit import fit_to_device
from grpo_lite.models.base import Base
from grpo_lite.models.device import peak_memory_bytes
from grpo_lite.models.driver import usable_device
from grpo_lite.models.load import load_tokenizer, load_trained
from grpo_lite.processes import this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.runs.start import held_by_first, open_run
from grpo_lite.screen import Show, quiet_on_broken_pipe
from grpo_lite.session.announce import announce_base, announce_data, announce_weights
from grpo_lite.session.build import build_trainer, device_line
from grpo_lite.session.fit import TrainResult, deadline_of, fit
from grpo_lite.session.views import ViewKind, make_view
from grpo_lite.session.warmup import traces_to_learn, warm_up
from grpo_lite.task.check import require_beginnings, require_paid_gold
from grpo_lite.task.prompts import Prompts, load_prompts
from grpo_lite.task.rewards import load_rewards
from grpo_lite.units import now


def train_run(
    recipe: Recipe,
    run: RunDir,
    show: Show,
    view: ViewKind = "plain",
    begun: float | None = None,
    warmup_only: bool = False,
    budget: dict[str, Any] | None = None,
) -> TrainResult:
    """Train a recipe in a run directory, then evaluate, merge and report; resume if it was interrupted.

    Args:
        show: called with lines for people.
        view: how training is watched: "plain" lines, a "live" board in a terminal, or one in a "notebook" cell.
        begun: `time.monotonic()` at the start of the command, from where `limits.max_minutes` counts; None: now.
        warmup_only: stop when the warm-up is complete; `train` continues with GRPO.
        budget: what `--budget` chose; run.json keeps it.

    Raises:
        GRPOLiteError: any fault that the user can fix; nothing already saved is lost.
    """
    begun = time.monotonic() if begun is None else begun
    process = this_process()
    show = quiet_on_broken_pipe(process.shown(show))
    with held_by_first(run):
        state, recipe = open_run(run, recipe, show)
        if budget and process.is_first:
            run.update_run(budget=budget)
        if state in ("finish", "report") and not process.is_first:
            return TrainResult(run, 0)
        if warmup_only and state in ("finish", "report"):
            show("the run's training has ended: there is no warm-up left to run")
            return TrainResult(run, 0)
        if state == "report":
            show("the run is finished; its report is written now")
            return _report(run, TrainResult(run, run.read_run()["steps"]), show)
        device = usable_device(recipe, show)
        announce_base(recipe, show)
        base = Base.resolve(recipe.model, device)
        show(device_line(base))
        announce_data(recipe, show)
        prompts = load_prompts(recipe, load_tokenizer(base))
        for note in (*prompts.notes, f"{len(prompts.train)} training prompts, {len(prompts.eval)} held out"):
            show(f"data: {note}")
        model = None
        if state == "finish":
            show("training has ended; evaluation and merge are done now")
            result = TrainResult(run, run.read_run()["steps"])
        else:
            result, model = _train(recipe, run, base, prompts, state, view, begun, warmup_only, show)
            if result.stopped_by or warmup_only or not process.is_first:
                return result
        if model is None:
            announce_weights(base, show)
            model = load_trained(base, recipe.rollout, run.adapter)
        _evaluate(recipe, run, show, model, prompts)
        peak = peak_memory_bytes(base.device)  # before the merge: its proof takes whatever the GPU has free
        del model
        gc.collect()
        _merge(recipe, run, show, base, prompts)
        ended = {"paused_at" if result.paused else "finished_at": now()}
        run.update_run(**ended, peak_memory_bytes=peak)
        return _report(run, result, show)


def _train(
    recipe: Recipe, run: RunDir, base: Base, prompts: Prompts, state: str, view: ViewKind, begun: float,
    warmup_only: bool, show: Show,
) -> tuple[TrainResult, Any]:  # fmt: skip
    """Train the adapter in one stage or two: supervised where the recipe has a warm-up, then by GRPO.

    Returns:
        How it ended, and the trained model if it is still in memory.
    """
    rewards = load_rewards(recipe, prompts.columns, prompts.lead_in)
    if recipe.check.enabled and recipe.environment is None:
        require_paid_gold(recipe, prompts, show)
    elif recipe.check.enabled:  # an environment scores episodes, not golden texts
        require_beginnings(recipe, prompts)
    if beyond := base.positions_note(recipe, len(prompts.longest)):
        show(beyond)
    traces = traces_to_learn(recipe, run, base, prompts, show)
    plan = fit_to_device(recipe, base, len(prompts.longest), show, traces.longest if traces else None)
    if traces:
        ahead = 0 if warmup_only else recipe.schedule.steps(len(prompts.train))
        board = make_view(view if this_process().is_first else "plain", recipe, show, "warmup", ahead)
        limit = deadline_of(recipe, run, base, show, prompts, begun, traces)
        ended = warm_up(recipe, run, base, prompts, traces, rewards[0], plan, board, state, limit)
        if ended:
            return ended, None
        free_memory()  # its model and optimizer
    if warmup_only:
        return TrainResult(run, 0), None
    recorded = None if traces else state  # the warm-up recorded this start
    trainer, watched = build_trainer(recipe, run, base, prompts, rewards, plan, view, recorded, show)
    result = fit(run, watched, trainer, deadline_of(recipe, run, base, show, prompts, begun))
    return result, trainer.model


def _evaluate(recipe: Recipe, run: RunDir, show: Show, model: Any, prompts: Prompts) -> None:
    if recipe.eval.enabled:
        from grpo_lite.evaluation.evaluate import evaluate_run

        started = time.monotonic()
        evaluate_run(run, show, model, prompts)
        run.update_run(evaluation_seconds=round(time.monotonic() - started, 1))


def _merge(recipe: Recipe, run: RunDir, show: Show, base: Base, prompts: Prompts) -> None:
    if recipe.merge:
        from grpo_lite.export.stages import RunInputs, merge_and_score

        started = time.monotonic()
        try:
            merge_and_score(run, show, RunInputs.loaded(recipe, base, prompts), overwrite=True)
        except NothingToMerge as error:  # an honest outcome of a short run, not a fault of it
            run.update_run(merge={"skipped": str(error)})
        run.update_run(merge_seconds=round(time.monotonic() - started, 1))


def _report(run: RunDir, result: TrainResult, show: Show) -> TrainResult:
    from grpo_lite.report.page import finish_with_report

    finish_with_report(run, show)
    return result
