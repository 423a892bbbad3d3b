"""Countdown: reach the target with the given numbers. The model's expression is parsed with `ast`, never evaluated."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from .completion import Completion, visible_texts
from .extraction import extract_answer
from .facts import states

_LONGEST_CHARS = 300
_LATEX = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", ""), ("×", "*"), ("·", "*"))
_SIGNS = (("÷", "/"), ("−", "-"), ("–", "-"), ("[", "("), ("]", ")"), ("$", ""), ("`", ""))
_CROSS = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])")
_ARITHMETIC = re.compile(r"[0-9+\-*/()=\s.]+")  # keeps Python's other literals out: 1_6, 0x10, True
_FRAC = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


@states(top=1.0, by_row=True)
def countdown_reward(
    completions: Sequence[Completion],
    nums: Sequence[Sequence[int]],
    target: Sequence[int],
    *,
    extract: Sequence[str] = ("answer_tag", "boxed", "phrase"),
    use_all: bool = False,
    partial_credit: float = 0.0,
    prompts: Sequence[Completion] | None = None,
    prefilled: bool | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Pay 1 for an expression that uses the given numbers, each at most once, and equals the target.

    Formula: 1 if the committed expression consists of integers, + − × ÷ and parentheses, its integers are a
    sub-multiset of `nums` (all of them with `use_all`) and its exact value is the target; `partial_credit` if only the
    value is wrong; else 0. `(1+2)*3 = 9` counts as `(1+2)*3` if the right side is the target; the bare target needs the
    target among `nums`.

    Args:
        completions: text or chat messages.
        nums: the numbers on offer, per row.
        target: the number to reach, per row.
        extract: methods of `rewards.extraction`, in order (`first_line` for plain few-shot completions).
        use_all: every number must be used.
        partial_credit: in [0, 0.5], for a well-formed expression over the right numbers with another value.
        prompts: passed by TRL; shows whether a completion starts inside a thinking block.
        prefilled: whether every completion does; None looks at `prompts` (set it for chat prompts).

    Returns:
        One value in [0, 1] per completion; None where `nums` or `target` is missing or not integers.

    Source: TinyZero's countdown task; its reward evaluates the text and uses a tolerance of 1e-5.

    >>> countdown_reward(["<answer>(20-16)*1</answer>", "<answer>20-16</answer>", "4"], [[20, 16]] * 3, [4] * 3)
    [0.0, 1.0, 0.0]
    """
    if not 0 <= partial_credit <= 0.5:
        raise ValueError(f"countdown_reward: partial_credit is {partial_credit}; allowed: 0 to 0.5")
    scores: list[float | None] = []
    for text, numbers, goal in zip(visible_texts(completions, prompts, prefilled), nums, target, strict=True):
        if not _usable(numbers, goal):
            scores.append(None)
            continue
        given = extract_answer(text, extract)
        parsed = None if given is None else _parse(given)
        if parsed is None:
            scores.append(0.0)
            continue
        value, used, claim = parsed
        offered = Counter(int(number) for number in numbers)
        fair = used == offered if use_all else used <= offered
        if not fair or (claim is not None and claim != goal):
            scores.append(0.0)
        else:
            scores.append(1.0 if value == goal else partial_credit)
    return scores


def _usable(numbers: Any, goal: Any) -> bool:
    """Return whether a row states a countdown problem."""
    try:
        return len(numbers) > 0 and all(int(n) == n for n in numbers) and int(goal) == goal
    except (TypeError, ValueError):
        return False


def _parse(text: str) -> tuple[Fraction, Counter[int], Fraction | None] | None:
    """Return the value, the numbers used and what an `= …` claims; None if the text is no such expression."""
    if len(text) > _LONGEST_CHARS:
        return None
    for old, new in (*_LATEX, *_SIGNS):
        text = text.replace(old, new)
    for _ in range(4):
        text = _FRAC.sub(r"((\1)/(\2))", text)
    text = _CROSS.sub("*", text)
    if not _ARITHMETIC.fullmatch(text):
        return None
    sides = [side.strip() for side in text.strip().rstrip(".").split("=")]
    if len(sides) > 2:
        return None
    try:
        # 5(3+1) would be a call and 08 an octal: both are SyntaxErrors or refused node types here, and so are not read.
        parsed = [_value(ast.parse(side, mode="eval").body) for side in sides]
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    claim = parsed[1][0] if len(parsed) == 2 else None
    return parsed[0][0], parsed[0][1], claim


def _value(node: ast.expr) -> tuple[Fraction, Counter[int]]:
    """Evaluate + − × ÷ over integers exactly; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value), Counter([node.value])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value, used = _value(node.operand)
        return (-value if isinstance(node.op, ast.USub) else value), used
    if isinstance(node, ast.BinOp):
        (left, left_used), (right, right_used) = _value(node.left), _value(node.right)
        used = left_used + right_used
        match node.op:
            case ast.Add():
                return left + right, used
            case ast.Sub():
                return left - right, used
            case ast.Mult():
                return left * right, used
            case ast.Div():
                return left / right, used
    raise ValueError("not a countdown expression")
