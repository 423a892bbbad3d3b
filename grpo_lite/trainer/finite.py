"""What every trainer here asks of its numbers: gradients that are finite, and an adapter that may be saved.

Apart from the trainers, since TRL's own and Unsloth's are asked too (`trainer_sealed`).

LossScale: with float16, optimizer steps that the grad scaler skips are said to be that, and not "no learning".

`FaultTolerantGRPOTrainer`: numbers that are not numbers never reach a weight.

A group whose rewards could not be computed, or are too large to compute advantages from, is left out of its step; a
step whose loss or gradient is not finite moves nothing, the optimizer's memory included. Each is counted, and too many
in a row end the run. The part of the seam to TRL (`trainer.py`) that concerns faults; read in trl 1.14.0 and 1.16.0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from grpo_lite.engine.options import EngineOptions
from grpo_lite.errors import TrainingError
from grpo_lite.trainer.rollouts import RolloutGRPOTrainer


def are_finite(gradients: Iterable[Tensor]) -> bool:
    """Return whether no gradient, of one or more, holds NaN or infinity; one transfer from the device."""
    return bool(torch.isfinite(torch.stack([g.detach().abs().max().float() for g in gradients])).all())


def require_finite_adapter(trainer: Any, last_good: Callable[[], str] = str) -> None:
    """Refuse to save a trainer's adapter that holds NaN or infinity.

    Args:
        trainer: a transformers Trainer.
        last_good: returns a sentence on what had been saved before; asked only when there is something to refuse.

    Raises:
        TrainingError: it does; the checkpoint before is the last good one.
    """
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            said = [f"({name}), and such weights are never saved.", *filter(None, [last_good()])]
            raise TrainingError(
                f"{trainer.args.output_dir}: step {trainer.state.global_step}: the adapter holds NaN or infinity "
                f"{' '.join(said)} Lower grpo.learning_rate or set grpo.max_grad_norm, in a new run directory."
            )


class LossScale(TrainerCallback):
    """Counts skipped steps and shows the first and every tenth.

    Args:
        scaler: Returns the trainer's GradScaler, or None without float16.
        show: Gets the lines.
    """

    def __init__(self, scaler: Callable[[], Any], show: Callable[[str], None]) -> None:
        self.scaler, self.show = scaler, show
        self.skipped = 0
        self._before = 0.0

    def metrics(self) -> dict[str, float]:
        """Return what to log; nothing without float16."""
        scaler = self.scaler()
        if scaler is None:
            return {}
        return {"loss_scale": float(scaler.get_scale()), "optimizer_steps_skipped": float(self.skipped)}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (scaler := self.scaler()) is not None:
            self._before = float(scaler.get_scale())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A scale that falls is a step not taken. accelerate 1.x tells by whether `step` was called, which a fused
        # optimizer always is.
        scaler = self.scaler()
        if scaler is None or float(scaler.get_scale()) >= self._before:
            return
        self.skipped += 1
        if self.skipped == 1 or self.skipped % 10 == 0:
            self.show(
                f"step {state.global_step}: no update, the gradients overflowed float16 at this loss scale; it is "
                f"lowered to {scaler.get_scale():g} ({self.skipped} so far; a few at the start are normal)"
            )


STEPS, GROUPS, OVERFLOWING = "skipped_steps", "excluded_groups", "groups_with_overflowing_rewards"
LARGEST_REWARD = 1e18  # its square, which the standard deviation needs, still fits float32


class FaultTolerantGRPOTrainer(RolloutGRPOTrainer):
    """GRPOTrainer that skips and counts what is not finite; see `EngineOptions.max_skipped_steps`."""

    def __init__(self, *args: Any, options: EngineOptions | None = None, **kwargs: Any) -> None:
        self.faults: Counter[str] = Counter()  # over the whole run, kept in checkpoints
        self.faults_in_a_row: Counter[str] = Counter()
        self._loss_is_finite: Tensor | bool = True  # of the micro-steps since the last optimizer step
        super().__init__(*args, options=options, **kwargs)
        self.add_callback(_BeforeOptimizerStep(self))

    # Groups

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        # Each process knows the rows that it scored itself; the rewards here are those of all processes, in order.
        failed = torch.zeros(rewards.size(0) // self.accelerator.num_processes, device=rewards.device)
        for function in self.reward_funcs:
            for row in getattr(function, "excluded", ()):
                failed[row] = 1.0
        self._exclude(rewards, set(self.accelerator.gather(failed).nonzero().squeeze(1).tolist()), GROUPS)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        # TRL 1.16 turns what overflows into 0 or into 3.4e38 (`nan_to_num`), so it is found before.
        overflowing = ~(weighted.abs() < LARGEST_REWARD)
        self._exclude(rewards, set(overflowing.nonzero().squeeze(1).tolist()), OVERFLOWING)
        return rewards

    def _exclude(self, rewards: Tensor, rows: set[int], kind: str) -> None:
        """Make the rewards of these rows' groups NaN, in place: TRL then gives them no advantage."""
        groups = {row // self.num_generations for row in rows}
        for group in groups:
            rewards[group * self.num_generations : (group + 1) * self.num_generations] = torch.nan
        if groups:
            self._count(kind, len(groups))

    # Steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._loss_is_finite = torch.isfinite(loss) & self._loss_is_finite  # no transfer from the device here
        return loss

    def drop_step_unless_finite(self) -> None:
        """Take the gradients away where loss or gradient is not finite: the optimizer then changes nothing."""
        scaler = getattr(self.accelerator, "scaler", None)
        finite_loss, self._loss_is_finite = bool(self._loss_is_finite), True
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            return
        if are_finite(gradients) and finite_loss:
            self.faults_in_a_row[STEPS] = 0
            return
        if finite_loss and scaler is not None and scaler.get_scale() > 1.0:
            return  # float16: the grad scaler skips the step itself and halves its scale, which is no fault
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                if scaler is not None and not self.args.max_grad_norm:
                    parameter.grad = torch.full_like(parameter.grad, torch.inf)  # not unscaled yet: the scaler skips it
                else:
                    parameter.grad = None
        self._count(STEPS, 1)
        self._stop_after_too_many("loss" if not finite_loss else "gradient")

    def _stop_after_too_many(self, what: str) -> None:
        row = self.faults_in_a_row[STEPS]
        if row >= self.options.max_skipped_steps:
            raise TrainingError(
                f"{self.args.output_dir}: the {what} was NaN or infinite in {row} steps in a row, the last of them "
                f"step {self.state.global_step + 1}; these steps were skipped. {self._last_good()} Lower "
                "grpo.learning_rate, set grpo.max_grad_norm, or use model.dtype=float32, in a new run directory."
            )

    def _last_good(self) -> str:
        return ""

    def _count(self, kind: str, number: int) -> None:
        self.faults[kind] += number
        self.faults_in_a_row[kind] += 1
        self._metrics["train"][f"faults/{kind}"].append(float(number))


class _BeforeOptimizerStep(TrainerCallback):
    def __init__(self, trainer: FaultTolerantGRPOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.drop_step_unless_finite()
