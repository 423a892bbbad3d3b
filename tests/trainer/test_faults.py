"""NaN and infinity: the step moves nothing, is counted, and too many in a row end the run; never in a saved adapter."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from grpo_lite.engine.options import EngineOptions
from grpo_lite.errors import TrainingError
from grpo_lite.trainer.finite import Faults, are_finite
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import parity_reward, tiny_args, tiny_model, train_fixed


def spoiled(kind: str, at: tuple[int, ...]) -> type[PackedGRPOTrainer]:
    """Return a trainer in which loss or gradient turns NaN or infinite in some steps."""

    class Spoiled(PackedGRPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.inf if kind == "loss" and self.state.global_step in at else loss

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if kind == "gradient":
                self.callback_handler.callbacks.insert(0, SpoilGradient(at))

    return Spoiled


class SpoilGradient(TrainerCallback):
    def __init__(self, at: tuple[int, ...]) -> None:
        self.at = at

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.at:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan


def run(
    tmp_path: Path, trainer_class: type[PackedGRPOTrainer], reward: Any = parity_reward, **options: Any
) -> PackedGRPOTrainer:
    args = tiny_args(tmp_path, max_steps=4, weight_decay=0.1, max_grad_norm=1.0)
    trainer, _ = train_fixed(
        trainer_class, tiny_model("llama"), args, reward=reward, options=EngineOptions(**options),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    assert isinstance(trainer, PackedGRPOTrainer)
    return trainer


def weights(trainer: PackedGRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_the_optimizer(tmp_path: Path, kind: str) -> None:
    trainer = run(tmp_path, spoiled(kind, at=(1, 2, 3)))
    undisturbed = tiny_args(tmp_path / "one", max_steps=1, weight_decay=0.1, max_grad_norm=1.0)
    one, _ = train_fixed(
        PackedGRPOTrainer, tiny_model("llama"), undisturbed, peft_config=LoraConfig(r=2, target_modules="all-linear")
    )
    assert torch.equal(weights(trainer), weights(one))  # only the first of four steps counted
    assert trainer.faults.counts == {"skipped_steps": 3}
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {1.0}
    assert trainer.state.global_step == 4


def test_the_next_good_step_counts_again(tmp_path: Path) -> None:
    trainer = run(tmp_path, spoiled("gradient", at=(0, 2)), max_skipped_steps=2)
    assert trainer.faults.counts == {"skipped_steps": 2}
    assert trainer.faults.in_a_row["skipped_steps"] == 0


def test_too_many_in_a_row_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss was NaN or infinite in 2 steps in a row.*Lower grpo.learning"):
        run(tmp_path, spoiled("loss", at=(1, 2, 3)), max_skipped_steps=2)


@pytest.mark.parametrize("value", [3e38, 1e20, float("inf"), -float("inf")])
def test_a_group_whose_rewards_overflow_is_left_out(tmp_path: Path, value: float) -> None:
    def reward(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        rewards = parity_reward(completion_ids)
        if trainer_state.global_step == 1:
            rewards[0] = rewards[1] = value
        return rewards

    trainer = run(tmp_path, PackedGRPOTrainer, reward)
    assert trainer.faults.counts == {"groups_with_overflowing_rewards": 1}
    assert torch.isfinite(weights(trainer)).all()


class Failing:
    """A reward that could not be computed for the first group; `GuardedReward` says so as `excluded`."""

    __name__ = "failing"
    excluded = (0, 1, 2, 3)

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None] * 4 + [0.5] * (len(completion_ids) - 4)


def test_a_group_that_one_of_two_rewards_failed_for_is_left_out_before_anyone_reads_its_rewards(
    tmp_path: Path,
) -> None:
    """The other reward still paid its completions: neither TRL nor the refill may see that as a signal."""
    scored: list[torch.Tensor] = []

    class Watched(PackedGRPOTrainer):
        def _calculate_rewards(self, *args: Any) -> torch.Tensor:
            scored.append(super()._calculate_rewards(*args))
            return scored[-1]

    args = tiny_args(tmp_path, max_steps=1, num_generations=4)
    trainer, _ = train_fixed(
        Watched, tiny_model("llama"), args, reward=[parity_reward, Failing()], options=EngineOptions(refill=1),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    assert torch.isnan(scored[0][:4]).all()
    assert not torch.isnan(scored[0][4:]).any()
    assert trainer.faults.counts["excluded_groups"] == len(scored)
    assert trainer.state.log_history[0]["refill/groups_generated"] == 1  # the excluded group has no signal


def test_faults_need_no_trainer_of_ours() -> None:
    """A stand-in with two groups of two: the reward of one row overflows, so that its group is left out."""
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    accelerator = SimpleNamespace(num_processes=1, gather=lambda tensor: tensor)
    faults = Faults(
        SimpleNamespace(
            add_callback=lambda callback: None, accelerator=accelerator, num_generations=2, _metrics=metrics,
            reward_funcs=[parity_reward], reward_weights=torch.ones(1),
        ),
        most_in_a_row=1,
    )  # fmt: skip
    rewards = torch.tensor([[1.0], [2.0], [3.0], [1e30]])
    faults.exclude(rewards)
    assert torch.isnan(rewards.squeeze(1)).tolist() == [False, False, True, True]
    assert faults.counts == {"groups_with_overflowing_rewards": 1}
    assert metrics["train"]["faults/groups_with_overflowing_rewards"] == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_in_one_tiny_gradient_among_many_is_noticed(value: float, dtype: torch.dtype) -> None:
    gradients = [torch.randn(16, 64).to(dtype) for _ in range(300)] + [torch.zeros(1, dtype=dtype)]
    assert are_finite(gradients)
    gradients[-1][0] = value
    assert not are_finite(gradients)
    gradients[-1][0] = 0.0
    gradients[200][3, 5] = value
    assert not are_finite(gradients)


def test_large_gradients_are_finite_though_their_squares_are_not() -> None:
    assert are_finite([torch.full((4, 4), 3e38), torch.full((4,), -6e4, dtype=torch.float16)])


def test_an_adapter_with_nan_is_never_saved(tmp_path: Path) -> None:
    trainer = run(tmp_path, PackedGRPOTrainer)
    next(p for p in trainer.model.parameters() if p.requires_grad).data.view(-1)[3] = torch.inf
    with pytest.raises(TrainingError, match=r"the adapter holds NaN or infinity .*never saved"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*"))
