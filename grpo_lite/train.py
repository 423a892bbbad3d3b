"""train: the straight line from a recipe to a trained, evaluated and merged model. Reads top to bottom."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from grpo_lite.base_model import commit_of, resolve_base
from grpo_lite.budgets import Fit, fit_to_device, longest_prompt
from grpo_lite.data import Prompts, load_prompts
from grpo_lite.engine import device_line, load_base, make_trainer
from grpo_lite.environment import environment_record
from grpo_lite.errors import GRPOLiteError, NothingToMerge, RunDirError
from grpo_lite.fit import TrainResult, deadline_of, fit, require_room_for
from grpo_lite.hardware import Device, detect_device, peak_memory_bytes
from grpo_lite.model import compute_dtype, load_tokenizer, load_trained
from grpo_lite.outside_files import keep_sums
from grpo_lite.positions import positions_note
from grpo_lite.preflight import add_preflight
from grpo_lite.ranks import agree, share_of_batch, this_process
from grpo_lite.recipe import Recipe
from grpo_lite.reward_check import require_paid_gold
from grpo_lite.reward_guard import GuardedReward
from grpo_lite.reward_loader import Reward, load_rewards
from grpo_lite.run_dir import RunDir, now
from grpo_lite.screen import steadfast
from grpo_lite.trackers import require_trackers
from grpo_lite.unsloth_backend import uses_unsloth, with_trl_defaults
from grpo_lite.views import View, ViewKind, make_view

Show = Callable[[str], None]


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
            from grpo_lite.remote_checkpoints import fetch_checkpoint

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
                _record_start(recipe, run, device, state)
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
        from grpo_lite.report import finish_with_report

        finish_with_report(run, show)
    return result


def _show_faults(show: Show, process: int, line: str) -> None:
    """Show what the first process cannot know: that a reward failed in another one."""
    if line.startswith("reward "):
        show(f"process {process}: {line}")


def _evaluate(recipe: Recipe, run: RunDir, show: Show, model: Any, prompts: Prompts) -> None:
    if recipe.eval.enabled:
        from grpo_lite.evaluate import evaluate_run

        begun = time.monotonic()
        evaluate_run(run, show, model, prompts)
        run.update_run(evaluation_seconds=round(time.monotonic() - begun, 1))


def _merge(recipe: Recipe, run: RunDir, show: Show, prompts: Prompts) -> None:
    if recipe.merge:
        from grpo_lite.merge_run import merge_and_score

        begun = time.monotonic()
        try:
            merge_and_score(run, show, prompts, overwrite=True)
        except NothingToMerge as error:  # an honest outcome of a short run, not a fault of it
            run.update_run(merge={"skipped": str(error)})
        run.update_run(merge_seconds=round(time.monotonic() - begun, 1))


def grpo_config(recipe: Recipe, run: RunDir, device: Device, weights: list[float], fitted: Fit | None = None) -> Any:
    """Return TRL's GRPOConfig for a recipe on a device.

    Raises:
        GRPOLiteError: TRL refuses a combination of values.
    """
    from trl import GRPOConfig

    require_trackers(recipe.grpo.get("report_to"), str(run.recipe_file))
    dtype = "float32" if recipe.model.load_in == "32bit" else compute_dtype(recipe.model, device)
    owned: dict[str, Any] = {
        "output_dir": str(run.path),
        "seed": recipe.seed,
        "reward_weights": weights,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": device.kind == "cpu",
        "dataloader_pin_memory": device.kind == "cuda",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    shared = share_of_batch(recipe, this_process().world)
    try:
        grpo = with_trl_defaults(recipe.grpo) if uses_unsloth(recipe.model) else recipe.grpo
        args = GRPOConfig(**{**grpo, **(fitted.grpo if fitted else {}), **shared, **owned})
    except Exception as error:  # upstream looks into some values with no check of its own
        said = f"{type(error).__name__}: {error}"
        raise GRPOLiteError(f"{run.recipe_file}: grpo: TRL refuses these values together: {said}") from None
    if args.n_gpu > 1:  # without a launcher transformers would wrap the model in DataParallel (Kaggle's two T4s)
        args._n_gpu = 1
    return args


def build_trainer(
    recipe: Recipe,
    run: RunDir,
    view: View,
    make: Callable[..., Any],
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    rewards: list[Reward],
    args: Any,
) -> Any:
    """Return the trainer with its callbacks, the adapter in float32."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from grpo_lite.checkpoint_copies import PushCheckpoints
    from grpo_lite.heldout import HeldOutScore
    from grpo_lite.progress import Completions, MetricsFile, RunDoctor
    from grpo_lite.remote_checkpoints import remote_of
    from grpo_lite.trainer_rows import latest_completions

    first = this_process().is_first
    try:
        trainer = make(
            view.show,
            model=model,
            args=args,
            reward_funcs=[
                GuardedReward(reward, recipe.num_generations, recipe.limits, view.show) for reward in rewards
            ],
            train_dataset=Dataset.from_list(_same_keys(fill_a_round(prompts.train, recipe, view.show))),
            processing_class=tokenizer,
            callbacks=[MetricsFile(run)] if first else [],
        )
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:  # upstream's own refusals
        raise GRPOLiteError(f"{run.recipe_file}: lora or grpo: upstream refuses these values: {error}") from error
    trainer.remove_callback(PrinterCallback)
    view.latest = lambda: latest_completions(trainer)
    if not first:
        return trainer
    if recipe.eval.every:
        trainer.add_callback(HeldOutScore(recipe, tokenizer, prompts.eval, trainer, view.show))
    for callback in (
        view,
        Completions(run, view.show, recipe.log.sample_every if view.shows_lines else 0, view.latest),
        RunDoctor(run, recipe, view, view.latest),
    ):
        trainer.add_callback(callback)
    if recipe.push_checkpoints:
        trainer.add_callback(PushCheckpoints(run, remote_of(recipe.push_checkpoints, run), view.show))
    return trainer


