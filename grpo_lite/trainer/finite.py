"""`Faults`: keeps NaN and infinity out of the weights and out of saved adapters.

It excludes a group whose rewards could not be computed, or are too large to compute advantages from. A step whose loss
or gradient is not finite changes neither the weights nor the optimizer's state. Each fault is counted, and too many in
a row end the run. Our trainer and the backend unsloth's both have it as `trainer.faults`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from grpo_lite.errors import TrainingError
from grpo_lite.runs import checkpoints

STEPS, GROUPS, OVERFLOWING = "skipped_steps", "excluded_groups", "groups_with_overflowing_rewards"
LARGEST_REWARD = 1e18  # its square, which the standard deviation needs, still fits float32


class Faults:
    """Excludes what is not finite, and counts it.

    Args:
        trainer: a GRPOTrainer.
        most_in_a_row: optimizer steps in a row that may be skipped before the run stops.
        all_agree: says whether a loss was finite in every process.
    """

    def __init__(
        self, trainer: Any, most_in_a_row: int, all_agree: Callable[[Tensor | bool], bool] = lambda finite: bool(finite)
    ) -> None:
        self.trainer, self.most_in_a_row, self.all_agree = trainer, most_in_a_row, all_agree
        self.counts: Counter[str] = Counter()  # over the whole run, kept in checkpoints
        self.in_a_row: Counter[str] = Counter()
        self._loss_is_finite: Tensor | bool = True  # of the micro-steps since the last optimizer step
        trainer.add_callback(_BeforeOptimizerStep(self))

    def exclude(self, rewards: Tensor, failed_rows: Sequence[int] = ()) -> None:
        """Set the rewards `(B, functions)` of unusable groups to NaN, in place, so that they get no advantage.

        Args:
            rewards: of all processes.
            failed_rows: rows of this process that are unusable whatever their rewards.
        """
        trainer = self.trainer
        # Each process knows the rows that it scored itself; the rewards here are those of all processes, in order.
        failed = torch.zeros(rewards.size(0) // trainer.accelerator.num_processes, device=rewards.device)
        for row in failed_rows:
            failed[row] = 1.0
        for function in trainer.reward_funcs:
            for row in getattr(getattr(function, "guard", function), "excluded", ()):
                failed[row] = 1.0
        self._exclude(rewards, trainer.accelerator.gather(failed).nonzero(), GROUPS)
        weighted = (rewards * trainer.reward_weights.to(rewards.device)).nansum(dim=1)
        # TRL 1.16 turns an overflow into 0 or into 3.4e38 (`nan_to_num`), so it must be found here.
        self._exclude(rewards, (~(weighted.abs() < LARGEST_REWARD)).nonzero(), OVERFLOWING)

    def _exclude(self, rewards: Tensor, rows: Tensor, kind: str) -> None:
        size = self.trainer.num_generations
        groups = {row // size for row in rows.squeeze(1).tolist()}
        for group in groups:
            rewards[group * size : (group + 1) * size] = torch.nan
        if groups:
            self._count(kind, len(groups))

    def note_loss(self, loss: Tensor) -> Tensor:
        """Note whether a micro-step's loss is finite, and return the loss; does not wait for the device."""
        self._loss_is_finite = torch.isfinite(loss) & self._loss_is_finite
        return loss

    def drop_step_unless_finite(self) -> None:
        """Remove the gradients if the loss or one of them is not finite, so that the optimizer changes nothing."""
        trainer = self.trainer
        scaler = getattr(trainer.accelerator, "scaler", None)
        finite_loss, self._loss_is_finite = self.all_agree(self._loss_is_finite), True
        trained = [parameter for parameter in trainer.model.parameters() if parameter.grad is not None]
        if not trained:
            return
        if are_finite([parameter.grad for parameter in trained]) and finite_loss:
            self.in_a_row[STEPS] = 0
            return
        if finite_loss and scaler is not None and scaler.get_scale() > 1.0:
            return  # float16: the grad scaler skips the step itself and halves its scale, which is no fault
        for parameter in trained:
            if scaler is not None and not trainer.args.max_grad_norm:
                parameter.grad = torch.full_like(parameter.grad, torch.inf)  # not unscaled yet: the scaler skips it
            else:
                parameter.grad = None
        self._count(STEPS, 1)
        self._stop_after_too_many("loss" if not finite_loss else "gradient")

    def _stop_after_too_many(self, what: str) -> None:
        row, args = self.in_a_row[STEPS], self.trainer.args
        if row >= self.most_in_a_row:
            raise TrainingError(
                f"{args.output_dir}: the {what} was NaN or infinite in {row} steps in a row, the last of them "
                f"step {self.trainer.state.global_step + 1}; these steps were skipped. {_last_good(args.output_dir)} "
                "Lower grpo.learning_rate, set grpo.max_grad_norm, or use model.dtype=float32, in a new run directory."
            )

    def _count(self, kind: str, number: int) -> None:
        self.counts[kind] += number
        self.in_a_row[kind] += 1
        self.trainer._metrics["train"][f"faults/{kind}"].append(float(number))


class _BeforeOptimizerStep(TrainerCallback):
    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.faults.drop_step_unless_finite()


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether no gradient, of one or more on one device, holds NaN or infinity; one wait for the device.

    The largest magnitude is a norm that cannot overflow, and CUDA computes it for many tensors in one launch.
    """
    largest = torch._foreach_norm([gradient.detach() for gradient in gradients], ord=torch.inf)
    return math.isfinite(torch.stack([norm.float() for norm in largest]).max().item())  # NaN is the largest of all


def require_finite_adapter(trainer: Any) -> None:
    """Refuse to save a trainer's adapter that holds NaN or infinity.

    Raises:
        TrainingError: it does; the message names the last good checkpoint.
    """
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            folder = trainer.args.output_dir
            raise TrainingError(
                f"{folder}: step {trainer.state.global_step}: the adapter holds NaN or infinity ({name}), and such "
                f"weights are never saved. {_last_good(folder)} Lower grpo.learning_rate or set grpo.max_grad_norm, in "
                "a new run directory."
            )


def _last_good(run: str) -> str:
    folder = checkpoints.last_usable(Path(run)).folder
    return f"The last good checkpoint is {folder}." if folder else "No checkpoint had been saved before."


class LossScale(TrainerCallback):
    """Counts the optimizer steps that float16's grad scaler skips, and shows the first and every tenth.

    Args:
        trainer: a GRPOTrainer; its accelerator has a grad scaler with float16 only.
        show: gets the lines.
    """

    def __init__(self, trainer: Any, show: Callable[[str], None]) -> None:
        self.trainer, self.show = trainer, show
        self.skipped = 0
        self._before = 0.0
        trainer.add_callback(self)

    def metrics(self) -> dict[str, float]:
        """Return what to log; nothing without float16."""
        scaler = self.trainer.accelerator.scaler
        if scaler is None:
            return {}
        return {"loss_scale": float(scaler.get_scale()), "optimizer_steps_skipped": float(self.skipped)}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (scaler := self.trainer.accelerator.scaler) is not None:
            self._before = float(scaler.get_scale())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A scale that falls means a skipped step. accelerate 1.x looks at whether `step` was called, which a fused
        # optimizer's always is.
        scaler = self.trainer.accelerator.scaler
        if scaler is None or float(scaler.get_scale()) >= self._before:
            return
        self.skipped += 1
        if self.skipped == 1 or self.skipped % 10 == 0:
            self.show(
                f"step {state.global_step}: no update, the gradients overflowed float16 at this loss scale; it is "
                f"lowered to {scaler.get_scale():g} ({self.skipped} so far; a few at the start are normal)"
            )
