"""What the metrics give away: small pure functions, each of one disease, from Evidence to a Finding or None.

NaN comparisons are false, so a figure that is not known yet never leads to a finding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from grpo_lite.evidence import FEWEST, Evidence, Finding, mean_of

LOW_LORA_LR = 5e-6
_PENALTIES = ("penalty", "punishment")  # their top is 0
_GOLD_ADVICE = "look at them with `grpo-lite check` and name the right column in data.answer"


def truncation(e: Evidence) -> Finding | None:
    """Completions hit the cap, and those that do earn less than half of what finished ones earn."""
    clipped = e.late("completions/clipped_ratio")
    if not clipped >= 0.2 or zero_reward(e):
        return None
    known = [row for row in e.rows() if row.get("truncated") is not None]
    cut = mean_of([row for row in known if row["truncated"]], e.parts[0])
    finished = [row for row in known if not row["truncated"]]
    enough = len(finished) >= max(4, 0.05 * len(known))  # to say what finishing earns
    whole = mean_of(finished, e.parts[0]) if enough else math.nan
    earned = e.late(e.main) if math.isnan(cut) else cut
    harmful = earned <= 0 if math.isnan(whole) else earned < whole / 2
    if not harmful:
        return None
    cap = e.recipe.max_completion_length
    against = "" if math.isnan(whole) else f" where finished ones earn {whole:.2f}"
    return Finding(
        "truncation",
        f"{clipped:.0%} of the completions are cut off at {cap} tokens, and those earn {earned:.2f}{against}.",
        f"grpo.max_completion_length={2 * cap}",
    )


def zero_reward(e: Evidence) -> Finding | None:
    """The first reward has been 0 throughout: with the reason, as far as it shows."""
    values = e.series(e.main)
    if len(values) < FEWEST or max(values) > 0:
        return None
    part = e.parts[0]
    start = f"{part} has been 0 for all {len(values)} steps"
    if e.late(f"{part}/unusable_gold") >= 0.5:
        share = e.late(f"{part}/unusable_gold")
        return Finding("zero_reward", f"{start}: {share:.0%} of the gold answers cannot be used; {_GOLD_ADVICE}.")
    if e.late("completions/clipped_ratio") >= 0.9:
        cap = e.recipe.max_completion_length
        return Finding(
            "zero_reward",
            f"{start}: {e.late('completions/clipped_ratio'):.0%} of the completions are cut off at {cap} tokens, "
            "before an answer.",
            f"grpo.max_completion_length={2 * cap}",
        )
    if half_open_thinking(e) >= 0.5:
        return _prefilled(e, "zero_reward", start, 0)
    if e.late(f"{part}/no_answer") >= 0.5:
        return Finding(
            "zero_reward",
            f"{start}: in {e.late(f'{part}/no_answer'):.0%} of the completions the parser finds no committed answer.",
            "rewards[0].kwargs.extract=[answer_tag,boxed,hash,phrase,last_number]",
        )
    return Finding(
        "zero_reward",
        f"{start}, though answers are found and read: they are wrong, so the task is too hard for this model as it is.",
        "grpo.num_generations=16",
    )


def half_open_thinking(e: Evidence) -> float:
    """Return the share of late completions that close a thinking block which they did not open."""
    rows = e.rows()
    half = [row for row in rows if "</think>" in row["completion"] and "<think>" not in row["completion"]]
    return len(half) / len(rows) if rows else 0.0


def _prefilled(e: Evidence, key: str, start: str, index: int) -> Finding:
    takes_it = e.parts[index] in ("accuracy_reward", "format_reward")
    return Finding(
        key,
        f"{start}: completions close </think> without opening it, because the template has already written <think>.",
        f"rewards[{index}].kwargs.prefilled=true" if takes_it else None,
    )


def zero_part(e: Evidence) -> Finding | None:
    """A further reward (not a penalty) has been 0 throughout."""
    for index, part in enumerate(e.parts[1:], start=1):
        values = e.series(f"rewards/{part}/mean")
        if _is_penalty(part) or len(values) < FEWEST or any(value != 0 for value in values):
            continue
        start = f"{part} has been 0 for all {len(values)} steps"
        if half_open_thinking(e) >= 0.5:
            return _prefilled(e, "zero_part", start, index)
        return Finding("zero_part", f"{start}, so it teaches nothing.", f"rewards[{index}].weight=0")
    return None


def _is_penalty(part: str) -> bool:
    return any(word in part for word in _PENALTIES)


def equal_groups(e: Evidence) -> Finding | None:
    """Nearly every group has equal rewards: no advantage, no gradient."""
    refilled = e.recipe.sampling.refill > 0
    share = e.late("refill/frac_without_signal" if refilled else "frac_reward_zero_std")
    if not share >= 0.85 or zero_reward(e):
        return None
    groups = e.recipe.generation_batch // e.recipe.num_generations
    if _solved(e):
        return Finding(
            "equal_groups",
            f"In {share:.0%} of the groups all completions earn the same, and nearly all earn the most there is: the "
            "prompts are solved, and further steps teach nothing.",
            "sampling.difficulty=true",
        )
    return Finding(
        "equal_groups",
        f"In {share:.0%} of the groups all completions earn the same, so they give no gradient.",
        f"grpo.num_generations={2 * e.recipe.num_generations}"
        if refilled
        else f"sampling.refill={max(1, groups)} sampling.difficulty=true",
    )


def _solved(e: Evidence) -> bool:
    return e.late(e.main) >= 0.9


def format_up_accuracy_flat(e: Evidence) -> Finding | None:
    """A further reward rises while the first one does not: the form is learnt, not the task."""
    if _solved(e) or e.rises(e.main) is not False:
        return None
    for index, part in enumerate(e.parts[1:], start=1):
        key = f"rewards/{part}/mean"
        if e.rise(key) >= 0.2 and not _is_penalty(part) and not e.recipe.rewards[index].gate:
            return Finding(
                "format_up_accuracy_flat",
                f"{part} rose from {e.early(key):.2f} to {e.late(key):.2f} while {e.parts[0]} stayed at "
                f"{e.late(e.main):.2f}: the form is learnt, not the task.",
                f"rewards[{index}].gate=true",
            )
    return None


def length_collapse(e: Evidence) -> Finding | None:
    """Completions shrink to less than 0.4 of their length, and the first reward does not rise."""
    before, after = e.early("completions/mean_length"), e.late("completions/mean_length")
    if not after < 0.4 * before or before < 4 or e.rises(e.main) is not False:
        return None
    return Finding(
        "length_collapse",
        f"Completions shrank from {before:.0f} to {after:.0f} tokens while {e.parts[0]} did not rise "
        f"({e.early(e.main):.2f} → {e.late(e.main):.2f}).",
        f"grpo.beta={max(0.04, 2 * e.grpo('beta', 0.0)):g}",
    )


def length_growth(e: Evidence) -> Finding | None:
    """Completions grow to more than twice their length, and the first reward does not rise."""
    before, after = e.early("completions/mean_length"), e.late("completions/mean_length")
    if not after > 2 * before or e.rises(e.main) is not False:
        return None
    loss = str(e.recipe.grpo.get("loss_type") or "dapo")
    cure = "grpo.loss_type=dr_grpo" if loss == "grpo" else "grpo.mask_truncated_completions=true"
    return Finding(
        "length_growth",
        f"Completions grew from {before:.0f} to {after:.0f} tokens while {e.parts[0]} did not rise "
        f"({e.early(e.main):.2f} → {e.late(e.main):.2f}).",
        cure,
    )


def entropy_collapse(e: Evidence) -> Finding | None:
    """The policy has become nearly deterministic before the task is solved."""
    before, after = e.early("entropy"), e.late("entropy")
    if not (after < 0.15 * before and after < 0.3) or _solved(e):
        return None
    return Finding(
        "entropy_collapse",
        f"Entropy fell from {before:.2f} to {after:.2f} nats a token while {e.parts[0]} is at {e.late(e.main):.2f}: "
        "samples of a group are nearly the same, and there is little left to choose from.",
        _lower_lr(e),
    )


def _lower_lr(e: Evidence) -> str:
    return f"grpo.learning_rate={e.grpo('learning_rate', 2e-5) / 3:.1g}"


def kl_blow_up(e: Evidence) -> Finding | None:
    """The policy has left the base model: more than one nat a token, where useful runs stay well below a half."""
    early, late = e.early("kl"), e.late("kl")
    if not late > 1:
        return None
    return Finding(
        "kl_blow_up",
        f"KL to the base model went from {early:.2g} to {late:.2g} nats a token: the model is leaving its language.",
        f"{_lower_lr(e)} grpo.beta={max(0.04, 3 * e.grpo('beta', 0.0)):g}",
    )


def grad_norm_spikes(e: Evidence) -> Finding | None:
    """Single steps of the last fifty whose gradient is, after clipping, more than ten times the median."""
    values = [value for value in e.series("grad_norm") if value > 0][-50:]
    if len(values) < 2 * FEWEST:
        return None
    median = statistics.median(values)
    clip = e.grpo("max_grad_norm", 1.0) or math.inf
    spikes = [value for value in values if min(value, clip) > 10 * median]
    if not spikes:
        return None
    return Finding(
        "grad_norm_spikes",
        f"{len(spikes)} of the last {len(values)} steps had a gradient norm up to {max(spikes):.3g}, against a "
        f"median of {median:.2g}.",
        f"grpo.max_grad_norm={median:.1g}",
    )


def fp16_scale_skips(e: Evidence) -> Finding | None:
    """The grad scaler skips steps because float16 gradients overflow; a few at the start are normal."""
    if not _trains_in_fp16(e):
        return None
    late = [record.get("grad_norm") for record in e.steps[-max(8, e.window) :]]
    skipped = sum(1 for value in late if value is None or not math.isfinite(value))
    if len(e.steps) < 2 * FEWEST or skipped < 3 or skipped < len(late) / 4:
        return None
    return Finding(
        "fp16_scale_skips",
        f"{skipped} of the last {len(late)} steps were skipped because gradients overflowed float16.",
        f"{_lower_lr(e)} grpo.max_grad_norm=0.3",
    )


def _trains_in_fp16(e: Evidence) -> bool:
    asked = e.recipe.model.dtype
    device: Mapping[str, object] = e.device
    return asked == "float16" or (asked == "auto" and device.get("kind") == "cuda" and not device.get("bfloat16"))


def learning_rate_too_low(e: Evidence) -> Finding | None:
    """A learning rate for full fine-tuning: LoRA learns nothing with it."""
    rate = e.grpo("learning_rate", 2e-5)
    if rate >= LOW_LORA_LR or e.rises("reward") is not False or _solved(e):
        return None
    return Finding(
        "learning_rate_too_low",
        f"The learning rate {rate:g} is for full fine-tuning; with LoRA the reward has stayed at "
        f"{e.late('reward'):.2f} (1e-5 to 3e-4 works).",
        "grpo.learning_rate=2e-5",
    )


def unusable_golds(e: Evidence) -> Finding | None:
    """Part of the rows cannot be judged at all."""
    key = f"{e.parts[0]}/unusable_gold"
    if not e.late(key) >= 0.05 or zero_reward(e):
        return None
    return Finding(
        "unusable_golds",
        f"{e.late(key):.0%} of the completions answer a prompt whose gold cannot be used, so they are generated for "
        f"nothing; {_GOLD_ADVICE}.",
    )


def judge_timeouts(e: Evidence) -> Finding | None:
    """The judge runs out of time on answers, which then count as wrong."""
    key = f"{e.parts[0]}/timeout"
    if not e.late(key) >= 0.05:
        return None
    return Finding(
        "judge_timeouts",
        f"The judge ran out of time on {e.late(key):.0%} of the answers, and they count as wrong.",
        "rewards[0].kwargs.timeout_s=5",
    )
