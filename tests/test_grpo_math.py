"""TRL's GRPOTrainer computes what the papers say: advantages, clipped loss, KL, averaging, and one whole SGD step.

First the reference itself, against numbers derived by hand and finite differences; then the real trainer, run on
scripted completions, against the reference.
"""

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from grpo_harness import (
    Group,
    assert_advantages_as_reference,
    assert_trained_as_reference,
    lora_weights,
    make_trainer,
    snapshot,
)
from grpo_reference import (
    Array,
    Loss,
    LossType,
    group_advantages,
    grpo_loss,
    logits_gradient,
    token_log_probs,
    total_rewards,
)
from trl import GRPOTrainer

LOSS_TYPES = get_args(LossType)
NAN = math.nan
ONE_TOKEN: dict[str, Any] = {"loss_type": "grpo", "max_completion_length": 1, "window_tokens": 1}

# Prompts and completions of different lengths, all below max_completion_length = 10; one completion never ends.
GROUPS = [
    Group("a b c", ["d e <eos>", "f <eos>", "g h i j <eos>", "k l <eos>"], [[1.0], [0.0], [0.5], [0.0]]),
    Group("n o", ["p <eos>", "q r <eos>", "s t s t s t s t", "u v w x <eos>"], [[0.0], [0.0], [1.0], [0.25]]),
]


