"""warm_up: the stage before GRPO, supervised fine-tuning of the adapter that GRPO then trains.

It trains in `warmup/` of the run directory, with checkpoints of its own, and leaves `warmup/adapter`, from which GRPO
starts. That folder is there when the stage is complete and not before, so a run killed anywhere continues where it was:
inside the warm-up, between the stages, or in GRPO.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from grpo_lite.errors import GRPOLiteError, RunDirError, TrainingError
from grpo_lite.evaluation.rejection import read_traces, sample_traces, write_traces
from grpo_lite.files.manifest import fault_in
from grpo_lite.memory.fit import Fit
from grpo_lite.models.adapter import CONFIG_NAME, WEIGHTS_NAME, SavedAdapter, load_into
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_for_sampling, lora_config, lora_to_float32
from grpo_lite.models.unsloth import TRL_DEFAULTS, uses_unsloth
from grpo_lite.processes import agree, this_process
from grpo_lite.recipe.load import read_yaml
from grpo_lite.recipe.recipe import Recipe, WarmupSection
from grpo_lite.report.evidence import read_warmup_steps
from grpo_lite.runs.checkpoints import checkpoint_folders, last_usable, publishing, read_facts, remove, step_of
from grpo_lite.runs.remote import WARMUP, remote_of
from grpo_lite.runs.run_dir import RunDir, fixed_keys
from grpo_lite.screen import Show
from grpo_lite.session.announce import announce_weights
from grpo_lite.session.build import device_arguments, load_base, record_start, use_one_device
from grpo_lite.session.fit import TrainResult, lost_peer, require_room_for, save_adapter, train_to_stop
from grpo_lite.session.init_from import adapter_to_start_from
from grpo_lite.session.records import MetricsFile, PushCheckpoints, WarmupDoctor
from grpo_lite.session.views import View
from grpo_lite.task.prompts import Prompts
from grpo_lite.task.rewards import Reward
from grpo_lite.task.traces import Trace, Traces, earning, earning_lines, load_traces
from grpo_lite.trainer.warmup import BUDGET, Order, order_rows
from grpo_lite.units import now

HELD_SHARE, MOST_HELD, LEAST_ROWS = 0.05, 32, 40  # rows whose loss is only measured; none of fewer than LEAST_ROWS
RISING_SHARE, LEAST_STEPS = 0.05, 40  # of the steps, in which the learning rate rises; none of fewer than LEAST_STEPS
TRACES_FILE = "traces.jsonl"
WAIT_S = 2.0
# Keys of `grpo` that say how any training runs here, so they hold for the warm-up too.
SHARED_KEYS = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
               "gradient_checkpointing", "gradient_checkpointing_kwargs", "save_steps")  # fmt: skip


def is_warm(run: RunDir) -> bool:
    """Return whether the run's warm-up is complete, or behind it because GRPO has saved a checkpoint.

    Raises:
        RunDirError: its adapter is damaged, and GRPO has not begun.
    """
    process = this_process()
    return bool(agree(_is_warm(run) if process.is_first else None, process))


def _is_warm(run: RunDir) -> bool:
    if last_usable(run.path).folder is not None:
        if not run.warm_adapter.is_dir():  # fetched; an earlier step's adapter is not what GRPO began with
            _finish(run, run.read_warmup().get("max_steps"), has_grpo=True)
        return True
    if not run.warm_adapter.is_dir():
        return False
    for folder in checkpoint_folders(run.warmup):  # left by a kill
        remove(folder)
    if fault := fault_in(run.warm_adapter):
        raise RunDirError(
            f"{run.warm_adapter}: the adapter of the warm-up is damaged: {fault}. Remove it to warm up again: "
            f"rm -r {run.warmup}"
        )
    return True


def traces_to_learn(recipe: Recipe, run: RunDir, base: Base, prompts: Prompts, show: Show) -> Traces | None:
    """Return the rows of the warm-up; None where the recipe has none, or it is complete.

    Raises:
        GRPOLiteError: the rows are at fault, none is left, or (source: self) the base solves no prompt.
    """
    if recipe.warmup is None or is_warm(run):
        return None
    if recipe.warmup.source == "data":
        traces = load_traces(recipe, prompts)
    elif recipe.warmup.source == "gold":
        traces = _kept_traces(run, lambda: load_traces(recipe, prompts))
    else:
        traces = _own_traces(recipe, run, base, prompts, show)
    for note in (*traces.notes, f"{len(traces.rows)} rows"):
        show(f"warm-up: {note}")
    earned = earning(recipe, prompts, traces)
    for line in earning_lines(earned, traces):
        show(f"warm-up: {line}")
    if this_process().is_first:
        note_warmup(run, earning=earned, notes=list(traces.notes))
    return traces


def _own_traces(recipe: Recipe, run: RunDir, base: Base, prompts: Prompts, show: Show) -> Traces:
    """Let the base sample its own completions, and return the right ones."""
    adapter = adapter_to_start_from(recipe, run, base, lambda line: None, "warmup") if recipe.init_from else None
    return _kept_traces(
        run, lambda: sample_traces(recipe, _policy_at_start(recipe, base, adapter, show), prompts, show)
    )


def _kept_traces(run: RunDir, make: Callable[[], Traces]) -> Traces:
    """Let the first process make the rows, once for the run; the others read what it keeps.

    Raises:
        RunDirError: they are gone, and the warm-up has begun to train on them.
    """
    process, path = this_process(), run.warmup / TRACES_FILE
    if process.is_first and run.read_warmup().get("traces_of") != _recipe_sum(run):
        path.unlink(missing_ok=True)  # made for another recipe, which was refused before it trained
    agree(None, process)
    if process.is_first and not path.is_file():
        if checkpoint_folders(run.warmup):
            raise RunDirError(
                f"{path}: the completions that the warm-up trains on are missing, and it has begun. Restore the file, "
                f"or warm up again: rm -r {run.warmup}"
            )
        run.warmup.mkdir(exist_ok=True)
        note_warmup(run, traces_of=_recipe_sum(run))
        write_traces(path, make())
    while not path.is_file():  # not a collective: those give up after minutes
        if _first_has_ended(run) and not path.is_file():
            raise TrainingError(f"{run.path}: {lost_peer()}")
        time.sleep(WAIT_S)
    return read_traces(path)


def _recipe_sum(run: RunDir) -> str:
    """Return a sum of the run's recipe, without the keys that a session may change."""
    fixed = json.dumps(fixed_keys(read_yaml(run.recipe_file)), sort_keys=True, default=str)
    return hashlib.sha256(fixed.encode()).hexdigest()


