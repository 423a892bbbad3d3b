"""TRL's GRPOTrainer computes what the papers say: advantages, clipped loss, KL, averaging, and one whole SGD step.

The real trainer, run on scripted completions, against grpo_reference (see test_grpo_reference.py).
"""

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from trl import GRPOTrainer

from grpo_lite.models.reference import hold_reference
from tests.trainer.grpo_harness import (
    Group,
    assert_advantages_as_reference,
    assert_trained_as_reference,
    lora_weights,
    make_trainer,
    replay,
    snapshot,
)
from tests.trainer.grpo_reference import LossType

LOSS_TYPES = get_args(LossType)

# Prompts and completions of different lengths, all below max_completion_length = 10; one completion never ends.
GROUPS = [
    Group("a b c", ["d e <eos>", "f <eos>", "g h i j <eos>", "k l <eos>"], [[1.0], [0.0], [0.5], [0.0]]),
    Group("n o", ["p <eos>", "q r <eos>", "s t s t s t s t", "u v w x <eos>"], [[0.0], [0.0], [1.0], [0.25]]),
]


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection() -> Iterator[None]:
    """Halve the time of these tests: every `train()` collects garbage and searches all of torch for it, 0.3 s."""
    gc.freeze()
    yield
    gc.unfreeze()


def with_rewards(*rewards: list[list[float | None]]) -> list[Group]:
    """GROUPS with other rewards: one list per group, in it one list per completion."""
    return [Group(g.prompt, g.completions, new) for g, new in zip(GROUPS, rewards, strict=True)]


# --- the trainer: advantages ----------------------------------------------------------------------------------------

