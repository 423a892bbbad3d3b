"""`FittingGRPOTrainer`: a step that runs out of memory is done again with a smaller budget, not lost.

The topmost layer over `trainer.py`. What is caught is memory running out (`is_out_of_memory`) in the rollout, in
scoring, and in the forward and backward passes; each is undone (gradients, metrics, random state), the budget that
bounds it is halved, and the same work is done again: same prompts, same groups, same effective batch. The smaller
budget goes into checkpoints.
Read in trl 1.14.0 and 1.16.0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lite.checkpoints import read_facts
from grpo_lite.errors import MemoryBudgetError
from grpo_lite.loss_scale import LossScale
from grpo_lite.out_of_memory import free_memory, is_out_of_memory
from grpo_lite.packing import read_padded_batch
from grpo_lite.rehearsal import longest_inputs, longest_round, rehearse_rollout, rehearse_training
from grpo_lite.trainer_parallel import ParallelGRPOTrainer

logger = logging.getLogger(__name__)


class FittingGRPOTrainer(ParallelGRPOTrainer):
    """PackedGRPOTrainer that survives memory running out.

    Args:
        show: Gets one line for every budget that is lowered.
        advice: What to say when nothing is left to lower; the three cheapest changes.
        recover: False: an overflow ends the run, as in plain TRL.
        rehearsal: The longest prompt's ids, to be rehearsed at full completion length before the first step.
    """

    def __init__(
        self,
        *args: Any,
        show: Callable[[str], None] | None = None,
        advice: str | None = None,
        recover: bool = True,
        rehearsal: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self._rehearsal = rehearsal
        self._recover = recover
        self._show = show or logger.warning
        self._advice = advice or "Lower grpo.max_completion_length, grpo.num_generations or model.load_in."
        self._prepared: tuple[int, dict[str, Any], _Undo] | None = None  # micro-step, its inputs, how to do it again
        super().__init__(*args, **kwargs)
        self._loss_scale = LossScale(lambda: self.accelerator.scaler, self._show)
        self.add_callback(self._loss_scale)

    # Forward and backward

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._rehearsal is not None:
            prompt, self._rehearsal = self._rehearsal, None
            self.rehearse(prompt)
        while True:
            try:
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
                self._prepared = None
                return loss
            except RuntimeError as error:
                failure = _overflow(error)
            # Outside the handler: the traceback holds the frames, and they hold the activations.
            self._lower_microbatch(failure)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._prepared is None or self._prepared[0] != self._step:
            self._prepared = None
            inputs = super()._prepare_inputs(generation_batch)
            self._prepared = (self._step, inputs, _Undo(self))
        return dict(self._prepared[1])

    def _lower_microbatch(self, failure: str) -> None:
        if self._prepared is None or not self._is_packable(self.model):
            raise self._hopeless("training", failure)
        _, inputs, undo = self._prepared
        undo.restore(self)
        total, longest = _tokens(inputs)
        budget = min(self.options.tokens_per_microbatch or total, total)
        if budget <= longest:
            raise self._hopeless("training", failure)
        self._set_budget("training", failure, tokens_per_microbatch=max(longest, budget // 2))

    def rehearse(self, prompt: list[int]) -> None:
        """Let an overflow of the longest prompt at full completion length happen now, and lower the budgets for it.

        Rollouts by `generate` or vLLM are not rehearsed: theirs cannot be cut short at full length.
        """
        undo = _Undo(self)
        round_ids = longest_round(self, prompt)
        if self.options.rollout == "shared" and self._can_share_rollout(round_ids[:1], (), {}):
            self._until_it_fits(
                lambda: rehearse_rollout(self, prompt), lambda why: self._lower_wave(round_ids, why, True)
            )
        inputs = longest_inputs(self, prompt)
        self._prepared = (self._step, inputs, undo)
        self._until_it_fits(lambda: rehearse_training(self, inputs), self._lower_microbatch)
        self._prepared = None
        undo.restore(self)
        free_memory()

    def _until_it_fits(self, run: Callable[[], None], lower: Callable[[str], None]) -> None:
        while True:
            try:
                return run()
            except RuntimeError as error:
                failure = _overflow(error)
            lower(failure)

    # Scoring without gradients

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if torch.is_grad_enabled() or self._scores is not None:
            return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
        while True:
            try:
                return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
            except RuntimeError as error:
                failure = _overflow(error)
            width = input_ids.size(1)
            budget = self.options.tokens_per_microbatch or input_ids.numel()
            if budget <= width or not self._is_packable(model):
                raise self._hopeless("scoring", failure)
            self._set_budget("scoring", failure, tokens_per_microbatch=max(width, min(budget, input_ids.numel()) // 2))

    # Rollout

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        random_state = _random_state()
        while True:
            try:
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            except RuntimeError as error:
                failure = _overflow(error)
            _set_random_state(random_state)
            self._lower_wave(prompt_ids, failure, self._can_share_rollout(prompt_ids, args, kwargs))

    def _lower_wave(self, prompt_ids: list[list[int]], failure: str, shared: bool) -> None:
        longest = max(map(len, prompt_ids)) + self.max_completion_length
        distinct = {tuple(ids) for ids in prompt_ids}
        total = sum(map(len, distinct)) + len(prompt_ids) * self.max_completion_length
        budget = min(self.options.rollout_kv_tokens or total, total)
        if budget <= longest or self.options.rollout == "generate" or not shared:
            raise self._hopeless("rollout", failure)
        self._set_budget("rollout", failure, rollout_kv_tokens=max(longest, budget // 2))

    # Budgets

    def _set_budget(self, phase: str, failure: str, **budget: int) -> None:
        if not self._recover:
            raise self._hopeless(phase, failure)
        free_memory()
        (name, tokens), *_ = budget.items()
        self.options = replace(self.options, **budget)  # type: ignore[arg-type]
        self._show(
            f"out of memory in {phase} at step {self.state.global_step + 1}: memory.{name} is now {tokens}, the same "
            f"step is done again ({failure})"
        )

    def _hopeless(self, phase: str, failure: str) -> MemoryBudgetError:
        free_memory()
        return MemoryBudgetError(
            f"out of memory in {phase} at step {self.state.global_step + 1}"
            + (", with nothing left to divide" if self._recover else "")
            + f": {failure}\n"
            f"{self._advice}"
        )

    # Loss scaling (float16)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add with float16 how large the loss scale is, and how many optimizer steps it has cost."""
        super().log({**logs, **(self._loss_scale.metrics() if "loss" in logs else {})}, *args, **kwargs)

    # Checkpoints

    def _facts(self, step: int) -> dict[str, Any]:
        budget = {name: getattr(self.options, name) for name in ("tokens_per_microbatch", "rollout_kv_tokens")}
        return {**super()._facts(step), "budget": budget}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        saved = read_facts(Path(checkpoint)).get("budget") if checkpoint else None
        if saved:
            self.options = replace(
                self.options,
                tokens_per_microbatch=_smaller(self.options.tokens_per_microbatch, saved.get("tokens_per_microbatch")),
                rollout_kv_tokens=_smaller(self.options.rollout_kv_tokens, saved.get("rollout_kv_tokens")),
            )