def _first_has_ended(run: RunDir) -> bool:
    """Return whether the first process has given up the run's lock; between machines locks are not relied on."""
    return this_process().is_on_one_machine and run.in_use() is False


def _policy_at_start(recipe: Recipe, base: Base, adapter: SavedAdapter | None, show: Show) -> Any:
    """Return the model that the warm-up starts from, ready for sampling."""
    announce_weights(base, show)
    model = load_for_sampling(base, recipe.rollout)
    if adapter is None:
        return model
    from peft import get_peft_model

    model = get_peft_model(model, lora_config(recipe, model))
    load_into(model, adapter)
    return model


def warm_up(
    recipe: Recipe,
    run: RunDir,
    base: Base,
    prompts: Prompts,
    traces: Traces,
    rewards: list[Reward],
    plan: Fit,
    view: View,
    state: str,
    deadline: Any,
) -> TrainResult | None:
    """Train the adapter on the traces, and leave it as `warmup/adapter`.

    Args:
        recipe, run, base, prompts, plan: of this training.
        traces: the rows.
        rewards: the recipe's, for the record.
        view: follows it.
        state: "new" or "resume".
        deadline: a `Deadline`, or None.

    Returns:
        None when it is complete; else why it ended before that: a signal, or `limits.max_minutes`, which leaves the
        adapter as it is then as the run's.

    Raises:
        GRPOLiteError: upstream refuses the values, the disk is too small or full, or what was trained is not finite.
    """
    process = this_process()
    stage = _stage(recipe, traces.rows)
    if process.is_first:
        run.warmup.mkdir(exist_ok=True)
        ahead = getattr(view.board, "ahead", None)
        note_warmup(run, ahead=asdict(ahead) if ahead else None)  # for `watch`
        _require_same_rows(run, len(stage.order.steps))
    if agree(_finish(run, len(stage.order.steps)) if process.is_first else None, process):
        if process.is_first:
            record_start(recipe, run, base, rewards, state)
    else:
        trainer = _build(recipe, run, base, prompts, stage, plan, view)
        if process.is_first:
            _begin(recipe, run, base, rewards, stage, trainer, state)
        signal_name = train_to_stop(run.warmup, view, trainer, deadline)
        steps, done = trainer.state.global_step, trainer.state.global_step == len(stage.order.steps)
        if process.is_first and done:
            _finish(run, len(stage.order.steps))
        elif process.is_first:
            _record(run, trainer)
            if not signal_name:
                save_adapter(run.adapter, trainer)
                note_warmup(run, paused_at=now())
                run.update_run(steps=0)
        if not done or signal_name:
            return TrainResult(run, steps if signal_name else 0, signal_name, paused=not signal_name)
    agree(None, process)  # the others read the adapter that the first has written
    return None


