"""`Recovery`: a step that runs out of memory is repeated with a smaller budget, not lost.

Memory may run out in the rollout, in scoring, and in the forward and backward passes (`is_out_of_memory`). The failed
attempt is undone (gradients, metrics, random state), the budget that bounds it is halved, and the same work is done
again: same prompts, same groups, same effective batch. The smaller budget goes into checkpoints.

Completions at their full length come late in training, and a run that dies at step 600 has cost a night. So before the
first step a rehearsal gives the longest prompt invented completions at the cap: one decoding step of the largest wave
behind full buffers, one forward and backward of the largest micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.out_of_memory import free_memory, is_out_of_memory
from grpo_lite.engine.packing import planned_tokens
from grpo_lite.engine.score import base_model
from grpo_lite.engine.static_decode import choose_decoder, engine_of
from grpo_lite.errors import MemoryBudgetError, first_line
from grpo_lite.memory.phases import cache_capacity
from grpo_lite.runs.checkpoints import read_facts

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
BUDGETS = ("tokens_per_microbatch", "rollout_kv_tokens")  # of EngineOptions


class Recovery:
    """Repeats what ran out of memory with less at once.

    Args:
        trainer: our trainer; its `options` hold the budgets.
        show: gets one line for every budget that is lowered.
        advice: shown if the budgets cannot be lowered further; the three cheapest changes.
        recover: whether to repeat; if False, an overflow ends the run, as in plain TRL.
        rehearsal: the longest prompt's ids, rehearsed at full completion length before the first step.
    """

    def __init__(
        self,
        trainer: Any,
        show: Callable[[str], None] | None = None,
        advice: str | None = None,
        recover: bool = True,
        rehearsal: list[int] | None = None,
    ) -> None:
        self.trainer = trainer
        self.show = show or logger.warning
        self.advice = advice or "Lower grpo.max_completion_length, grpo.num_generations or model.load_in."
        self.recover = recover
        self._rehearsal = rehearsal
        self._prepared: tuple[int, dict[str, Any], _Undo] | None = None  # micro-step, its inputs, how to repeat it
        self._copies = GradientCopies()

    # What may run out of memory

    def rollout(
        self, prompt_ids: list[list[int]], generate: Callable[[], Result], is_shared: Callable[[], bool]
    ) -> Result:
        """Generate; after an overflow again, in smaller waves and from the same random state."""
        before = random_state()

        def lower(failure: str) -> None:
            set_random_state(before)
            self._lower_wave(prompt_ids, failure, is_shared())

        return until_it_fits(generate, lower)

    def scoring(self, score: Callable[[], Result]) -> Result:
        """Score completions without a gradient; after an overflow again, with fewer at once."""
        if torch.is_grad_enabled() or self.trainer.gradients.ready is not None:
            return score()  # part of a training step, which is repeated as a whole

        def lower(failure: str) -> None:
            if not self._release_buffers("scoring", failure):
                self._divide("scoring", failure)

        return until_it_fits(score, lower)

    def inputs(self, prepare: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a micro-step's inputs; the same ones when it is repeated."""
        if self._prepared is None or self._prepared[0] != self.trainer._step:
            self._prepared = None
            inputs = prepare()
            self._prepared = (self.trainer._step, inputs, _Undo(self.trainer, self._copies))
        return dict(self._prepared[1])

    def training(self, step: Callable[[], Tensor]) -> Tensor:
        """Run one micro-step forward and backward; after an overflow again, in smaller micro-batches."""
        if self._rehearsal is not None:
            prompt, self._rehearsal = self._rehearsal, None
            self.rehearse(prompt)
        loss = until_it_fits(step, self._lower_microbatch)
        self._prepared = None
        return loss

    # The rehearsal

    def rehearse(self, prompt: list[int]) -> None:
        """Run the longest prompt at full completion length, and lower the budgets if that overflows.

        Rollouts by `generate` or vLLM are not rehearsed, because they cannot start at full length.
        """
        trainer = self.trainer
        undo = _Undo(trainer, self._copies)
        round_ids = longest_round(trainer, prompt)
        if trainer.support.can_share_rollout(round_ids[:1]):
            until_it_fits(
                lambda: rehearse_rollout(trainer, prompt), lambda why: self._lower_wave(round_ids, why, is_shared=True)
            )
        inputs = longest_inputs(trainer, prompt)
        self._prepared = (trainer._step, inputs, undo)
        until_it_fits(lambda: rehearse_training(trainer, inputs), self._lower_microbatch)
        self._prepared = None
        trainer.peers.forget()
        undo.restore(trainer)
        free_memory()

    # Budgets

    def _lower_microbatch(self, failure: str) -> None:
        if self._prepared is None:
            raise self._hopeless("training", failure)
        self._prepared[2].restore(self.trainer)
        if not self._release_buffers("training", failure):
            self._divide("training", failure)

    def _divide(self, phase: str, failure: str) -> None:
        """Lower the budget to half of what went through the model when memory ran out, so that it is divided."""
        computed = self.trainer.gradients.at_once
        total, longest = (0, 0) if computed is None else planned_tokens(*computed)
        if total <= longest:  # TRL's own compute, or a single completion
            raise self._hopeless(phase, failure)
        self._set_budget(phase, failure, "tokens_per_microbatch", max(longest, total // 2))

    def _lower_wave(self, prompt_ids: list[list[int]], failure: str, is_shared: bool) -> None:
        cap = self.trainer.max_completion_length
        longest = max(map(len, prompt_ids)) + cap
        total = sum(map(len, {tuple(ids) for ids in prompt_ids})) + len(prompt_ids) * cap
        budget = min(self.trainer.options.rollout_kv_tokens or total, total)
        if budget <= longest or not is_shared:
            raise self._hopeless("rollout", failure)
        self._set_budget("rollout", failure, "rollout_kv_tokens", max(longest, budget // 2))

    def _release_buffers(self, phase: str, failure: str) -> bool:
        """Free the buffers that the last rollout kept for the next one; return whether there were any."""
        engine = engine_of(base_model(self.trainer.accelerator.unwrap_model(self.trainer.model)))
        if not (self.recover and engine.release_for_good()):
            return False
        free_memory()
        self.show(
            f"out of memory in {phase} at step {self.trainer.state.global_step + 1}: decoding buffers are now freed "
            f"after every rollout, the same step is repeated ({failure})"
        )
        return True

    def _set_budget(self, phase: str, failure: str, name: str, tokens: int) -> None:
        if not self.recover:
            raise self._hopeless(phase, failure)
        free_memory()
        self.trainer.options = replace(self.trainer.options, **{name: tokens})
        self.show(
            f"out of memory in {phase} at step {self.trainer.state.global_step + 1}: memory.{name} is now {tokens}, "
            f"the same step is repeated ({failure})"
        )

    def _hopeless(self, phase: str, failure: str) -> MemoryBudgetError:
        free_memory()
        nothing_left = ", with nothing left to divide" if self.recover else ""
        step = self.trainer.state.global_step + 1
        return MemoryBudgetError(f"out of memory in {phase} at step {step}{nothing_left}: {failure}\n{self.advice}")

    # Checkpoints

    def facts(self) -> dict[str, Any]:
        """Return the budgets, for a checkpoint."""
        return {"budget": {name: getattr(self.trainer.options, name) for name in BUDGETS}}

    def load(self, checkpoint: Path) -> None:
        """Use the smaller of the budgets in a checkpoint and the present ones."""
        self.trainer.options = smaller_budgets(self.trainer.options, checkpoint, BUDGETS)


def smaller_budgets(options: EngineOptions, checkpoint: Path, names: Sequence[str]) -> EngineOptions:
    """Return the options with the smaller of each budget now and in a checkpoint; None is no limit."""
    saved = read_facts(checkpoint).get("budget", {})
    smaller: dict[str, Any] = {}
    for name in names:
        budgets = [tokens for tokens in (getattr(options, name), saved.get(name)) if tokens is not None]
        smaller[name] = min(budgets, default=None)
    return replace(options, **smaller)


def longest_round(trainer: Any, prompt: list[int]) -> list[list[int]]:
    """Return the prompts of a round of generation, each repeated G times, all as long as `prompt` and distinct."""
    rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    vocabulary = base_model(trainer.accelerator.unwrap_model(trainer.model)).config.vocab_size
    return [[(prompt[0] + i // trainer.num_generations) % vocabulary, *prompt[1:]] for i in range(rows)]


def rehearse_rollout(trainer: Any, prompt: list[int]) -> None:
    """Decode one token of the largest wave behind prompts and completions at full length; draws nothing."""
    longest = trainer.max_completion_length
    model = base_model(trainer.accelerator.unwrap_model(trainer.model))
    decoder = choose_decoder(model, trainer.accelerator.autocast, trainer.options.rollout_kv_tokens)
    with trainer.support.no_checkpointing(trainer.model):
        decoder.rehearse(model, longest_round(trainer, prompt), longest, cache_capacity(longest))


def longest_inputs(trainer: Any, prompt: list[int]) -> dict[str, Tensor]:
    """Return a micro-step's inputs as TRL prepares them, with every completion at its cap and unlike the others."""
    rows, longest = trainer.args.per_device_train_batch_size, trainer.max_completion_length
    device = trainer.accelerator.device
    prompts = torch.tensor(longest_round(trainer, prompt)[:rows], device=device)  # (B, P)
    vocabulary = base_model(trainer.accelerator.unwrap_model(trainer.model)).config.vocab_size
    first = (prompts[:, :1] + torch.arange(rows, device=device).unsqueeze(1)) % vocabulary
    completions = first.expand(rows, longest).contiguous()  # (B, C)
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
    """Run one micro-step's forward and backward with room for the optimizer's state; leaves no gradient."""
    trained = _trainable(trainer)
    has_state = bool(getattr(trainer.optimizer, "state", None))
    room = [] if has_state else [torch.empty((2, *p.shape), dtype=torch.float32, device=p.device) for p in trained]
    try:
        with trainer.gradients.unrecorded(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=inputs["num_items_in_batch"])
        trainer.accelerator.backward(cast(Tensor, loss))
    finally:
        del room
        for parameter in trained:
            parameter.grad = None


class GradientCopies:
    """Copies of the gradients in main memory: undoing a failed attempt must not run out of memory itself.

    They lie in one buffer, allocated at first use: pinned on CUDA, so that the host waits for no copy. One set of
    copies exists at a time.
    """

    ALIGNMENT = 16  # bytes, at least as large as any element

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Return a copy of each gradient, valid until the next call; on CUDA, synchronize before the host reads it."""
        sizes = [0 if gradient is None else self._room(gradient) for gradient in gradients]
        if sum(sizes) > self._buffer.numel():
            is_cuda = any(gradient is not None and gradient.device.type == "cuda" for gradient in gradients)
            self._buffer = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            self._buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=is_cuda)
        copies: list[Tensor | None] = []
        for gradient, room in zip(gradients, self._buffer[: sum(sizes)].split(sizes), strict=True):
            if gradient is None:
                copies.append(None)
                continue
            copy = room[: gradient.nbytes].view(gradient.dtype).view(gradient.shape)
            copies.append(copy.copy_(gradient.detach(), non_blocking=True))
        return copies

    def _room(self, gradient: Tensor) -> int:
        return -(-gradient.nbytes // self.ALIGNMENT) * self.ALIGNMENT


class _Undo:
    """The state before an attempt at a micro-step's loss and gradient; the rollout is already done."""

    def __init__(self, trainer: Any, copies: GradientCopies) -> None:
        self.random_state = random_state()
        # None at a step's first micro-step.
        self.gradients = copies.take([parameter.grad for parameter in _trainable(trainer)])
        self.metrics = {mode: {k: list(v) for k, v in by_name.items()} for mode, by_name in trainer._metrics.items()}
        self.entropy = trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats

    def restore(self, trainer: Any) -> None:
        """Undo a failed attempt."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies may still be on their way
        for parameter, gradient in zip(_trainable(trainer), self.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        for mode, by_name in self.metrics.items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update({name: list(values) for name, values in by_name.items()})
        trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats = self.entropy
        set_random_state(self.random_state)


def until_it_fits(run: Callable[[], Result], lower: Callable[[str], None]) -> Result:
    """Run until memory suffices.

    Args:
        run: what may run out of memory.
        lower: undoes a failed attempt and makes the next one smaller; gets the error's first line.
    """
    while True:
        try:
            return run()
        except RuntimeError as error:
            failure = _overflow(error)
        # Outside the handler: the traceback holds the frames, and they hold the activations.
        lower(failure)


def _overflow(error: RuntimeError) -> str:
    """Return the first line of an error that says memory ran out; raise any other."""
    if not is_out_of_memory(error):
        raise error
    return first_line(error)[:200]


def _trainable(trainer: Any) -> list[nn.Parameter]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