def _record_start(recipe: Recipe, run: RunDir, device: Device, state: str) -> None:
    record = environment_record()
    resumed = [*run.read_run().get("resumed_at", []), record["started_at"]] if state == "resume" else []
    if state == "resume":
        run.update_run(resumed_at=resumed)
    else:
        commit = commit_of(resolve_base(recipe.model.id, recipe.model.revision, weights=False))
        run.update_run(**record, recipe=recipe.name, seed=recipe.seed, device=device.to_json(), base_revision=commit)
    if any(reward.function.endswith("unit_test_reward") for reward in recipe.rewards):
        from rewards.sandbox import layers

        weak = any(reward.kwargs.get("allow_weak_isolation") for reward in recipe.rewards)
        found = {layer.name: layer.available for layer in layers()}
        run.update_run(sandbox={"layers": found, "allow_weak_isolation": weak})


def _columns(prompts: Prompts) -> list[str]:
    return sorted({key for row in prompts.train for key in row if key != "prompt"})


def fill_a_round(rows: list[dict[str, Any]], recipe: Recipe, show: Show) -> list[dict[str, Any]]:
    """Repeat the rows until they fill one round of generation; TRL's sampler would silently drop what does not."""
    needed = recipe.generation_batch // recipe.num_generations
    if len(rows) >= needed:
        return rows
    show(f"data: a round takes {needed} prompts and there are {len(rows)}; they are repeated")
    return [rows[i % len(rows)] for i in range(needed)]


def _same_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every row every column: `Dataset.from_list` reads the columns off the first row only."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def require_trained(run: RunDir) -> Recipe:
    """Return the recipe of a run that has been trained.

    Raises:
        RunDirError: it has no adapter yet.
    """
    recipe = run.load_recipe()
    if not (run.adapter / "adapter_config.json").is_file():
        raise RunDirError(f"{run.path}: is not trained yet (no adapter/). Run: make train RUN={run.path}")
    return recipe