class _Undo:
    """What an attempt at a micro-step's loss and gradient changes, as it was before; the rollout is behind it."""

    def __init__(self, trainer: FittingGRPOTrainer) -> None:
        self.random_state = _random_state()
        # In main memory: an attempt that fails is not to fail for its own undoing. None at a step's first micro-step.
        self.gradients = [
            None if parameter.grad is None else parameter.grad.detach().to("cpu", copy=True)
            for parameter in _trainable(trainer)
        ]
        self.metrics = {mode: {k: list(v) for k, v in kept.items()} for mode, kept in trainer._metrics.items()}
        self.entropy = trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats

    def restore(self, trainer: FittingGRPOTrainer) -> None:
        """Take a failed attempt back."""
        for parameter, gradient in zip(_trainable(trainer), self.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        for mode, kept in self.metrics.items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update({name: list(values) for name, values in kept.items()})
        trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats = self.entropy
        _set_random_state(self.random_state)


def _trainable(trainer: FittingGRPOTrainer) -> list[nn.Parameter]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def _tokens(inputs: dict[str, Any]) -> tuple[int, int]:
    """Return a micro-step's packed tokens and its longest row."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    batch = read_padded_batch(ids, mask, inputs["completion_ids"].size(1))
    if batch is None:
        return int(mask.sum()), int(mask.sum(1).max())
    prompts = sum(batch.prompt_lengths[group[0]] for group in batch.groups)
    rows = [a + b for a, b in zip(batch.prompt_lengths, batch.completion_lengths, strict=True)]
    return prompts + sum(batch.completion_lengths), max(rows)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _smaller(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


def _overflow(error: RuntimeError) -> str:
    """Return the first line of an error that says memory ran out; any other error goes on its way."""
    if not is_out_of_memory(error):
        raise error
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
