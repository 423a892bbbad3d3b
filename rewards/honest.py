"""A second opinion on correctness, to be logged beside the training reward and never trained on.

It shares no extraction and no comparison code with `accuracy_reward`: other scans, only the very last commitment, plain
numbers by `Fraction`, the rest by math-verify as it is. A policy that finds a hole in the one does not find it in the
other, so a widening gap between the two curves is reward hacking (or a bug in one of them): look at the completions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from .completion import Completion, completion_text
from .facts import states

_NUMBER = re.compile(r"(-?)\s*(?:(\d+)/(\d+)|\\frac\{(\d+)\}\{(\d+)\}|(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?|(\.\d+))")
_DECORATION = re.compile(
    r"\\[$%!,;()\[\]]|[$%*]|\\d?text\{[^{}]*\}|\\mbox\{[^{}]*\}|\^\{?\\circ\}?|\\(?:left|right)(?![a-z])"
)
_LAST_CLOSED = re.compile(r"(?i)<\s*/\s*(?:\w+:)?(?:think(?:ing)?|thought|reasoning)\s*>")
_OPENED = re.compile(r"(?i)<\s*(?:\w+:)?(?:think(?:ing)?|thought|reasoning)\b[^<>]*>")
_JOINT = re.compile(r"(?:[\s,;$]|and|or)*")
_SEPARATOR = re.compile(r"[=;<>]|\\(?:approx|pm|cup|text|le|ge)|\bor\b|\band\b")


@states(top=1.0, needs_one_of=("answer", "solution"))
def honest_accuracy(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    *,
    solution: Sequence[Any] | None = None,
    extract: Sequence[str] = ("answer_tag", "boxed", "hash", "phrase"),
    timeout_s: float = 2.0,
    prompts: Sequence[Completion] | None = None,
    prefilled: bool | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Return 1 where the very last commitment of a completion is the gold, strictly; the held-out metric.

    Formula: 1 if last(completion) = gold, else 0: the last of the markers in `extract` by position, outside the
    thinking; a plain number for a number, math-verify's verdict for the rest. No words around a number, and of several
    boxes side by side none.

    Args:
        completions: text or chat messages.
        answer: golds, as for `accuracy_reward`.
        solution: the golds under the name that TRL's datasets use. Where both are given, `answer` counts.
        extract: the markers to look for, by the names `rewards.extraction` uses; here their order does not matter.
        timeout_s: limit per answer that needs math-verify, in seconds.
        prompts: passed by TRL; shows whether a completion starts inside a thinking block.
        prefilled: whether every completion does; None looks at `prompts`.

    Returns:
        1 or 0 per completion, None for an unusable gold.

    Source: the strict-match metric of lm-evaluation-harness (GSM8K), and math-verify 0.9.

    >>> honest_accuracy(["so\n#### 1,000", r"\boxed{41}, \boxed{42}", r"\boxed{41} or 42"], [1000, 42, 42])
    [1.0, 0.0, 0.0]
    """
    golds = golds_of("honest_accuracy", completions, answer, solution)
    scores: list[float | None] = []
    open_cases: list[tuple[int, str, str]] = []
    for index, (completion, raw) in enumerate(zip(completions, golds, strict=True)):
        gold = _gold(raw)
        if not gold:
            scores.append(None)
            continue
        inside = prefilled if prefilled is not None else prompts is not None and _ends_in_thinking(prompts[index])
        text = completion_text(completion)
        given = None if inside and not _LAST_CLOSED.search(text) else _last_commitment(text, extract)
        wanted, got = _number(gold), None if given is None else _number(given)
        if given is None or (wanted is not None) != (got is not None):
            scores.append(0.0)
        elif wanted is not None:
            scores.append(1.0 if wanted == got else 0.0)
        elif given.replace(" ", "") == gold.replace(" ", ""):
            scores.append(1.0)
        else:
            scores.append(0.0)
            if len(given) <= 500 and bool(_SEPARATOR.search(given)) == bool(_SEPARATOR.search(gold)):
                open_cases.append((index, gold, given))
    if open_cases:
        from . import judge

        verdicts = judge.ask("math_verify", [(gold, given) for _, gold, given in open_cases], timeout_s)
        for (index, _, _), verdict in zip(open_cases, verdicts, strict=True):
            scores[index] = float(verdict == judge.YES)
    return scores


