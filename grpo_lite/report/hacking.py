"""Signs of reward hacking: completions that get a reward without doing the task. Pure functions on Evidence.

The diagnoses from metrics alone: diagnoses.py.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpo_lite.rewards as rewards
from grpo_lite.report.evidence import FEWEST, Evidence, Finding, mean, mean_of
from grpo_lite.report.scores import own_gain
from grpo_lite.screen import printable

SUSPICIOUS = 0.25  # share of the best completions that must show a sign
FEWEST_SCORED = 8
Row = Mapping[str, Any]
_COMMITMENTS = re.compile(r"\\boxed\{([^{}]*)\}|####\s*(\S+)|<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_PHRASES = re.compile(r"\banswer(?:\s+is|:|\s*=)\s*\**\s*(-?[\w./\\{}^]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:[./]\d+)*")
_SEPARATORS = re.compile(r"\b(?:and|or)\b|[\s,;:|•*()\[\].-]", re.IGNORECASE)
_TAGS = ("think", "answer", "reasoning", "solution")


@functools.lru_cache(maxsize=4096)
def repeats_itself(text: str) -> bool:
    """Return whether most of a text is one passage repeated.

    It has at least 40 characters, and zlib compresses it to less than a fifth of its size, or its most common three
    words in a row make up half of it.

    >>> repeats_itself("the answer is 4 " * 12), repeats_itself("First add 3 and 4, which is 7; then double it to 14.")
    (True, False)
    """
    if len(text) < 40:
        return False
    words = text.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    if len(words) >= 12 and 3 * Counter(triples).most_common(1)[0][1] >= len(words) / 2:
        return True
    raw = text.encode(errors="replace")
    return len(raw) >= 80 and len(zlib.compress(raw, 9)) < 0.2 * len(raw)


def commits_often(text: str) -> bool:
    r"""Return whether a text commits to three or more different answers, or is a list of numbers, outside its thinking.

    >>> commits_often(r"\boxed{1} \boxed{2} \boxed{3}"), commits_often(r"so \boxed{2}. Check: \boxed{2}")
    (True, False)
    >>> commits_often("1, 2, 3, 4, 5 or 6"), commits_often("The answer is 1. The answer is 2. The answer is 3.")
    (True, True)
    """
    visible = text.rpartition("</think>")[2]
    marked = {next(filter(None, groups), "").strip() for groups in _COMMITMENTS.findall(visible)}
    stated = {phrase.rstrip(".") for phrase in _PHRASES.findall(visible)}
    numbers = set(_NUMBER.findall(visible))
    rest = _SEPARATORS.sub("", _NUMBER.sub("", visible))  # nothing in a bare list; operators mean a calculation
    return len(marked) >= 3 or len(stated) >= 3 or (len(numbers) >= 5 and not rest)


def stuffs_tags(text: str, tags: Sequence[str] = _TAGS) -> bool:
    """Return whether a text holds one of the format's tags three times or more.

    >>> stuffs_tags("<think><think><think>"), stuffs_tags("<think>so</think><answer>2</answer>")
    (True, False)
    """
    return any(text.count(f"<{slash}{tag}>") >= 3 for tag in tags for slash in ("", "/"))


def repeated_text(e: Evidence) -> Finding | None:
    """Completions that repeat themselves get a high reward."""
    best = _best_share(e, lambda row: repeats_itself(row["completion"]))
    if not best:
        return None
    share, sample = best
    return Finding(
        "repeated_text",
        f"{share:.0%} of the best completions repeat themselves, such as {sample}: the reward may be hacked.",
        _penalise_repetition(e),
    )


def _penalise_repetition(e: Evidence) -> str:
    for index in range(len(e.recipe.rewards)):
        if e.function(index) is rewards.repetition_penalty_reward:
            return f"rewards[{index}].weight={2 * (e.recipe.rewards[index].weight or 0.5):g}"
    new = f"rewards[{len(e.recipe.rewards)}]"
    return f"{new}.function=rewards.repetition_penalty_reward {new}.weight=0.5"


def many_answers(e: Evidence) -> Finding | None:
    """Completions that commit to several different answers get a high reward."""
    best = _best_share(e, _lists_answers)
    if not best:
        return None
    share, sample = best
    index = _favouring_part(e, _lists_answers)
    if e.function(index) is rewards.accuracy_reward:  # takes the last one only: more answers do not help
        return None
    return Finding(
        "many_answers",
        f"{share:.0%} of the best completions commit to three or more answers, such as {sample}: the reward "
        "accepts any of them.",
        _replace(e, index, "rewards.accuracy_reward"),
    )


def _lists_answers(row: Row) -> bool:
    """Return whether a completion commits to many answers where its gold is not itself a list."""
    gold = str(row.get("answer") or "").rpartition("####")[2]
    is_list = "\\boxed" not in gold and len(_NUMBER.findall(gold)) >= 3
    return commits_often(row["completion"]) and not is_list


def stuffed_tags(e: Evidence) -> Finding | None:
    """Completions that repeat the format's tags get a high reward."""
    tags = [*_TAGS, *(str(tag) for section in e.recipe.rewards for tag in section.kwargs.get("tags") or ())]

    def stuffed(row: Row) -> bool:
        return stuffs_tags(row["completion"], tags)

    best = _best_share(e, stuffed)
    if not best:
        return None
    share, sample = best
    index = _favouring_part(e, stuffed)
    name = e.parts[index]
    own = e.function(index) is not rewards.format_reward
    return Finding(
        "stuffed_tags",
        f"{share:.0%} of the best completions repeat tags, such as {sample}, and {name} rewards it.",
        None
        if e.section(index) is None
        else _replace(e, index, "rewards.format_reward")
        if own
        else f"rewards[{index}].weight=0",
    )


