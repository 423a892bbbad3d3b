"""Diagnoses of the warm-up: of its own records, and of the first steps of GRPO after it. Torch-free, as diagnoses.py.

Losses are means over completion tokens, in nats. A loss of one batch is noisy: windows of several steps are compared.
"""

from __future__ import annotations

import math
import statistics

from grpo_lite.recipe.overrides import round_value
from grpo_lite.report.evidence import FEWEST, Evidence, Finding, mean

_LEARNT = 0.05  # a loss below it has nothing left to fall
_LOW_LORA_LR = 1e-4  # of supervised fine-tuning
_ONE_TEXT = 0.3  # entropy of a whole completion, in nats, below which one text has most of the probability


def warmup_loss_flat(e: Evidence) -> Finding | None:
    """The loss of the warm-up does not fall from its first to its last quarter, and the held-out loss neither."""
    losses, held = e.warmup_series("loss"), e.warmup_series("heldout_loss")
    if len(losses) < 2 * FEWEST or e.warmup_step < e.warmup_total / 2 or (held and held[-1] < 0.98 * held[0]):
        return None
    early, late, error = _quarters(losses)
    rate = e.recipe.warmup.learning_rate if e.recipe.warmup else math.nan
    start = f"The warm-up's loss went from {early:.2f} to {late:.2f} in {e.warmup_step} steps"
    if late - early > max(2 * error, 0.1 * early):
        sentence = f"{start}: the learning rate {rate:g} is too high."
        return Finding("warmup_loss_flat", sentence, f"warmup.learning_rate={round_value(rate / 3):g}")
    if early - late + error >= 0.05 * early or early < _LEARNT or _own_samples(e):
        return None
    if rate < _LOW_LORA_LR:
        sentence = f"{start}: the learning rate {rate:g} is too low for LoRA (1e-4 to 1e-3 works)."
        return Finding("warmup_loss_flat", sentence, "warmup.learning_rate=0.0002")
    return Finding(
        "warmup_loss_flat",
        f"{start}, so it teaches next to nothing at a learning rate of {rate:g}: read the rows, a completion may not "
        "follow from its prompt; or give it more steps.",
    )


def warmup_memorised(e: Evidence) -> Finding | None:
    """The training loss of the warm-up falls while the held-out loss rises or stays far above it."""
    losses = e.warmup_series("loss")
    held = [(record["heldout_loss"], record) for record in e.warmup_steps if record.get("heldout_loss") is not None]
    if len(losses) < 2 * FEWEST or not held:
        return None
    early, late, _ = _quarters(losses)
    lowest, best = min(held, key=lambda pair: pair[0])
    last, newest = held[-1]
    if late < early and last > lowest + max(0.1 * lowest, 0.05):
        return Finding(
            "warmup_memorised",
            f"The warm-up's held-out loss rose from {lowest:.2f} at step {best['step']} to {last:.2f}, while the "
            f"training loss fell to {late:.2f}: the adapter memorises the rows. Take more rows, or fewer steps.",
            fewer_steps(e, best["step"]),
        )
    passes = newest.get("epoch") or 0.0
    if passes > 1.05 and late < 0.5 * last and last - late > 0.1:
        return Finding(
            "warmup_memorised",
            f"After {passes:.1f} passes over the rows the warm-up's training loss is {late:.2f} and its held-out loss "
            f"{last:.2f}: the adapter memorises the rows. Take more rows, or one pass.",
            fewer_steps(e, math.ceil(newest["step"] / passes)),
        )
    return None


def warmup_earns_little(e: Evidence) -> Finding | None:
    """Completions of the warm-up earn nothing, or little, by the recipe's own rewards."""
    earning = e.warmup.get("earning") or {}
    tried, zero, top = earning.get("tried") or 0, earning.get("zero") or 0, earning.get("top") or math.nan
    if not tried or _own_samples(e):
        return None
    low = earning["mean"] < 0.7 * top
    if zero <= 0.1 * tried and not low:
        return None
    pay = f"{earning['mean']:.2f}" + ("" if math.isnan(top) else f" of at most {top:g}")
    return Finding(
        "warmup_earns_little",
        f"The warm-up's completions do not earn the recipe's rewards: {zero} of {tried} earn 0, the mean is {pay}. "
        "GRPO will train away what the warm-up teaches. Read them with `grpo-lite check`, and write warmup.completion "
        "in the format that the rewards look for, or change the rewards.",
    )


def warmup_collapse(e: Evidence) -> Finding | None:
    """After the warm-up, all completions of a group are the same text from the first steps of GRPO on."""
    if not e.warmup or solved_at_start(e):
        return None
    share = "refill/frac_without_signal" if e.recipe.sampling.refill > 0 else "frac_reward_zero_std"
    whole = e.early("entropy") * e.early("completions/mean_length")
    if not (min(e.early(share), e.late(share)) >= 0.85 and whole < _ONE_TEXT):
        return None
    return Finding(
        "warmup_collapse",
        f"After the warm-up the samples of a group are the same text: in GRPO's first steps a completion has an "
        f"entropy of {whole:.2f} nats, {e.early(share):.0%} of the groups have equal rewards, and {e.parts[0]} is at "
        f"{e.early(e.main):.2f}. There is nothing to compare. Warm up with fewer steps.",
        fewer_steps(e, e.warmup_total // 2),
    )


def solved_at_start(e: Evidence) -> bool:
    """Return whether the first reward is nearly at its top in the first steps of GRPO."""
    top = getattr(e.function(0), "top", None) or 1.0
    return e.early(e.main) >= 0.9 * top


def fewer_steps(e: Evidence, steps: int) -> str | None:
    """Return the override for a warm-up of so many steps, in the key that the recipe has; None without a warm-up."""
    section, steps = e.recipe.warmup, max(1, steps)
    if section is None:
        return None
    if section.epochs is None:
        return f"warmup.steps={steps}"
    return f"warmup.epochs={section.epochs * steps / max(steps, e.warmup_total):.2g}"


def _quarters(losses: list[float]) -> tuple[float, float, float]:
    """Return the mean of the first and the last quarter, and the standard error of their difference."""
    count = max(3, len(losses) // 4)
    first, last = losses[:count], losses[-count:]
    return mean(first), mean(last), math.sqrt((statistics.variance(first) + statistics.variance(last)) / count)


def _own_samples(e: Evidence) -> bool:
    """Return whether the rows are the base's own right completions: their loss is the base's entropy already."""
    return e.recipe.warmup is not None and e.recipe.warmup.source == "self"
