"""build_trainer: everything that one training needs, put together; nothing is trained here.

The trainer is `PackedGRPOTrainer` on a base that transformers loads, or Unsloth's trainer on a base that Unsloth loads.
It gets TRL's arguments, the guarded rewards and the callbacks. A tracker that is not installed is refused first.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from grpo_lite.commands import hint_processes
from grpo_lite.errors import GRPOLiteError
from grpo_lite.memory.fit import Fit
from grpo_lite.models.adapter import load_into
from grpo_lite.models.base import Base
from grpo_lite.models.device import Device
from grpo_lite.models.load import load_model, lora_config, lora_to_float32
from grpo_lite.models.reference import hold_reference
from grpo_lite.models.unsloth import uses_unsloth, with_trl_defaults
from grpo_lite.processes import this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.recipe.schedule import share_of_batch
from grpo_lite.runs.provenance import environment_record
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show
from grpo_lite.session.announce import announce_weights
from grpo_lite.session.fit import require_room_for
from grpo_lite.session.init_from import adapter_to_start_from
from grpo_lite.session.preflight import add_preflight
from grpo_lite.session.views import View, ViewKind, make_view
from grpo_lite.task.guard import GuardedReward, awaited
from grpo_lite.task.prompts import Prompts
from grpo_lite.task.rewards import Reward, checked_reward
from grpo_lite.task.tool_guard import ToolGuard

# A tracker in `grpo.report_to` -> packages, one of which must be installed. Upstream checks its other trackers itself.
TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def device_line(base: Base) -> str:
    """Return one line on the device, and what about it is not used or not possible."""
    device = base.device
    line = f"device: {device.describe()}"
    if device.count > this_process().world:
        line += f"; 1 of {device.count} is used (all: {hint_processes(device.count)})"
    if base.widened:
        line += f"; {base.section.id} overflows in float16 and runs in float32"
    return line


def load_base(base: Base, recipe: Recipe, prompt_tokens: int) -> Any:
    """Return the base to train; the backend unsloth has put the adapter on it already.

    Raises:
        ModelError: it cannot be loaded here.
    """
    if not uses_unsloth(recipe.model):
        return load_model(base)
    import torch

    from grpo_lite.models.unsloth import load_with_unsloth

    longest = prompt_tokens + recipe.max_completion_length
    return load_with_unsloth(recipe, base.weights, longest, getattr(torch, base.dtype))


def make_trainer(
    recipe: Recipe, fit: Fit, device: Device, longest: list[int], show: Callable[[str], None], **arguments: Any
) -> Any:
    """Return the trainer, its adapter in float32.

    Args:
        recipe: the recipe.
        fit: what the plan decided.
        device: where it trains.
        longest: ids of the longest prompt; on CUDA it is rehearsed before the first step.
        show: gets lines for people.
        arguments: of TRL's GRPOTrainer.
    """
    if uses_unsloth(recipe.model):
        from trl import GRPOTrainer

        from grpo_lite.trainer.unsloth import unsloth_trainer

        return unsloth_trainer(GRPOTrainer, recipe.limits.skipped_steps)(**arguments)
    from transformers import set_seed

    from grpo_lite.trainer.trainer import PackedGRPOTrainer

    set_seed(recipe.seed)  # TRL 1.14 makes the adapter before it seeds
    trainer = PackedGRPOTrainer(
        options=fit.options,
        show=show,
        advice=fit.advice,
        recover=recipe.memory.fit,
        rehearsal=longest if recipe.memory.fit and device.kind == "cuda" else None,
        peft_config=lora_config(recipe, arguments["model"]),
        **arguments,
    )
    lora_to_float32(trainer.model)
    return trainer


def require_trackers(report_to: Any, where: str) -> None:
    """Refuse to begin with a tracker that is not installed.

    Args:
        report_to: the recipe's `grpo.report_to`: a name, several, or "none".
        where: the recipe's path, for the message.

    Raises:
        GRPOLiteError: its package is missing.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in names:
        packages = TRACKER_PACKAGES.get(str(name), ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise GRPOLiteError(
                f"{where}: grpo.report_to: {name} is given, and it is not installed. Add the trackers (trackio, "
                "tensorboard, wandb) by `python3 grpo_lite/bootstrap.py .venv trackers`, install it yourself by "
                f"`pip install {packages[0]}`, or leave grpo.report_to out."
            )


def grpo_config(recipe: Recipe, run: RunDir, base: Base, weights: list[float], fitted: Fit | None = None) -> Any:
    """Return TRL's GRPOConfig for a recipe on a device.

    Raises:
        GRPOLiteError: TRL refuses a combination of values.
    """
    from trl import GRPOConfig

    require_trackers(recipe.grpo.get("report_to"), str(run.recipe_file))
    owned = {"output_dir": str(run.path), "reward_weights": weights, **device_arguments(recipe, base)}
    shared = share_of_batch(recipe.grpo, this_process().world)
    try:
        grpo = with_trl_defaults(recipe.grpo) if uses_unsloth(recipe.model) else recipe.grpo
        args = GRPOConfig(**{**grpo, **(fitted.grpo if fitted else {}), **shared, **owned})
    except Exception as error:  # TRL uses some values without checking them first
        reason = f"{type(error).__name__}: {error}"
        raise GRPOLiteError(f"{run.recipe_file}: grpo: TRL refuses these values together: {reason}") from None
    return use_one_device(args)


def device_arguments(recipe: Recipe, base: Base) -> dict[str, Any]:
    """Return the arguments of any trainer that follow from the recipe's seed and the device."""
    return {
        "seed": recipe.seed,
        "bf16": base.dtype == "bfloat16",
        "fp16": base.dtype == "float16",
        "use_cpu": base.device.kind == "cpu",
        "dataloader_pin_memory": base.device.kind == "cuda",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def use_one_device(args: Any) -> Any:
    """Return a trainer's arguments for one card in this process.

    Without a launcher transformers would wrap the model in DataParallel where it sees two (Kaggle's two T4s).
    """
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def build_trainer(
    recipe: Recipe,
    run: RunDir,
    base: Base,
    prompts: Prompts,
    rewards: tuple[list[Reward], list[float]],
    plan: Fit,
    kind: ViewKind,
    state: str | None,
    show: Show,
) -> tuple[Any, View]:
    """Load the base and return the trainer with its callbacks, the adapter in float32, and the view that follows it.

    The first process also checks the disk, records the start and adds the preflight.

    Args:
        recipe, run, base, prompts: of this training.
        rewards: functions and their weights.
        plan: the memory budgets.
        kind: how it is watched.
        state: "new" or "resume"; None: the warm-up in this process has recorded the start.
        show: called with lines for people.

    Raises:
        GRPOLiteError: upstream refuses the values, or the disk is too small.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    from grpo_lite.session.records import MetricsFile

    first = this_process().is_first
    functions, weights = rewards
    view = make_view(kind if first else "plain", recipe, show)
    arguments = grpo_config(recipe, run, base, weights, plan)
    guards = [GuardedReward(reward, recipe.num_generations, recipe.limits, view.show) for reward in functions]
    guarded = [awaited(guard) if getattr(guard.function, "waits", False) else guard for guard in guards]
    rows = Dataset.from_list(fill_a_round(prompts.train, recipe, view.show))
    adapter = adapter_to_start_from(recipe, run, base, view.show)
    announce_weights(base, view.show)
    model = load_base(base, recipe, len(prompts.longest))
    try:
        trainer = make_trainer(
            recipe, plan, base.device, prompts.longest, view.show,
            model=model, args=arguments, reward_funcs=guarded, train_dataset=rows,
            processing_class=prompts.tokenizer, callbacks=[MetricsFile(run)] if first else [],
            **_tool_arguments(recipe, prompts, view.show),
        )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:  # upstream's own refusals
        raise GRPOLiteError(f"{run.recipe_file}: lora or grpo: upstream refuses these values: {error}") from error
    _guard_environment_rewards(trainer, recipe, len(guards), view.show)  # TRL has added them to `guarded`
    if adapter is not None:
        load_into(trainer.model, adapter)
    if recipe.holds_reference:
        hold_reference(trainer.model)
    trainer.remove_callback(PrinterCallback)
    view.latest = trainer.journal.latest_completions
    if first:
        _add_callbacks(recipe, run, trainer, prompts, view)
        require_room_for(recipe, run, base, trainer)
        if state is not None:
            record_start(recipe, run, base, functions, state)
        if adapter is not None and recipe.warmup is None:
            run.update_run(init_from=adapter.to_json())
        add_preflight(recipe, run, base.device, trainer, prompts, view.show)
    return trainer, view


def _tool_arguments(recipe: Recipe, prompts: Prompts, show: Show) -> dict[str, Any]:
    """Return what the trainer gets of the recipe's tools and environments, with their guard."""
    if prompts.toolkit is None:
        return {}
    # TRL warns of each environment_factory that it is experimental; docs/tools-and-environments.md says so.
    warnings.filterwarnings("ignore", message=r"(?s).*'environment_factory'")
    return {**prompts.toolkit.arguments, "guard": ToolGuard(recipe.limits, show)}


def _guard_environment_rewards(trainer: Any, recipe: Recipe, given: int, show: Show) -> None:
    """Guard the rewards that TRL has added for environments with `get_reward`, behind the recipe's own."""
    if recipe.environment is None:
        return
    for i in range(given, len(trainer.reward_funcs)):
        function, name = trainer.reward_funcs[i], f"{trainer.reward_func_names[i]}.get_reward"
        reward = GuardedReward(checked_reward(function, name), recipe.num_generations, recipe.limits, show)
        reward.__name__ = name
        trainer.reward_funcs[i] = reward


def _add_callbacks(recipe: Recipe, run: RunDir, trainer: Any, prompts: Prompts, view: View) -> None:
    from grpo_lite.runs.remote import remote_of
    from grpo_lite.session.heldout import HeldOutScore
    from grpo_lite.session.records import Completions, PushCheckpoints, RunDoctor

    if recipe.eval.every:
        trainer.add_callback(HeldOutScore(recipe, prompts, trainer, view.show))
    trainer.add_callback(view)
    shown_every = recipe.log.sample_every if view.shows_lines else 0
    trainer.add_callback(Completions(run, view.show, shown_every, view.latest))
    trainer.add_callback(RunDoctor(run, recipe, view, view.latest))
    if recipe.push_checkpoints:
        trainer.add_callback(PushCheckpoints(run, remote_of(recipe.push_checkpoints, run), view.show))


def record_start(recipe: Recipe, run: RunDir, base: Base, rewards: list[Reward], state: str) -> None:
    """Write into run.json what a new training starts with, or when it resumed."""
    record = environment_record()
    resumed = [*run.read_run().get("resumed_at", []), record["started_at"]] if state == "resume" else []
    if state == "resume":
        run.update_run(resumed_at=resumed)
    else:
        device = base.device.to_json()
        run.update_run(**record, recipe=recipe.name, seed=recipe.seed, device=device, base_revision=base.commit)
    if any(getattr(reward, "runs_code", False) for reward in rewards):
        from grpo_lite.rewards.sandbox import layers

        weak = any(reward.kwargs.get("allow_weak_isolation") for reward in recipe.rewards)
        available = {layer.name: layer.available for layer in layers()}
        run.update_run(sandbox={"layers": available, "allow_weak_isolation": weak})


def fill_a_round(rows: list[dict[str, Any]], recipe: Recipe, show: Show) -> list[dict[str, Any]]:
    """Repeat the rows until they fill one round of generation; TRL's sampler would silently drop what does not."""
    needed = recipe.schedule.prompts_per_round
    if len(rows) >= needed:
        return rows
    show(f"data: a round takes {needed} prompts and there are {len(rows)}; they are repeated")
    return [rows[i % len(rows)] for i in range(needed)]
