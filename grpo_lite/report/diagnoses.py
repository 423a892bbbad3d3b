"""What the metrics give away: small pure functions, each of one disease, from Evidence to a Finding or None.

NaN comparisons are false, so a figure that is not known yet never leads to a finding.

Rewards that pay nothing, and why: small pure functions, each of one disease, from Evidence to a Finding or None.

NaN comparisons are false, so a figure that is not known yet never leads to a finding.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Mapping

import rewards
from grpo_lite.report.evidence import FEWEST, FLAT, Evidence, Finding, mean_of
from grpo_lite.report.overrides import twice_the_cap, twice_the_group

LOW_LORA_LR = 5e-6


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
    harmful = earned <= 0 if math.isnan(whole) else earned < whole - max(FLAT, abs(whole) / 2)
    if not harmful:
        return None
    cap = e.recipe.max_completion_length
    against = "" if math.isnan(whole) else f" where finished ones earn {whole:.2f}"
    return Finding(
        "truncation",
        f"{clipped:.0%} of the completions are cut off at {cap} tokens, and those earn {earned:.2f}{against}.",
        twice_the_cap(e.recipe),
    )


def equal_groups(e: Evidence) -> Finding | None:
    """Nearly every group has equal rewards: no advantage, no gradient."""
    refilled = e.recipe.sampling.refill > 0
    share = e.late("refill/frac_without_signal" if refilled else "frac_reward_zero_std")
    if not share >= 0.85 or zero_reward(e):
        return None
    if _solved(e):
        return Finding(
            "equal_groups",
            f"In {share:.0%} of the groups all completions have the same reward, and nearly all have the highest: the "
            "prompts are solved, and further steps teach nothing. Train on harder rows.",
        )
    return Finding(
        "equal_groups",
        f"In {share:.0%} of the groups all completions have the same reward, so they give no gradient.",
        twice_the_group(e.recipe),
    )


def _solved(e: Evidence) -> bool:
    """Tell whether the first reward is nearly at its top: 1, or the most that was paid lately where that is more."""
    paid = [row["rewards"].get(e.parts[0]) for row in e.rows()]
    return e.late(e.main) >= 0.9 * max([1.0, *(value for value in paid if value is not None)])


def format_up_accuracy_flat(e: Evidence) -> Finding | None:
    """A further reward rises while the first one does not: the form is learnt, not the task."""
    if _solved(e) or e.rises(e.main) is not False:
        return None
    for index, part in enumerate(e.parts[1:], start=1):
        key = f"rewards/{part}/mean"
        if e.rise(key) >= 0.2 and not is_penalty(e, index) and not e.recipe.rewards[index].gate:
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
    return Finding(
        "length_growth",
        f"Completions grew from {before:.0f} to {after:.0f} tokens while {e.parts[0]} did not rise "
        f"({e.early(e.main):.2f} → {e.late(e.main):.2f}).",
        _shorter(e),
    )


def _shorter(e: Evidence) -> str:
    if (e.recipe.grpo.get("loss_type") or "dapo") == "grpo":
        return "grpo.loss_type=dr_grpo"
    if not e.recipe.grpo.get("mask_truncated_completions"):
        return "grpo.mask_truncated_completions=true"
    cap, new = e.recipe.max_completion_length, f"rewards[{len(e.parts)}]"
    for index in range(len(e.parts)):
        if e.function(index) is rewards.soft_overlong_punishment:
            return f"rewards[{index}].weight={2 * (e.recipe.rewards[index].weight or 0.5):g}"
    return (
        f"{new}.function=rewards.soft_overlong_punishment {new}.weight=0.2 "
        f"{new}.kwargs.max_completion_length={cap} {new}.kwargs.cache_length={max(1, cap // 4)}"
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
    if any(record.get("kl") == math.inf for record in e.steps[-e.window :]) and len(e.steps) >= FEWEST:
        late = math.inf
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
    late = e.steps[-max(8, e.window) :]
    skipped = _skipped(e, len(late))
    if len(e.steps) < 2 * FEWEST or skipped < 3 or skipped < len(late) / 4:
        return None
    return Finding(
        "fp16_scale_skips",
        f"{skipped} of the last {len(late)} steps were skipped because gradients overflowed float16.",
        f"{_lower_lr(e)} grpo.max_grad_norm=0.3",
    )


def _skipped(e: Evidence, latest: int) -> int:
    """Return how many of the latest steps moved nothing: by the scaler's own count, else by their gradient norm."""
    counts = [record["optimizer_steps_skipped"] for record in e.steps if "optimizer_steps_skipped" in record]
    if counts:
        return round(counts[-1] - (counts[-latest - 1] if len(counts) > latest else 0.0))
    norms = [record["grad_norm"] for record in e.steps[-latest:] if "grad_norm" in record]
    return sum(norm is None or not math.isfinite(norm) for norm in norms)


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


_PENALTIES = ("penalty", "punishment")  # in the names of rewards that do not state their top, which is 0
_GOLD_ADVICE = "look at them with `grpo-lite check` and name the right column in data.answer"