@dataclass(frozen=True)
class _Stage:
    """What the warm-up trains on, in which order."""

    rows: Sequence[Trace]
    held: Sequence[Trace]
    order: Order
    section: WarmupSection

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


def _stage(recipe: Recipe, rows: Sequence[Trace]) -> _Stage:
    """Hold some rows out, if there are enough, and put the others in order."""
    section = recipe.warmup
    assert section is not None
    seed = recipe.seed if section.seed is None else section.seed
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    count = min(MOST_HELD, int(HELD_SHARE * len(rows))) if len(rows) >= LEAST_ROWS else 0
    held, trained = shuffled[:count], shuffled[count:]
    while len(held) > 1 and len(held) * max(map(len, held)) > section.tokens_per_step:
        held.pop()
    lengths = [len(row) for row in trained]
    order = order_rows(lengths, section.tokens_per_step, section.steps, section.epochs, seed, this_process().world)
    return _Stage(trained, held, order, section)


def _build(recipe: Recipe, run: RunDir, base: Base, prompts: Prompts, stage: _Stage, plan: Fit, view: View) -> Any:
    """Load the base and return the trainer with its callbacks, the adapter in float32."""
    from transformers import PrinterCallback, set_seed

    from grpo_lite.trainer.warmup import StepRows, WarmupTrainer, as_dataset

    first = this_process().is_first
    arguments = _sft_config(recipe, run, base, stage)
    adapter = adapter_to_start_from(recipe, run, base, view.show, "warmup")
    announce_weights(base, view.show)
    model = load_base(base, recipe, max(len(prompts.longest), stage.longest - recipe.max_completion_length))
    is_ours = not uses_unsloth(recipe.model)  # else the adapter is on the base, in the dtypes that Unsloth computes in
    own = {"peft_config": lora_config(recipe, model)} if is_ours else {}
    set_seed(recipe.seed)
    try:
        trainer = WarmupTrainer(
            model=model, args=arguments, processing_class=prompts.tokenizer,
            train_dataset=as_dataset(stage.order, stage.rows, this_process().world),
            data_collator=StepRows(stage.rows, prompts.tokenizer.pad_token_id),
            callbacks=[MetricsFile(run, "warmup")] if first else [],
            options=plan.options if is_ours else replace(plan.options, compute="plain"),
            show=view.show, advice=plan.advice, recover=recipe.memory.fit, held=stage.held,
            epochs=stage.order.epochs, own_layers=is_ours, **own,
        )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:  # upstream's own refusals
        raise GRPOLiteError(f"{run.recipe_file}: lora or warmup: upstream refuses these values: {error}") from error
    if is_ours:
        lora_to_float32(trainer.model)
    if adapter is not None:
        load_into(trainer.model, adapter)
        if first:
            run.update_run(init_from=adapter.to_json())
    trainer.remove_callback(PrinterCallback)
    if first:
        trainer.add_callback(view)
        trainer.add_callback(WarmupDoctor(run, recipe, view))
        if recipe.push_checkpoints:
            trainer.add_callback(PushCheckpoints(run, remote_of(recipe.push_checkpoints, run, WARMUP), view.show))
    return trainer


