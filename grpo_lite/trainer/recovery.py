"""Run the largest wave and the largest micro-batch once before the first step, so that an overflow shows at once.

Completions at their full length come late in training, and a run that dies at step 600 has cost a night. Here the
longest prompt is given made-up completions at the cap: one decoding step behind full buffers, one forward and backward.

`FittingGRPOTrainer`: a step that runs out of memory is done again with a smaller budget, not lost.

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
from typing import Any, cast

import torch
from torch import Tensor, nn

from grpo_lite.engine.cache import GroupCache
from grpo_lite.engine.decode import GroupDecoder, plan_waves
from grpo_lite.engine.out_of_memory import free_memory, is_out_of_memory
from grpo_lite.engine.packing import read_padded_batch
from grpo_lite.engine.score import base_model
from grpo_lite.errors import MemoryBudgetError
from grpo_lite.memory.phases import cache_capacity
from grpo_lite.runs.checkpoints import read_facts
from grpo_lite.trainer.finite import LossScale
from grpo_lite.trainer.parallel import ParallelGRPOTrainer


def longest_round(trainer: Any, prompt: list[int]) -> list[list[int]]:
    """Return the prompts of a round of generation, each repeated G times, all as long as `prompt` and distinct."""
    rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    vocabulary = base_model(trainer.accelerator.unwrap_model(trainer.model)).config.vocab_size
    return [[(prompt[0] + i // trainer.num_generations) % vocabulary, *prompt[1:]] for i in range(rows)]


def rehearse_rollout(trainer: Any, prompt: list[int]) -> None:
    """Decode one token of the largest wave behind prompts and completions at full length; draws nothing."""
    model = base_model(trainer.accelerator.unwrap_model(trainer.model))
    prompts: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(longest_round(trainer, prompt)):
        prompts.setdefault(tuple(ids), []).append(row)
    longest = trainer.max_completion_length
    waves = plan_waves(prompts, longest, trainer.options.rollout_kv_tokens)
    wave = max(waves, key=lambda groups: sum(len(p) + len(members) * longest for p, members in groups))
    decoder = GroupDecoder(trainer.accelerator.autocast)
    device = model.device
    groups = torch.tensor([group for group, (_, members) in enumerate(wave) for _ in members], device=device)
    flat = torch.tensor([token for ids, _ in wave for token in ids], device=device).unsqueeze(0)
    positions = torch.arange(len(prompt), device=device).repeat(len(wave)).unsqueeze(0)
    cache = GroupCache([len(prompt)] * len(wave), groups)
    with torch.no_grad(), trainer._no_checkpointing(trainer.model), trainer.accelerator.autocast():
        decoder._forward(model, flat, positions, cache)
        for layer, (keys, _) in cache.prompts.items():
            shape = (len(groups), keys.size(1), cache_capacity(longest), keys.size(3))
            cache.completions[layer] = keys.new_zeros(shape), keys.new_zeros(shape)
        cache.generated = max(0, longest - 2)
        last = torch.full((len(groups), 1), len(prompt) + cache.generated, device=device)
        hidden = decoder._forward(model, flat[0, : len(groups)].new_zeros((len(groups), 1)), last, cache)[:, 0]
        log_p = torch.log_softmax(decoder._logits(model, hidden) / 0.9, dim=-1)
        (log_p.exp() * log_p).sum(-1)


def longest_inputs(trainer: Any, prompt: list[int]) -> dict[str, Tensor]:
    """Return a micro-step's inputs as TRL prepares them, with every completion at its cap."""
    rows, longest = trainer.args.per_device_train_batch_size, trainer.max_completion_length
    device = trainer.accelerator.device
    prompts = torch.tensor(longest_round(trainer, prompt)[:rows], device=device)  # (B, P)
    completions = prompts[:, :1].expand(rows, longest).contiguous()  # (B, C)
    signs = 1.0 - 2.0 * (torch.arange(rows, device=device) % 2)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": signs,
        "num_items_in_batch": torch.tensor(rows * longest, device=device),
    }
    if trainer.beta != 0.0:
        inputs["ref_per_token_logps"] = torch.zeros(completions.shape, device=device)
    return inputs


def rehearse_training(trainer: Any, inputs: dict[str, Tensor]) -> None:
    """Take one micro-step's forward and backward, with room kept for the optimizer's state; leaves no gradient."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    has_state = bool(getattr(trainer.optimizer, "state", None))
    kept = [] if has_state else [torch.empty((2, *p.shape), dtype=torch.float32, device=p.device) for p in trained]
    try:
        with trainer._unrecorded(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=inputs["num_items_in_batch"])
        trainer.accelerator.backward(cast(Tensor, loss))
    finally:
        del kept
        for parameter in trained:
            parameter.grad = None


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