def zero_reward(e: Evidence) -> Finding | None:
    """The first reward has been 0, or at one value below, throughout: with the reason, as far as it shows."""
    part = e.parts[0]
    if not _stuck(e, part) or is_penalty(e, 0):
        return None
    start = f"{part} has been {e.late(e.main):g} in all {e.last_step} steps"
    unusable = _worst(e, "unusable_gold", "unusable_tests")
    if unusable and unusable[0] >= 0.5:
        share = unusable[0]
        return Finding("zero_reward", f"{start}: {share:.0%} of the gold answers cannot be used; {_GOLD_ADVICE}.")
    if e.late("completions/clipped_ratio") >= 0.9:
        cap = e.recipe.max_completion_length
        return Finding(
            "zero_reward",
            f"{start}: {e.late('completions/clipped_ratio'):.0%} of the completions are cut off at {cap} tokens, "
            "before an answer.",
            twice_the_cap(e.recipe),
        )
    if half_open_thinking(e) >= 0.5:
        return _prefilled(e, "zero_reward", start, 0)
    if e.late(f"{part}/not_python") >= 0.5:
        share = e.late(f"{part}/not_python")
        return Finding(
            "zero_reward",
            f"{start}: {share:.0%} of the completions hold no code that Python can read; ask in data.system for one "
            "```python block.",
        )
    if e.late(f"{part}/no_answer") >= 0.5:
        return Finding(
            "zero_reward",
            f"{start}: in {e.late(f'{part}/no_answer'):.0%} of the completions the parser finds no committed answer.",
            "rewards[0].kwargs.extract=[answer_tag,boxed,hash,phrase,last_number]",
        )
    return Finding(
        "zero_reward",
        f"{start}, though answers are found and read: they are wrong, so the task is too hard for this model as it is.",
        twice_the_group(e.recipe),
    )


def _stuck(e: Evidence, part: str) -> bool:
    """Tell whether a reward is 0, or at one value below, in every step, and within every batch as far as is known."""
    values, spread = e.series(f"rewards/{part}/mean"), e.series(f"rewards/{part}/std")
    if len(values) < FEWEST:
        return False
    return max(values) <= 0 and max(values) - min(values) < 1e-6 and max(spread, default=0.0) < 1e-6


def half_open_thinking(e: Evidence) -> float:
    """Return the share of late completions that close a thinking block which they did not open."""
    rows = e.rows()
    half = [row for row in rows if "</think>" in row["completion"] and "<think>" not in row["completion"]]
    return len(half) / len(rows) if rows else 0.0


def _prefilled(e: Evidence, key: str, start: str, index: int) -> Finding:
    function = e.function(index)
    takes_it = function is not None and "prefilled" in inspect.signature(function).parameters
    return Finding(
        key,
        f"{start}: completions close </think> without opening it, because the template has already written <think>.",
        f"rewards[{index}].kwargs.prefilled=true" if takes_it else None,
    )


def zero_part(e: Evidence) -> Finding | None:
    """A further reward (not a penalty) has been 0 throughout."""
    for index, part in enumerate(e.parts[1:], start=1):
        section = e.recipe.rewards[index]
        if not _stuck(e, part) or is_penalty(e, index) or section.weight == 0:
            continue
        if section.gate and zero_reward(e):  # the gate has never been opened
            continue
        start = f"{part} has been {e.late(f'rewards/{part}/mean'):g} in all {e.last_step} steps"
        if half_open_thinking(e) >= 0.5:
            return _prefilled(e, "zero_part", start, index)
        return Finding("zero_part", f"{start}, so it teaches nothing.", f"rewards[{index}].weight=0")
    return None


def unusable_golds(e: Evidence) -> Finding | None:
    """Part of the rows cannot be judged at all."""
    found = _worst(e, "unusable_gold", "unusable_tests")
    if found is None or zero_reward(e):
        return None
    share, _ = found
    return Finding(
        "unusable_golds",
        f"{share:.0%} of the completions answer a prompt whose gold cannot be used, so they are generated for "
        f"nothing; {_GOLD_ADVICE}.",
    )


def judge_timeouts(e: Evidence) -> Finding | None:
    """The judge runs out of time on answers, which then count as wrong."""
    found = _worst(e, "timeout")
    if found is None or getattr(e.function(found[1]), "runs_code", False):  # a program that hangs is a wrong program
        return None
    share, index = found
    limit = float(e.recipe.rewards[index].kwargs.get("timeout_s") or 2.0)
    return Finding(
        "judge_timeouts",
        f"The judge ran out of time ({limit:g} s) on {share:.0%} of the answers, and they count as wrong.",
        f"rewards[{index}].kwargs.timeout_s={2.5 * limit:g}",
    )


def _worst(e: Evidence, *names: str) -> tuple[float, int] | None:
    """Return the largest late share that a reward logs under one of these names, if 5 % or more, and its position."""
    shares = [(e.late(f"{part}/{name}"), index) for index, part in enumerate(e.parts) for name in names]
    return max((found for found in shares if found[0] >= 0.05), default=None)


def is_penalty(e: Evidence, index: int) -> bool:
    """Tell whether a reward's best is 0: because it says so or is named so, or because it counts against the sum."""
    if e.recipe.rewards[index].weight < 0:
        return True
    top = getattr(e.function(index), "top", None)
    return any(word in e.parts[index] for word in _PENALTIES) if top is None else top <= 0
