"""Rewards that pay nothing, and why: small pure functions, each of one disease, from Evidence to a Finding or None.

NaN comparisons are false, so a figure that is not known yet never leads to a finding.
"""

from __future__ import annotations

import math

from grpo_lite.evidence import FEWEST, Evidence, Finding

_PENALTIES = ("penalty", "punishment")  # their top is 0
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
            twice_the_cap(e),
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
        twice_the_group(e),
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
    takes_it = e.parts[index] in ("accuracy_reward", "format_reward")
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
    if found is None or e.parts[found[1]] == "unit_test_reward":  # a program that hangs is a wrong program
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
    """Tell whether a reward's best is 0: by its name, or because it counts against the sum."""
    return e.recipe.rewards[index].weight < 0 or any(word in e.parts[index] for word in _PENALTIES)


def twice_the_cap(e: Evidence) -> str:
    """Return the override for completions twice as long, rewards that know the cap included."""
    cap = e.recipe.max_completion_length
    told = [
        f" rewards[{index}].kwargs.max_completion_length={2 * cap}"
        for index, section in enumerate(e.recipe.rewards)
        if section.kwargs.get("max_completion_length") == cap
    ]
    return f"grpo.max_completion_length={2 * cap}" + "".join(told)


def twice_the_group(e: Evidence) -> str:
    """Return the override for twice as many completions a prompt, and for a round that such groups fill."""
    group, batch = 2 * e.recipe.num_generations, e.recipe.generation_batch
    new = f"grpo.num_generations={group}"
    if batch % group == 0:
        return new
    if e.recipe.grpo.get("generation_batch_size"):
        return f"{new} grpo.generation_batch_size={-(-batch // group) * group}"
    rows = int(e.recipe.grpo.get("per_device_train_batch_size", 8))
    key = "steps_per_generation" if e.recipe.grpo.get("steps_per_generation") else "gradient_accumulation_steps"
    least = math.lcm(rows, group) // rows  # steps of which groups fill a round
    return f"{new} grpo.{key}={-(-batch // (rows * least)) * least}"
