"""GRPO's arithmetic once more, in float64 numpy, written from the papers and independent of trl and torch.

The yardstick of test_grpo_math.py and of every test that claims "the same as GRPOTrainer". Where the papers leave room,
this follows TRL 1.16 (trl/trainer/grpo_trainer.py, the same in 1.14) and says so at the line. Arrays: N completions in
group order, B rows of a micro-batch, T completion positions (padded on the right), V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


@dataclass(frozen=True)
class Loss:
    """Loss of one micro-batch, its gradient by the token log-probabilities (B, T), and the metrics TRL logs."""

    loss: float
    gradient: Array
    metrics: dict[str, float]


def total_rewards(rewards: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Array:
    """Sum the weighted rewards (N, F) of each completion; NaN stands for a reward function's None.

    A None drops out of the sum without raising the other weights; only rows of nothing but None stay NaN.
    """
    rewards = np.asarray(rewards, np.float64)
    weighted = rewards * np.asarray(np.ones(rewards.shape[1]) if weights is None else weights, np.float64)
    return np.where(np.isnan(rewards).all(axis=1), np.nan, np.where(np.isnan(weighted), 0.0, weighted).sum(axis=1))


def group_advantages(rewards: npt.ArrayLike, group_size: int, scale_rewards: str = "group") -> Array:
    """Give the advantage of each completion over its group, (N,), from the total rewards (N,).

    (reward − mean) / (std + 1e-4): the mean is always the group's; the std is the group's ("group"), the whole
    batch's ("batch") or left out ("none"). Sample std (ddof 1) and ε = 1e-4 outside the root, as TRL has them. NaN
    rewards are left out of mean and std and get advantage 0; so does a completion that has no scored sibling, whose
    sample std is undefined.
    """
    grouped = np.asarray(rewards, np.float64).reshape(-1, group_size)
    advantages = np.zeros_like(grouped)
    for group, advantage in zip(grouped, advantages, strict=True):
        scored = ~np.isnan(group)
        spread = {"group": group[scored], "batch": grouped[~np.isnan(grouped)], "none": None}[scale_rewards]
        if not scored.any() or (spread is not None and len(spread) < 2):
            continue
        scale = 1.0 if spread is None else float(np.std(spread, ddof=1)) + 1e-4
        advantage[scored] = (group[scored] - group[scored].mean()) / scale
    return advantages.reshape(-1)


def token_log_probs(logits: Array, token_ids: npt.NDArray[np.int64], temperature: float = 1.0) -> Array:
    """Give log softmax(logits / temperature) at the tokens, (..., V) and (...,) -> (...,)."""
    return np.take_along_axis(_log_softmax(logits / temperature), token_ids[..., None], axis=-1)[..., 0]


def token_entropies(logits: Array, temperature: float = 1.0) -> Array:
    """Give the entropy in nats of softmax(logits / temperature), (..., V) -> (...,)."""
    log_probs = _log_softmax(logits / temperature)
    return -(np.exp(log_probs) * log_probs).sum(axis=-1)


def logits_gradient(
    gradient: Array, logits: Array, token_ids: npt.NDArray[np.int64], temperature: float = 1.0
) -> Array:
    """Carry a gradient by the token log-probabilities (...,) on to the logits (..., V)."""
    softmax = np.exp(_log_softmax(logits / temperature))
    one_hot = np.eye(logits.shape[-1])[token_ids]
    return gradient[..., None] * (one_hot - softmax) / temperature


def grpo_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    mask: Array,
    *,
    loss_type: LossType,
    max_completion_length: int,
    window_tokens: float,
    accumulation_steps: int = 1,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    ref_logps: Array | None = None,
    use_bias_correction_kl: bool = True,
) -> Loss:
    """Compute the clipped policy loss of one micro-batch, with the k3 estimate of the KL to the reference.

    Args:
        logps: log-probabilities (B, T) of the tokens under the policy, with which the gradient is taken.
        old_logps: the same under the policy that generated them.
        advantages: (B,), one per completion.
        mask: (B, T), 1 where a token counts.
        max_completion_length: Dr. GRPO's constant divisor.
        window_tokens: DAPO's divisor, the tokens that count in one optimizer step. TRL takes the average over the
            optimizer steps that share a generation batch.
        accumulation_steps: micro-batches per optimizer step; their losses add up to the step's.
        ref_logps: log-probabilities under the reference; needed when beta > 0.
        use_bias_correction_kl: weight the KL by the ratio, in value and gradient, as TRL does by default (1.14 on);
            False is the GRPO paper's KL.

    Source: Shao et al. 2024 (GRPO, equations 3 and 4); Liu et al. 2025 (Dr. GRPO); Yu et al. 2025 (DAPO, token-level
    loss); DeepSeek-AI 2025 (V3.2, ratio-weighted KL). bnpo is TRL's name for the token mean of the micro-batch.
    """
    ratio = np.exp(logps - old_logps)
    advantage = advantages[:, None]
    clipped = np.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    surrogate = np.minimum(ratio * advantage, clipped * advantage)
    # Where the clipped branch is the smaller one the surrogate is flat; elsewhere d(ratio)/d(logps) = ratio.
    flat = ratio * advantage > clipped * advantage
    per_token = -surrogate
    per_token_gradient = np.where(flat, 0.0, -ratio * advantage)
    metrics = _clip_metrics(ratio, advantage, mask, epsilon_low, epsilon_high)
    if beta:
        assert ref_logps is not None
        kl = np.exp(ref_logps - logps) - (ref_logps - logps) - 1.0
        kl_gradient = 1.0 - np.exp(ref_logps - logps)
        if use_bias_correction_kl:
            kl, kl_gradient = ratio * kl, ratio * (kl + kl_gradient)
        per_token = per_token + beta * kl
        per_token_gradient = per_token_gradient + beta * kl_gradient
        metrics["kl"] = masked_mean(kl, mask)
    weights = mask * _token_weights(mask, loss_type, max_completion_length, window_tokens, accumulation_steps)
    return Loss(float((per_token * weights).sum()), per_token_gradient * weights, metrics)


def masked_mean(x: Array | npt.NDArray[np.bool_], mask: Array) -> float:
    """Average over the tokens that count; 0 without any, as TRL logs it."""
    return float((x * mask).sum() / max(mask.sum(), 1.0))


def _token_weights(
    mask: Array, loss_type: LossType, max_completion_length: int, window_tokens: float, accumulation_steps: int
) -> Any:
    """Weight of each token in the step's loss, broadcastable to (B, T)."""
    rows, row_tokens = len(mask), np.maximum(mask.sum(axis=1, keepdims=True), 1.0)
    # An empty row (a masked truncated completion) still counts in the mean over rows: TRL divides by B, not by the
    # number of rows left.
    divisor = {
        "grpo": row_tokens * rows * accumulation_steps,
        "bnpo": max(mask.sum(), 1.0) * accumulation_steps,
        "dr_grpo": rows * max_completion_length * accumulation_steps,
        "dapo": max(window_tokens, 1.0),
    }[loss_type]
    return 1.0 / divisor


def _clip_metrics(ratio: Array, advantage: Array, mask: Array, low: float, high: float) -> dict[str, float]:
    """Shares of tokens whose ratio left the trust region on the side where that stops the gradient."""
    is_low = (ratio < 1 - low) & (advantage < 0)
    is_high = (ratio > 1 + high) & (advantage > 0)
    kept = mask.sum(axis=1) > 0  # rows without a token have no share; TRL's nanmin and nanmax skip them
    per_row = {
        name: (x * mask).sum(axis=1)[kept] / mask.sum(axis=1)[kept] for name, x in [("l", is_low), ("h", is_high)]
    }
    return {
        "clip_ratio/low_mean": masked_mean(is_low, mask),
        "clip_ratio/high_mean": masked_mean(is_high, mask),
        "clip_ratio/region_mean": masked_mean(is_low | is_high, mask),
        "clip_ratio/low_min": float(per_row["l"].min()) if kept.any() else float("nan"),
        "clip_ratio/high_max": float(per_row["h"].max()) if kept.any() else float("nan"),
    }


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