def golds_of(
    reward: str, completions: Sequence[Completion], answer: Sequence[Any] | None, solution: Sequence[Any] | None
) -> Sequence[Any]:
    """Return the golds of a batch: `answer` where it is given, else `solution`, the name that TRL's datasets use.

    Raises:
        ValueError: neither is given, or not one per completion.
    """
    golds = answer if answer is not None else solution
    if golds is None:
        raise ValueError(f"{reward}: no golds: the dataset needs a column `answer` or `solution`")
    if len(completions) != len(golds):
        raise ValueError(f"{reward}: {len(completions)} completions, but {len(golds)} answers")
    return golds


def _ends_in_thinking(prompt: Completion) -> bool:
    """Return whether a text prompt ends with an opening `<think>`."""
    return isinstance(prompt, str) and prompt.rstrip().lower().endswith("<think>")


def _gold(raw: Any) -> str | None:
    """Return the gold's answer text, from a value, `#### value` or the last box."""
    if raw is None or isinstance(raw, bool):
        return None
    text = str(raw).strip()
    if "####" in text:
        return text.rsplit("####", 1)[1].strip()
    box = _last_box(text)
    return text if box is None else box[1].strip()


def _last_commitment(text: str, markers: Sequence[str]) -> str | None:
    """Return the answer whose marker comes last, whichever marker it is."""
    text = _LAST_CLOSED.split(text)[-1]
    opened = _OPENED.search(text)
    text = text[: opened.start()] if opened else text
    lowered = text.lower()
    candidates: list[tuple[int, str]] = []
    if "first_line" in markers:
        return next((line.strip() for line in text.split("\n") if line.strip()), None)
    tags = [name.removeprefix("tag:").lower() for name in markers if name.startswith("tag:")]
    for tag in [*tags, *["answer"][: "answer_tag" in markers]]:
        end = lowered.rfind(f"</{tag}>")
        begin = lowered.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
        if begin >= 0:
            candidates.append((end, text[begin + len(tag) + 2 : end]))
    if "boxed" in markers and (box := _last_box(text)) is not None:
        before = _last_box(text[: box[0]])
        between = None if before is None else text[before[0] + len(before[1]) + len("\\boxed{}") : box[0]]
        several = between is not None and before is not None and before[1] != box[1] and _JOINT.fullmatch(between)
        candidates.append((box[0], "" if several else box[1]))
    if "hash" in markers and (place := text.rfind("####")) >= 0:
        candidates.append((place, text[place + 4 :].split("\n", 1)[0]))
    if "phrase" in markers and (place := max(lowered.rfind("answer is"), lowered.rfind("answer:"))) >= 0:
        tail = re.split(r"\.\s|\.$|\n", re.sub(r"^\s*(?:is)?\s*:?\s*", "", text[place + len("answer") :]), maxsplit=1)[
            0
        ]
        candidates.append((place, tail))
    if not candidates:
        return None
    content = max(candidates)[1].strip()
    inner = _last_box(content)
    return (content if inner is None else inner[1]).strip() or None


def _last_box(text: str) -> tuple[int, str] | None:
    """Return the place and content of the last closed box, scanning back from the end of the text."""
    place = len(text)
    for _ in range(20):
        place = text.rfind("\\boxed{", 0, place)
        if place < 0:
            return None
        depth = 0
        for index in range(place + 6, min(len(text), place + 2000)):
            depth += (text[index] == "{") - (text[index] == "}")
            if depth == 0:
                return place, text[place + 7 : index]
    return None


def _number(text: str) -> Fraction | None:
    """Return a plain number's value, None for anything else."""
    if len(text) > 200:
        return None
    match = _NUMBER.fullmatch(_DECORATION.sub("", text).strip().rstrip(".").strip())
    if match is None:
        return None
    sign, top, bottom, frac_top, frac_bottom, whole, decimals, small = match.groups()
    if top or frac_top:
        denominator = int(bottom or frac_bottom)
        value = Fraction(int(top or frac_top), denominator) if denominator else None
    else:
        value = Fraction("0" + small) if small else Fraction(whole.replace(",", "") + (decimals or ""))
    return None if value is None else -value if sign else value
