"""The diagnoses from a run's metrics: one small pure function each, from Evidence to a Finding or None.

A comparison with NaN is false, so a figure that is not known yet never leads to a finding. Signs of reward hacking in
the completions themselves: hacking.py; what goes wrong in a warm-up: warmup.py.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Mapping

import grpo_lite.rewards as rewards
from grpo_lite.recipe.overrides import round_value, twice_the_cap, twice_the_group
from grpo_lite.report import episodes
from grpo_lite.report.evidence import FEWEST, FLAT, Evidence, Finding, mean_of
from grpo_lite.report.warmup import fewer_steps, solved_at_start, warmup_collapse

_LOW_LORA_STEP = 4e-6  # learning rate x alpha / r: Tina learns with 1e-6 and 128 / 32 (arXiv:2504.15777)
_LEAST_ADVISED_STEP = 1e-5  # of the same: 5e-6 with 32 / 16
_LEAST_CLIP, _TRL_CLIP = 0.01, 1.0  # bounds of the advised grpo.max_grad_norm: the upper one is TRL's default
_PENALTIES = ("penalty", "punishment")  # in the names of rewards that do not state their top, which is 0
_GOLD_ADVICE = "look at them with `grpo-lite check` and name the right column in data.answer"


def zero_reward(e: Evidence) -> Finding | None:
    """The first reward has been 0, or one value below 0, in every step; the finding names the reason if it shows."""
    part = e.parts[0]
    if not _stuck(e, part) or _is_penalty(e, 0) or (e.recipe.has_tools and episodes.explains_zero(e)):
        return None
    start = f"{part} has been {e.late(e.main):g} in all {e.last_step} steps"
    unusable = _largest_share(e, "unusable_gold", "unusable_tests")
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
    if _half_open_thinking(e) >= 0.5:
        return _prefilled(e, "zero_reward", start, 0)
    if e.late(f"{part}/not_python") >= 0.5:
        share = e.late(f"{part}/not_python")
        return Finding(
            "zero_reward",
            f"{start}: {share:.0%} of the completions contain no code that Python can parse; ask for one ```python "
            "block in data.system.",
        )
    if e.late(f"{part}/no_answer") >= 0.5:
        return Finding(
            "zero_reward",
            f"{start}: the parser finds no committed answer in {e.late(f'{part}/no_answer'):.0%} of the completions.",
            "rewards[0].kwargs.extract=[answer_tag,boxed,hash,phrase,last_number]",
        )
    wrong = "no episode reaches its end" if e.recipe.has_tools else "the answers can be parsed and are wrong"
    return Finding(
        "zero_reward",
        f"{start}: {wrong}, so the task is too hard for this model as it is.",
        twice_the_group(e.recipe),
    )


def _stuck(e: Evidence, part: str) -> bool:
    """Return whether a reward is 0, or one value below 0, in every step, and as far as known in all of each batch."""
    values, spread = e.series(f"rewards/{part}/mean"), e.series(f"rewards/{part}/std")
    if len(values) < FEWEST:
        return False
    return max(values) <= 0 and max(values) - min(values) < 1e-6 and max(spread, default=0.0) < 1e-6


def _half_open_thinking(e: Evidence) -> float:
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


def truncation(e: Evidence) -> Finding | None:
    """Completions reach the cap, and those get less than half the reward of the finished ones."""
    clipped = e.late("completions/clipped_ratio")
    if not clipped >= 0.2 or zero_reward(e):
        return None
    known = [row for row in e.rows() if row.get("truncated") is not None]
    cut = mean_of([row for row in known if row["truncated"]], e.parts[0])
    finished = [row for row in known if not row["truncated"]]
    enough = len(finished) >= max(4, 0.05 * len(known))  # for a mean of their reward
    whole = mean_of(finished, e.parts[0]) if enough else math.nan
    earned = e.late(e.main) if math.isnan(cut) else cut
    harmful = earned <= 0 if math.isnan(whole) else earned < whole - max(FLAT, abs(whole) / 2)
    if not harmful:
        return None
    cap = e.recipe.max_completion_length
    against = "" if math.isnan(whole) else f", finished ones {whole:.2f}"
    return Finding(
        "truncation",
        f"{clipped:.0%} of the completions are cut off at {cap} tokens; those get a reward of {earned:.2f}{against}.",
        twice_the_cap(e.recipe),
    )


def zero_part(e: Evidence) -> Finding | None:
    """Another reward, not a penalty, has been 0 in every step."""
    for index, part in enumerate(e.parts[1:], start=1):
        section = e.section(index)
        if not _stuck(e, part) or _is_penalty(e, index) or (section and section.weight == 0):
            continue
        if section and section.gate and zero_reward(e):  # the gate has never opened
            continue
        start = f"{part} has been {e.late(f'rewards/{part}/mean'):g} in all {e.last_step} steps"
        if _half_open_thinking(e) >= 0.5:
            return _prefilled(e, "zero_part", start, index)
        return Finding(
            "zero_part", f"{start}, so it teaches nothing.", f"rewards[{index}].weight=0" if section else None
        )
    return None


def equal_groups(e: Evidence) -> Finding | None:
    """Nearly every group has equal rewards, so there is no advantage and no gradient."""
    refilled = e.recipe.sampling.refill > 0
    share = e.late("refill/frac_without_signal" if refilled else "frac_reward_zero_std")
    if not share >= 0.85 or zero_reward(e) or warmup_collapse(e) or (e.recipe.has_tools and episodes.explains_zero(e)):
        return None
    start = f"In {share:.0%} of the groups all completions have the same reward"
    if not _is_solved(e):
        return Finding("equal_groups", f"{start}, so they give no gradient.", twice_the_group(e.recipe))
    solved = f"{start}, and nearly all have the highest: the prompts are solved"
    if e.warmup and solved_at_start(e):
        return Finding(
            "equal_groups",
            f"{solved} since GRPO's first steps, so the warm-up left nothing to learn. Warm up with fewer steps, or "
            "train on harder rows.",
            fewer_steps(e, e.warmup_total // 2),
        )
    return Finding("equal_groups", f"{solved}, and further steps teach nothing. Train on harder rows.")


def format_up_accuracy_flat(e: Evidence) -> Finding | None:
    """Another reward rises while the first one does not: the model learns the form, not the task."""
    if _is_solved(e) or e.rises(e.main) is not False:
        return None
    for index, part in enumerate(e.parts[1:], start=1):
        key = f"rewards/{part}/mean"
        section = e.section(index)
        if e.rise(key) >= 0.2 and not _is_penalty(e, index) and not (section and section.gate):
            return Finding(
                "format_up_accuracy_flat",
                f"{part} rose from {e.early(key):.2f} to {e.late(key):.2f} while {e.parts[0]} stayed at "
                f"{e.late(e.main):.2f}: the model learns the form, not the task.",
                f"rewards[{index}].gate=true" if section else None,
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
        _raise_beta(e),
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
    cap, new = e.recipe.max_completion_length, f"rewards[{len(e.recipe.rewards)}]"
    for index in range(len(e.recipe.rewards)):
        if e.function(index) is rewards.soft_overlong_punishment:
            return f"rewards[{index}].weight={2 * (e.recipe.rewards[index].weight or 0.5):g}"
    return (
        f"{new}.function=rewards.soft_overlong_punishment {new}.weight=0.2 "
        f"{new}.kwargs.max_completion_length={cap} {new}.kwargs.cache_length={max(1, cap // 4)}"
    )


def entropy_collapse(e: Evidence) -> Finding | None:
    """The policy becomes nearly deterministic before the task is solved."""
    before, after = e.early("entropy"), e.late("entropy")
    if not (after < 0.15 * before and after < 0.3) or _is_solved(e):
        return None
    return Finding(
        "entropy_collapse",
        f"Entropy fell from {before:.2f} to {after:.2f} nats a token while {e.parts[0]} is at {e.late(e.main):.2f}: "
        "the samples of a group are nearly the same, so there is little to compare.",
        _lower_lr(e),
    )


def kl_blow_up(e: Evidence) -> Finding | None:
    """The KL to the base model exceeds one nat a token; useful runs stay well below a half."""
    early, late = e.early("kl"), e.late("kl")
    if any(record.get("kl") == math.inf for record in e.steps[-e.window :]) and len(e.steps) >= FEWEST:
        late = math.inf
    if not late > 1:
        return None
    return Finding(
        "kl_blow_up",
        f"KL to the base model went from {early:.2g} to {late:.2g} nats a token: the policy is far from its base.",
        _joined(_lower_lr(e), _raise_beta(e, 3)),
    )


def grad_norm_spikes(e: Evidence) -> Finding | None:
    """Some of the last fifty steps with a signal have a gradient, after clipping, of more than ten times the median."""
    values = _gradients_with_signal(e)[-50:]
    if len(values) < 2 * FEWEST or zero_reward(e) or equal_groups(e):
        return None
    median = statistics.median(values)
    clip = e.grpo("max_grad_norm", _TRL_CLIP) or math.inf
    advised = min(max(round_value(median), _LEAST_CLIP), _TRL_CLIP)
    if advised > 10 * median:  # the gradients are about 0: nothing is learnt, and there is nothing to clip
        return None
    spikes = [value for value in values if min(value, clip) > 10 * median]
    if not spikes:
        return None
    return Finding(
        "grad_norm_spikes",
        f"{len(spikes)} of the last {len(values)} steps had a gradient norm up to {max(spikes):.3g}; the "
        f"median is {median:.2g}.",
        f"grpo.max_grad_norm={advised:g}",
    )


def _gradients_with_signal(e: Evidence) -> list[float]:
    """Return the gradient norms of the steps in which not every group had equal rewards: those others' are about 0."""
    share = "refill/frac_without_signal" if e.recipe.sampling.refill > 0 else "frac_reward_zero_std"
    norms = [record.get("grad_norm") for record in e.steps if (record.get(share) or 0.0) < 1]
    return [float(norm) for norm in norms if norm is not None and 0 < norm < math.inf]