@pytest.fixture(autouse=True, scope="module")
def _little_overhead() -> Iterator[None]:
    """Halve the time of these tests: threads cost 32-channel products more than they save, and every `train()` collects
    garbage, 0.3 s of it spent on the modules imported here.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def with_rewards(*rewards: list[list[float | None]]) -> list[Group]:
    """GROUPS with other rewards: one list per group, in it one list per completion."""
    return [Group(g.prompt, g.completions, new) for g, new in zip(GROUPS, rewards, strict=True)]


# --- the reference, by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "scale", "expected"),
    [
        # mean 1/4, sum of squares (9 + 3)/16 = 3/4, over n−1 = 3: std 1/2.
        pytest.param([1, 0, 0, 0], "group", [0.75 / 0.5001] + [-0.25 / 0.5001] * 3, id="sample std plus 1e-4"),
        pytest.param([1, 0, 0, 0], "none", [0.75, -0.25, -0.25, -0.25], id="unscaled"),
        # Batch mean 3/8; squares 3 × 25/64 + 5 × 9/64 = 120/64, over 7: std sqrt(15/56). Means stay the groups'.
        pytest.param(
            [1, 0, 0, 0, 1, 1, 0, 0],
            "batch",
            np.array([0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]) / (math.sqrt(15 / 56) + 1e-4),
            id="batch std",
        ),
        pytest.param([0.5] * 4, "group", [0.0] * 4, id="identical"),
        # None left out: mean 1/2, std sqrt(1/2) of the two that count.
        pytest.param([1, NAN, 0, NAN], "group", np.array([0.5, 0, -0.5, 0]) / (math.sqrt(0.5) + 1e-4), id="two None"),
        pytest.param([1, NAN, NAN, NAN], "group", [0.0] * 4, id="one scored"),
        pytest.param([NAN] * 4, "group", [0.0] * 4, id="all None"),
        pytest.param([NAN, 3, NAN, NAN], "none", [0.0] * 4, id="one scored, unscaled"),
    ],
)
def test_reference_advantages_equal_hand_derived_ones(rewards: list[float], scale: str, expected: list[float]) -> None:
    np.testing.assert_allclose(group_advantages(rewards, 4, scale), expected, rtol=1e-12)


def test_reference_sums_weighted_rewards_and_lets_none_drop_out() -> None:
    totals = total_rewards([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]], [1.0, 0.25])
    np.testing.assert_array_equal(totals, [1.5, 0.5, NAN])


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", -0.5),  # mean over rows of the row's token mean: (−2 + 1) / 2
        ("bnpo", -1.0),  # token mean: (−2 −2 + 1) / 3
        ("dr_grpo", -0.375),  # (−2 −2 + 1) / (2 rows × 4 tokens at most)
        ("dapo", -0.5),  # (−2 −2 + 1) / 6 tokens in the optimizer step
    ],
)
def test_reference_averages_tokens_as_each_loss_type_says(loss_type: LossType, expected: float) -> None:
    # Ratio 1, so each token's loss is minus its row's advantage: 2 with two tokens, −1 with one.
    mask = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    logps = np.full((2, 3), -1.5)
    settings: dict[str, Any] = {"loss_type": loss_type, "max_completion_length": 4, "window_tokens": 6}
    assert grpo_loss(logps, logps, np.array([2.0, -1.0]), mask, **settings).loss == pytest.approx(expected, rel=1e-12)
    halves = grpo_loss(logps, logps, np.array([2.0, -1.0]), mask, **settings, accumulation_steps=2)
    # DAPO's divisor already spans the step; the others are means per micro-batch and must be divided.
    assert halves.loss == pytest.approx(expected if loss_type == "dapo" else expected / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        pytest.param(1.0, 2.0, -2.0, -2.0, id="on policy"),
        pytest.param(1.5, 1.0, -1.25, 0.0, id="raised enough: flat at 1 + 0.25"),
        pytest.param(1.5, -1.0, 1.5, 1.5, id="raised though bad: pulled back"),
        pytest.param(0.5, 1.0, -0.5, -0.5, id="lowered though good: pulled back"),
        pytest.param(0.5, -1.0, 0.8, 0.0, id="lowered enough: flat at 1 - 0.2"),
        pytest.param(1.5, 0.0, 0.0, 0.0, id="no advantage"),
    ],
)
def test_reference_clips_only_where_the_policy_already_went(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    one = np.ones((1, 1))
    result = grpo_loss(np.log(ratio * one), 0 * one, np.array([advantage]), one, **ONE_TOKEN, epsilon_high=0.25)
    assert (result.loss, result.gradient.item()) == pytest.approx((loss, gradient), abs=1e-12)
    clipped = gradient == 0.0 and advantage != 0.0
    assert result.metrics["clip_ratio/region_mean"] == clipped
    assert result.metrics["clip_ratio/low_mean"] == (clipped and ratio < 1)
    assert result.metrics["clip_ratio/high_mean"] == (clipped and ratio > 1)


@pytest.mark.parametrize(
    ("weighted", "kl", "gradient"),
    [
        # Reference twice as likely: k3 = 2 − ln 2 − 1, slope 1 − 2. Ratio to the policy that generated: 2.
        pytest.param(False, 1 - math.log(2), -1.0, id="GRPO paper"),
        pytest.param(True, 2 * (1 - math.log(2)), 2 * (1 - math.log(2)) - 2.0, id="ratio-weighted, TRL's default"),
    ],
)
def test_reference_kl_equals_the_hand_derived_one(weighted: bool, kl: float, gradient: float) -> None:
    logps = np.array([[-2.0]])
    old, ref = logps - math.log(2), logps + math.log(2)
    settings = ONE_TOKEN | {"beta": 0.5, "ref_logps": ref, "use_bias_correction_kl": weighted}
    result = grpo_loss(logps, old, np.zeros(1), np.ones((1, 1)), **settings)
    assert result.metrics["kl"] == pytest.approx(kl, rel=1e-12)
    assert (result.loss, result.gradient.item()) == pytest.approx((0.5 * kl, 0.5 * gradient), rel=1e-12)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_reference_gradient_by_logits_equals_central_differences(loss_type: LossType, weighted: bool) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1, (3, 4, 5))
    tokens = rng.integers(0, 5, (3, 4))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=np.float64)
    old, ref = token_log_probs(logits, tokens) + rng.normal(0, 0.5, (2, 3, 4))
    settings: dict[str, Any] = {"loss_type": loss_type, "max_completion_length": 6, "window_tokens": 9}
    settings |= {"accumulation_steps": 2, "beta": 0.3, "ref_logps": ref, "use_bias_correction_kl": weighted}

    def loss_of(values: Array) -> Loss:
        logps = token_log_probs(values, tokens, 0.7)
        return grpo_loss(logps, old, np.array([1.3, -0.4, 2.0]), mask, **settings)

    numeric = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-6
        numeric[index] = (loss_of(logits + step).loss - loss_of(logits - step).loss) / 2e-6
    analytic = logits_gradient(loss_of(logits).gradient, logits, tokens, 0.7)
    assert 0.0 < loss_of(logits).metrics["clip_ratio/region_mean"] < 1.0  # both branches are under test
    np.testing.assert_allclose(analytic, numeric, atol=1e-8)


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
