"""NaN and infinity: the step moves nothing, is counted, and too many in a row end the run; never in a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from grpo_lite.engine.options import EngineOptions
from grpo_lite.errors import TrainingError
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import parity_reward, tiny_args, tiny_model, train_fixed


def spoiled(kind: str, at: tuple[int, ...]) -> type[PackedGRPOTrainer]:
    """Return a trainer in which loss or gradient turns NaN or infinite in some steps."""

    class Spoiled(PackedGRPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.inf if kind == "loss" and self.state.global_step in at else loss

        def drop_step_unless_finite(self) -> None:
            if kind == "gradient" and self.state.global_step in at:
                next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan
            super().drop_step_unless_finite()

    return Spoiled


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
    assert trainer.faults == {"skipped_steps": 3}
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {1.0}
    assert trainer.state.global_step == 4


def test_the_next_good_step_counts_again(tmp_path: Path) -> None:
    trainer = run(tmp_path, spoiled("gradient", at=(0, 2)), max_skipped_steps=2)
    assert trainer.faults == {"skipped_steps": 2}
    assert trainer.faults_in_a_row["skipped_steps"] == 0


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
    assert trainer.faults == {"groups_with_overflowing_rewards": 1}
    assert torch.isfinite(weights(trainer)).all()


def test_an_adapter_with_nan_is_never_saved(tmp_path: Path) -> None:
    trainer = run(tmp_path, PackedGRPOTrainer)
    next(p for p in trainer.model.parameters() if p.requires_grad).data.view(-1)[3] = torch.inf
    with pytest.raises(TrainingError, match=r"the adapter holds NaN or infinity .*never saved"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*"))