ONE_REWARD = with_rewards([[1.0], [0.0], [0.5], [0.0]], [[0.0], [0.0], [1.0], [0.25]])
TWO_REWARDS = with_rewards(
    [[1.0, 3.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], [[2.0, 0.5], [0.0, 0.0], [1.0, 1.0], [0.0, 9.0]]
)
WITH_NONE = with_rewards(
    [[None, 1.0], [None, None], [1.0, None], [0.0, 0.5]],  # one completion nobody could score
    [[None, None], [None, None], [None, None], [1.0, 1.0]],  # a single one somebody could
)


@pytest.mark.parametrize(
    ("groups", "config"),
    [
        pytest.param(ONE_REWARD, {}, id="one reward"),
        pytest.param(ONE_REWARD, {"scale_rewards": "batch"}, id="batch std"),
        pytest.param(ONE_REWARD, {"scale_rewards": "none"}, id="unscaled"),
        pytest.param(TWO_REWARDS, {}, id="two rewards"),
        pytest.param(TWO_REWARDS, {"reward_weights": [0.75, -0.1]}, id="weighted"),
        pytest.param(WITH_NONE, {"reward_weights": [1.0, 0.2]}, id="None"),
        pytest.param(WITH_NONE, {"scale_rewards": "batch"}, id="None, batch std"),
        pytest.param(WITH_NONE, {"scale_rewards": "none"}, id="None, unscaled"),
        pytest.param(with_rewards([[None]] * 4, [[1.0], [None], [None], [0.0]]), {}, id="a group of None"),
    ],
)
def test_trainer_scores_a_batch_with_the_reference_advantages(
    groups: list[Group], config: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, groups, **config)
    rows = [{"prompt": group.prompt} for group in groups for _ in group.completions]
    batch = trainer._generate_and_score_completions(rows)
    assert len(batch["advantages"]) == 8
    assert_advantages_as_reference(trainer)


# --- the trainer: loss, metrics and one SGD step --------------------------------------------------------------------

SECOND_ITERATION: dict[str, Any] = {"beta": 0.1, "num_iterations": 2, "max_steps": 2, "learning_rate": 0.1}


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_optimizer_step_over_two_micro_batches_equals_the_reference(
    loss_type: str, beta: float, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path, GROUPS, loss_type=loss_type, beta=beta, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer.train()
    batches = assert_trained_as_reference(trainer)
    assert len(batches) == 2
    assert ("kl" in batches[0].metrics) == (beta > 0)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(sum(batch.reference.loss for batch in batches), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_second_iteration_clips_against_the_policy_that_generated(loss_type: str, tmp_path: Path) -> None:
    trust_region: dict[str, Any] = {"epsilon": 0.1, "epsilon_high": 0.15}
    trainer = make_trainer(tmp_path, GROUPS, loss_type=loss_type, **SECOND_ITERATION, **trust_region)
    trainer.train()
    first, second = assert_trained_as_reference(trainer)
    assert len(trainer.scored) == 1  # generated once
    assert first.metrics["clip_ratio/region_mean"] == 0.0
    assert 0.0 < second.metrics["clip_ratio/low_mean"] < 1.0
    assert 0.0 < second.metrics["clip_ratio/high_mean"] < 1.0


class DriftingTrainer(GRPOTrainer):
    """Meets a policy that went anywhere since it generated, not only where the advantages pulled it."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        generator = torch.Generator().manual_seed(2)
        for weight in lora_weights(self.model).values():
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        return batch


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ratio_on_the_far_side_is_clipped_only_where_the_advantage_points_there(loss_type: str, tmp_path: Path) -> None:
    # ε so small that every token left the trust region: with the advantage's sign it is clipped, against it it is not.
    trainer = make_trainer(tmp_path, GROUPS, DriftingTrainer, loss_type=loss_type, num_iterations=2, epsilon=1e-4)
    trainer.train()
    (batch,) = assert_trained_as_reference(trainer)
    assert 0.1 < batch.metrics["clip_ratio/low_mean"] < 0.4
    assert 0.1 < batch.metrics["clip_ratio/high_mean"] < 0.4


def test_kl_of_the_grpo_paper_is_one_option_away(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GROUPS, use_bias_correction_kl=False, **SECOND_ITERATION)
    trainer.train()
    paper = assert_trained_as_reference(trainer)
    trainer = make_trainer(tmp_path, GROUPS, **SECOND_ITERATION)
    trainer.train()
    default = assert_trained_as_reference(trainer)
    # On policy the ratio is 1 and the value the same, but its gradient is not: the second steps start elsewhere.
    assert paper[0].loss == pytest.approx(default[0].loss, rel=1e-6)
    assert paper[1].metrics["kl"] != pytest.approx(default[1].metrics["kl"], rel=0.01)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_kl_to_the_start_equals_the_float64_reference(loss_type: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GROUPS, loss_type=loss_type, **SECOND_ITERATION)
    hold_reference(trainer.model)
    trainer.start = snapshot(trainer.model)
    generator = torch.Generator().manual_seed(5)
    for weight in lora_weights(trainer.model).values():  # a policy that has moved since the start
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    held = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".ref." in name}
    trainer.train()
    first, second = assert_trained_as_reference(trainer)
    trainer.start = None
    to_base = replay(trainer)
    assert first.metrics["kl"] > 1e-3
    assert first.metrics["kl"] != pytest.approx(to_base[0].reference.metrics["kl"], rel=0.05)
    assert second.metrics["kl"] != pytest.approx(first.metrics["kl"], rel=1e-3)
    after = dict(trainer.model.named_parameters())
    assert len(held) == len(lora_weights(trainer.model))
    assert all(torch.equal(after[name], value) and not after[name].requires_grad for name, value in held.items())


def test_kl_to_the_start_is_zero_in_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GROUPS, beta=0.1)
    hold_reference(trainer.model)
    trainer.start = snapshot(trainer.model)
    trainer.train()
    (batch,) = assert_trained_as_reference(trainer)
    assert batch.metrics["kl"] == 0.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_two_optimizer_steps_on_one_generation_equal_the_reference(loss_type: str, tmp_path: Path) -> None:
    # 4 micro-batches of 2 rows, 2 per optimizer step: groups are torn apart, and DAPO's divisor spans a step only.
    batching: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    }
    trainer = make_trainer(tmp_path, GROUPS, loss_type=loss_type, max_steps=2, learning_rate=0.05, **batching)
    trainer.train()
    assert len(assert_trained_as_reference(trainer)) == 4
    assert len(trainer.scored) == 1


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_truncated_completion_leaves_loss_and_gradient(loss_type: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GROUPS, loss_type=loss_type, beta=0.1, mask_truncated_completions=True)
    trainer.train()
    (batch,) = assert_trained_as_reference(trainer)
    truncated = [row for row in batch.reference.gradient if not row.any()]
    assert len(truncated) == 1


def test_temperature_divides_the_logits_of_policy_and_reference(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GROUPS, temperature=0.6, beta=0.1)
    trainer.train()
    assert_trained_as_reference(trainer)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GROUPS, gradient_checkpointing=True, beta=0.1)
    trainer.train()
    assert_trained_as_reference(trainer)


# --- the trainer: nothing to learn from -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rewards",
    [
        pytest.param(with_rewards([[1.0]] * 4, [[0.0]] * 4), id="identical"),
        pytest.param(with_rewards([[None]] * 4, [[None]] * 4), id="None"),
        pytest.param(with_rewards([[None], [2.0], [None], [2.0]], [[0.5]] * 4), id="identical where scored"),
    ],
)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rewards_without_a_difference_move_no_weight(loss_type: str, rewards: list[Group], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rewards, loss_type=loss_type)
    before = snapshot(trainer.model)
    trainer.train()
    (batch,) = assert_trained_as_reference(trainer)
    assert batch.loss == 0.0
    assert not trainer.scored[0]["advantages"].any()
    after = snapshot(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_identical_rewards_still_feel_the_kl(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, with_rewards([[1.0]] * 4, [[0.0]] * 4), beta=0.1)
    before = snapshot(trainer.model)
    trainer.train()
    (batch,) = assert_trained_as_reference(trainer)
    assert batch.loss > 0.0
    after = snapshot(trainer.model)
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_identical_rewards_that_float32_cannot_average_leave_a_residue(tmp_path: Path) -> None:
    # TRL averages in float32: the mean of eight 0.7 is off by one unit in the last place, 6e-8, and all eight get the
    # advantage 6e-8 / (6.4e-8 + 1e-4) = 6e-4. Whoever drops zero-advantage rows must not wait for exactly 0.
    completions = [f"{word} <eos>" for word in "abcdefgh"]
    trainer = make_trainer(tmp_path, [Group("n o", completions, [[0.7]] * 8)])
    trainer.train()
    (advantage,) = set(trainer.scored[0]["advantages"].tolist())
    assert abs(advantage) == pytest.approx(6e-4, rel=0.05)
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 0.0  # and so TRL does not count the group


# --- the yardstick itself -------------------------------------------------------------------------------------------


class PopulationStdTrainer(GRPOTrainer):
    """Scales advantages as ddof 0 would."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        batch["advantages"] = batch["advantages"] * math.sqrt(4 / 3)
        return batch


class PaddingTrainer(GRPOTrainer):
    """Forgets that padding does not count."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        return super()._compute_loss(model, inputs | {"completion_mask": torch.ones_like(inputs["completion_mask"])})


class HalfGradientTrainer(GRPOTrainer):
    """Gives the right loss with half its gradient."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        return (loss + loss.detach()) / 2


class StaleReferenceTrainer(GRPOTrainer):
    """Takes the policy itself as the reference."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        batch["ref_per_token_logps"] = batch["old_per_token_logps"]
        return batch


@pytest.mark.parametrize(
    "trainer_class", [PopulationStdTrainer, PaddingTrainer, HalfGradientTrainer, StaleReferenceTrainer]
)
def test_a_wrong_trainer_is_noticed(trainer_class: type[GRPOTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GROUPS, trainer_class, beta=0.1, num_iterations=2)
    trainer.train()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_trained_as_reference(trainer)