def fp16_scale_skips(e: Evidence) -> Finding | None:
    """The gradient scaler skips steps because float16 gradients overflow; a few at the start are normal."""
    if not _trains_in_fp16(e):
        return None
    late = e.steps[-max(8, e.window) :]
    skipped = _skipped(e, len(late))
    if len(e.steps) < 2 * FEWEST or skipped < 3 or skipped < len(late) / 4:
        return None
    return Finding(
        "fp16_scale_skips",
        f"{skipped} of the last {len(late)} steps were skipped because gradients overflowed float16.",
        _joined(_lower_lr(e), "grpo.max_grad_norm=0.3"),
    )


def _skipped(e: Evidence, latest: int) -> int:
    """Return how many of the latest steps were skipped: by the scaler's own count, else by their gradient norm."""
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
    """The learning rate is one for full fine-tuning; LoRA learns nothing with it."""
    rate = e.grpo("learning_rate", 2e-5)
    if rate * _lora_scale(e) >= _LOW_LORA_STEP * (1 - 1e-9) or e.rises("reward") is not False or _is_solved(e):
        return None
    return Finding(
        "learning_rate_too_low",
        f"The learning rate {rate:g} is for full fine-tuning; with LoRA the reward has stayed at "
        f"{e.late('reward'):.2f} (1e-5 to 3e-4 works).",
        "grpo.learning_rate=2e-5",
    )


