"""The numpy reference of GRPO itself, against numbers derived by hand and central differences."""

import math
from typing import Any, get_args

import numpy as np
import pytest

from tests.trainer.grpo_reference import (
    Array,
    Loss,
    LossType,
    group_advantages,
    grpo_loss,
    logits_gradient,
    token_log_probs,
    total_rewards,
)

LOSS_TYPES = get_args(LossType)
NAN = math.nan
ONE_TOKEN: dict[str, Any] = {"loss_type": "grpo", "max_completion_length": 1, "window_tokens": 1}


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