def _sft_config(recipe: Recipe, run: RunDir, base: Base, stage: _Stage) -> Any:
    """Return TRL's SFTConfig; a batch of the trainer is a step of the stage, so it counts as 1.

    Raises:
        GRPOLiteError: TRL refuses a combination of values.
    """
    from trl import SFTConfig

    section, steps = stage.section, len(stage.order.steps)
    schedule = section.lr_scheduler_type
    rising = int(RISING_SHARE * steps) if schedule != "constant" and steps >= LEAST_STEPS else 0
    shared = {key: recipe.grpo[key] for key in SHARED_KEYS if recipe.grpo.get(key) is not None}
    if uses_unsloth(recipe.model):
        shared = {**{key: value for key, value in TRL_DEFAULTS.items() if key in SHARED_KEYS}, **shared}
    values: dict[str, Any] = {
        **shared,
        **device_arguments(recipe, base),
        "output_dir": str(run.warmup),
        "max_steps": steps,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": rising,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": "none",
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "activation_offloading": recipe.memory.offload_activations and base.device.kind == "cuda",  # TRL's needs one
    }
    try:
        return use_one_device(SFTConfig(**values))
    except Exception as error:  # TRL uses some values without checking them first
        reason = f"{type(error).__name__}: {error}"
        raise GRPOLiteError(f"{run.recipe_file}: warmup: TRL refuses these values together: {reason}") from None


def _require_same_rows(run: RunDir, steps: int) -> None:
    """Refuse a checkpoint of a step that the rows do not make.

    Raises:
        RunDirError: the rows have changed since.
    """
    newest = last_usable(run.warmup).folder
    if newest is not None and step_of(newest) > steps:
        raise RunDirError(
            f"{newest}: the warm-up was at step {step_of(newest)}, and its rows make {steps} steps now: they have "
            f"changed. Restore them, or warm up again: rm -r {run.warmup}"
        )


def _begin(
    recipe: Recipe, run: RunDir, base: Base, rewards: list[Reward], stage: _Stage, trainer: Any, state: str
) -> None:
    """Check the disk, and record what the stage starts with."""
    require_room_for(recipe, run, base, trainer)
    record_start(recipe, run, base, rewards, state)
    begun = run.read_warmup().get("began_at") if state == "resume" else None
    note_warmup(
        run, began_at=begun or now(), done_at=None, paused_at=None, max_steps=len(stage.order.steps),
        rows=len(stage.rows), held=len(stage.held), epochs=round(stage.order.epochs, 3),
    )  # fmt: skip


def _record(run: RunDir, trainer: Any) -> None:
    """Record what the stage reached before its end."""
    note_warmup(
        run, steps=trainer.state.global_step, seconds=round(trainer.journal.seconds_trained, 1),
        tokens_per_microbatch=trainer.options.warmup_tokens, faults=dict(trainer.faults.counts), **_losses(run),
    )  # fmt: skip


def _losses(run: RunDir) -> dict[str, float | None]:
    """Return the first and last losses among the warm-up's records."""
    steps = read_warmup_steps(run)
    found: dict[str, float | None] = {}
    for name in ("loss", "heldout_loss"):
        values = [record[name] for record in steps if record.get(name) is not None]
        found |= {f"{name}_first": values[0] if values else None, f"{name}_last": values[-1] if values else None}
    return found


def _finish(run: RunDir, last: int | None, has_grpo: bool = False) -> bool:
    """Make the last step's checkpoint the stage's adapter; return whether there is that checkpoint.

    A kill leaves the checkpoint or the adapter, so the stage is never trained twice.

    Args:
        run: the run.
        last: the last step; None: it is not known.
        has_grpo: whether metrics.jsonl has records of GRPO already.
    """
    checkpoint = last_usable(run.warmup).folder
    if checkpoint is None or step_of(checkpoint) != last:
        return False
    if not has_grpo:
        length = run.metrics_file.stat().st_size if run.metrics_file.is_file() else 0
        facts = read_facts(checkpoint)
        note_warmup(
            run, done_at=now(), metrics_bytes=length, steps=last, seconds=facts.get("seconds_trained", 0.0),
            tokens_per_microbatch=facts.get("budget", {}).get(BUDGET), faults=facts.get("faults", {}), **_losses(run),
        )  # fmt: skip
    with publishing(run.warm_adapter) as folder:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(checkpoint / name, folder / name)
    for folder in checkpoint_folders(run.warmup):
        remove(folder)
    return True


def note_warmup(run: RunDir, **values: Any) -> None:
    """Merge values into what run.json holds about the warm-up."""
    run.update_run(warmup={**run.read_warmup(), **values})