def _lora_scale(e: Evidence) -> float:
    """Return what a change of the LoRA weights is multiplied with: alpha / r, or alpha / √r with rsLoRA."""
    r, alpha = float(e.recipe.lora.get("r") or 8), float(e.recipe.lora.get("lora_alpha") or 8)
    return alpha / (math.sqrt(r) if e.recipe.lora.get("use_rslora") else r)


def unusable_golds(e: Evidence) -> Finding | None:
    """Some rows have a gold answer that cannot be used, so their completions cannot be scored."""
    largest = _largest_share(e, "unusable_gold", "unusable_tests")
    if largest is None or zero_reward(e):
        return None
    share, _ = largest
    return Finding(
        "unusable_golds",
        f"{share:.0%} of the completions answer a prompt whose gold answer cannot be used, so they teach "
        f"nothing; {_GOLD_ADVICE}.",
    )


def judge_timeouts(e: Evidence) -> Finding | None:
    """Judging some answers takes too long, and they count as wrong."""
    largest = _largest_share(e, "timeout")
    if largest is None or getattr(e.function(largest[1]), "runs_code", False):  # a program that hangs is wrong
        return None
    share, index = largest
    limit = float(e.recipe.rewards[index].kwargs.get("timeout_s") or 2.0)
    return Finding(
        "judge_timeouts",
        f"Judging {share:.0%} of the answers took longer than {limit:g} s, so they count as wrong.",
        f"rewards[{index}].kwargs.timeout_s={2.5 * limit:g}",
    )


def _largest_share(e: Evidence, *names: str) -> tuple[float, int] | None:
    """Return the largest late share that a reward logs under one of these names, if 5 % or more, and its index."""
    shares = [(e.late(f"{part}/{name}"), index) for index, part in enumerate(e.parts) for name in names]
    return max((pair for pair in shares if pair[0] >= 0.05), default=None)


def _is_solved(e: Evidence) -> bool:
    """Return whether the first reward is nearly at its top: 1, or the highest recent value if that is more."""
    recent = [row["rewards"].get(e.parts[0]) for row in e.rows()]
    return e.late(e.main) >= 0.9 * max([1.0, *(value for value in recent if value is not None)])


def _is_penalty(e: Evidence, index: int) -> bool:
    """Return whether a reward's best value is 0: by its `top`, by its name, or because its weight is negative."""
    section = e.section(index)
    if section and section.weight < 0:
        return True
    top = getattr(e.function(index), "top", None)
    return any(word in e.parts[index] for word in _PENALTIES) if top is None else top <= 0


def _lower_lr(e: Evidence) -> str | None:
    """Return the override for about a third of the learning rate; None where less would teach LoRA nothing."""
    rate = e.grpo("learning_rate", 2e-5)
    lower = max(_LEAST_ADVISED_STEP / _lora_scale(e), round_value(rate / 3)) if rate > 0 else rate
    return f"grpo.learning_rate={lower:g}" if lower < rate * (1 - 1e-9) else None


def _raise_beta(e: Evidence, factor: float = 2) -> str:
    beta = factor * e.grpo("beta", 0.0)
    return f"grpo.beta={max(0.04, round_value(beta) if beta > 0 else 0.0):g}"


def _joined(*overrides: str | None) -> str | None:
    return " ".join(override for override in overrides if override) or None
