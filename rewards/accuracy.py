"""The reward for the right answer: exact arithmetic first, then computer algebra in a process that can be killed.

completion -> visible text -> committed answer -> structure       -> equivalent to the gold?
  completion.py               extraction.py       math/reading.py    math/equivalence.py, judge/
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Rational, Real
from typing import Any

from .completion import Completion, visible_texts
from .extraction import DEFAULT_METHODS, extract_answer
from .facts import states
from .honest import golds_of, honest_accuracy
from .math.answer import Raw
from .math.equivalence import equivalent
from .math.reading import parse_answer

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_LONGEST_RAW_GOLD_CHARS = 300


@states(top=1.0, second_opinion=honest_accuracy, needs_one_of=("answer", "solution"), by_row=True)
def accuracy_reward(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    *,
    solution: Sequence[Any] | None = None,
    extract: Sequence[str] = DEFAULT_METHODS,
    timeout_s: float = 2.0,
    log_metric: Callable[[str, float], None] | None = None,
    prompts: Sequence[Completion] | None = None,
    prefilled: bool | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Pay 1 for the right answer: the last one committed to outside the thinking, mathematically equal to the gold.

    Formula: 1 if extract(visible(completion)) ≡ gold, else 0. ≡ has no tolerance: numbers are compared as exact
    fractions, anything else by computer algebra in a killable process. What counts as committed is defined in
    `rewards.extraction`, what counts as equal in `rewards.math.equivalence`, and `rewards.math.units` for percent,
    units and currency.

    Args:
        completions: text or chat messages.
        answer: golds: a number, LaTeX, a GSM8K solution (`… #### 72`) or text with `\boxed{…}`.
        solution: the golds under the name that TRL's datasets use. Where both are given, `answer` counts.
        extract: where answers are looked for, in the recipe's own order; see `rewards.extraction`.
        timeout_s: limit per answer that needs computer algebra, in seconds; over it the answer counts as wrong.
        log_metric: passed by TRL. Gets the fractions of the batch that had no committed answer, could not be read, ran
            into the limit, or had an unusable gold, as `accuracy_reward/{no_answer,unparsed,timeout,unusable_gold}`.
        prompts: passed by TRL; shows whether a completion starts inside a thinking block.
        prefilled: whether every completion does; None looks at `prompts` (set it for chat prompts).

    Returns:
        1 or 0 per completion, None for an unusable gold (missing, blank, cut off, or a text without a marked answer).

    Raises:
        ValueError: `extract` names an unknown method, the columns differ in length, or no golds are given.
        JudgeError: the judge process cannot run.

    Source: the exact-match rewards of DeepSeekMath and TRL's `accuracy_reward`; comparison of its own, with math-verify
    0.9 for golds only that can read.

    >>> accuracy_reward(["3 + 4 = 7\n#### 7", r"So \boxed{0.5}.", "The answer is 41 or 42."], [7, r"\frac{1}{2}", 42])
    [1.0, 1.0, 0.0]
    >>> accuracy_reward([r"\boxed{\sqrt{12}}", r"\boxed{3}"], [r"2\sqrt{3}", None])
    [1.0, None]
    """
    golds = golds_of("accuracy_reward", completions, answer, solution)
    verdicts: list[bool | None] = []
    hard: dict[tuple[str, str], list[int]] = {}
    counts = {"no_answer": 0, "unparsed": 0, "timeout": 0, "unusable_gold": 0}
    for index, (text, raw) in enumerate(zip(visible_texts(completions, prompts, prefilled), golds, strict=True)):
        gold = gold_answer(raw)
        if gold is None:
            counts["unusable_gold"] += 1
            verdicts.append(None)
            continue
        given = extract_answer(text, extract)
        if given is None:
            counts["no_answer"] += 1
            verdicts.append(False)
            continue
        verdict = _quick(gold, given)
        if verdict is None:
            hard.setdefault((gold, given), []).append(index)
        elif verdict is False and not _INTEGER.fullmatch(given) and isinstance(parse_answer(given), Raw):
            counts["unparsed"] += 1
        verdicts.append(verdict or False)
    if hard:
        from . import judge

        for (_, members), ruling in zip(hard.items(), judge.ask("math", list(hard), timeout_s), strict=True):
            for index in members:
                verdicts[index] = ruling == judge.YES
            counts["timeout"] += len(members) * (ruling == judge.TIMEOUT)
            counts["unparsed"] += len(members) * (ruling in (judge.UNDECIDED, judge.CRASH))
    if log_metric is not None and len(completions):
        for name, count in counts.items():
            log_metric(f"accuracy_reward/{name}", count / len(completions))
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def gold_answer(raw: Any) -> str | None:
    r"""Return the answer a gold states, from a value, a GSM8K solution or boxed text; None if it is unusable.

    >>> gold_answer("48/2 = 24\n#### 72"), gold_answer(r"so $x = \boxed{1/2}$"), gold_answer(0.25), gold_answer(" ")
    ('72', '1/2', '0.25', None)
    """
    if isinstance(raw, bool) or raw is None:
        return None
    if isinstance(raw, Rational):  # numpy's integers are among them
        return str(raw)
    if isinstance(raw, Decimal | Real):
        return str(raw) if math.isfinite(raw) else None
    if not isinstance(raw, str):
        return None
    if _INTEGER.fullmatch(raw):
        return raw
    text = (
        extract_answer(raw, ("hash", "boxed")) if "####" in raw or "\\boxed" in raw or "\\fbox" in raw else raw.strip()
    )
    if not text or not _balanced(text):
        return None
    answer = parse_answer(text)
    if isinstance(answer, Raw) and (not answer.source.strip() or len(text) > _LONGEST_RAW_GOLD_CHARS):
        return None
    return text


def _quick(gold: str, given: str) -> bool | None:
    """Compare without computer algebra, plain integers without parsing; None where that decides nothing."""
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(given):
        return int(gold) == int(given)
    return equivalent(parse_answer(gold), parse_answer(given))


def _balanced(text: str) -> bool:
    """Return whether all braces of a text close: a gold that was cut off is unusable."""
    depth = 0
    for mark in re.findall(r"\\.|[{}]", text):
        depth += (mark == "{") - (mark == "}")
        if depth < 0:
            return False
    return depth == 0