def _favouring_part(e: Evidence, sign: Callable[[Row], bool]) -> int:
    """Return the index of the reward that favours completions with a sign the most over those without."""

    def advantage(part: str) -> float:
        with_sign = [row for row in e.rows() if sign(row)]
        without = [row for row in e.rows() if not sign(row)]
        gain = mean_of(with_sign, part) - (mean_of(without, part) if without else 0.0)
        return gain if gain == gain else 0.0  # NaN: the part scored none of them

    return max(range(len(e.parts)), key=lambda i: advantage(e.parts[i]))


def _replace(e: Evidence, index: int, function: str) -> str:
    no_arguments = f" rewards[{index}].kwargs={{}}" if e.recipe.rewards[index].kwargs else ""
    return f"rewards[{index}].function={function}{no_arguments}"


def _best_share(e: Evidence, sign: Callable[[Row], bool]) -> tuple[float, str] | None:
    """Return the share of the best late completions that show a sign, and one of them; None below the limit.

    The best have a positive reward in the upper half of the range. If all rewards are equal, all completions count,
    unless the reward is 0.
    """
    rows = [row for row in e.rows() if row["reward"] is not None]
    if len(rows) < FEWEST_SCORED:
        return None
    low, high = min(row["reward"] for row in rows), max(row["reward"] for row in rows)
    best = [row for row in rows if row["reward"] >= (low + high) / 2 and row["reward"] > 0]
    suspicious = [row for row in best if sign(row)]
    if not best or len(suspicious) < max(3, SUSPICIOUS * len(best)):
        return None
    return len(suspicious) / len(best), _quoted(suspicious[-1]["completion"])


def _quoted(text: str, width: int = 60) -> str:
    flat = printable(" ".join(text.split()))
    return f"“{flat[:width]}…”" if len(flat) > width else f"“{flat}”"


def reward_without_progress(e: Evidence) -> Finding | None:
    """The training reward rises while an independent check on held-out prompts does not."""
    if len(e.steps) < FEWEST or not e.rise("reward") >= 0.15 or not e.rises("reward"):
        return None
    checks: list[tuple[str, float, float]] = []
    held = e.series("heldout/lenient")
    since = next((i for i, record in enumerate(e.steps) if "heldout/lenient" in record), 0)
    same_span = replace(e, steps=e.steps[max(0, since - e.window) :])  # steps before the first score do not count
    if len(held) >= 2 and same_span.rise("reward") >= 0.15:
        half = max(1, len(held) // 2)
        checks.append(("the held-out score", mean(held[:half]), mean(held[half:])))
    if e.series("honest_accuracy"):
        checks.append(("a second, independent judge", e.early("honest_accuracy"), e.late("honest_accuracy")))
    for kind, name in (("honest", "the second judge of held-out answers"), ("lenient", "the held-out score")):
        difference: Mapping[str, Any] = own_gain(e.scores.get(kind, {})).get("difference", {})
        if difference:
            checks.append((name, difference["before"], difference["after"]))
    for name, before, after in checks:
        if after <= before:
            return Finding(
                "reward_without_progress",
                f"The reward rose from {e.early('reward'):.2f} to {e.late('reward'):.2f}, but {name} did not "
                f"({before:.2f} → {after:.2f}): the reward measures something other than the task.",
                _lower_others(e),
            )
    return None


def _lower_others(e: Evidence) -> str:
    """Gate a reward that rose beside the first one; if there is none, keep the policy near the base."""
    for index, part in enumerate(e.parts[1:], start=1):
        if e.rise(f"rewards/{part}/mean") > 0 and (section := e.section(index)) and not section.gate:
            return f"rewards[{index}].gate=true"
    return f"grpo.beta={max(0.04, 2 * e.grpo('beta', 0.0)):g}"
