"""Preflight: the probe as the first minutes of a training, within a time budget.

It says what a night would show: too hard, too easy, cut short. It stops no training and leaves the random state alone,
so the training after it is the same with and without.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from grpo_lite.commands import hint
from grpo_lite.evaluation.probe import CAN_LEARN, PROMPTS, SAMPLES, probe_lines, probe_recipe
from grpo_lite.memory.times import keep_times
from grpo_lite.models.device import Device
from grpo_lite.processes import this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show
from grpo_lite.task.prompts import Prompts

BUDGET_S = 90.0  # for sampling; the batch that is running is finished, and what was sampled is scored


def add_preflight(recipe: Recipe, run: RunDir, device: Device, trainer: Any, prompts: Prompts, show: Show) -> None:
    """Let a trainer begin with the probe if the recipe wants it: `log.preflight`, by default on a GPU only."""
    wanted = device.kind == "cuda" if recipe.log.preflight is None else recipe.log.preflight
    if wanted and this_process().world > 1:  # the others would wait in a collective, which gives up after minutes
        show(f"preflight: not run with several processes; run it before: {hint('probe', recipe=recipe.name)}")
    elif wanted:  # before all other callbacks, whose clocks start with the training
        callback = Preflight(recipe, run, device, trainer, prompts, show)
        trainer.callback_handler.callbacks.insert(0, callback)


class Preflight(TrainerCallback):
    """Probes the untrained policy when a training starts, not when it resumes; figures go into run.json."""

    def __init__(self, recipe: Recipe, run: RunDir, device: Device, trainer: Any, prompts: Prompts, show: Show) -> None:
        self.recipe, self.run, self.device, self.trainer = recipe, run, device, trainer
        self.prompts, self.show = prompts, show

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, self.trainer = self.trainer, None  # or the optimizer would outlive the training
        if state.global_step > 0:
            return
        start = time.monotonic()
        samples = max(SAMPLES, self.recipe.num_generations)
        self.show(
            f"preflight: {PROMPTS} prompts × {samples} samples first, as many as about {BUDGET_S:g} s allow "
            "(log.preflight=false leaves it out)"
        )
        with trainer.sampling():  # as training samples and computes
            probe = probe_recipe(self.recipe, trainer.model, self.prompts, count=PROMPTS, limit_s=BUDGET_S)
        if probe.skipped:
            self.show(
                f"preflight: stopped after {time.monotonic() - start:.0f} s; skipped: {', '.join(probe.skipped)} "
                f"(nothing is skipped by: {hint('probe', recipe=self.recipe.name)})"
            )
        for line in probe_lines(probe):
            self.show(f"preflight: {line.strip()}")
        if probe.verdict != CAN_LEARN:
            self.show("preflight: training starts anyway; Ctrl-C twice stops it at once")
        self.run.update_run(preflight=probe.to_json())
        keep_times(self.recipe, self.device.name, probe.to_json())
        trainer.journal.seconds_before -= time.monotonic() - start  # it is no training time
