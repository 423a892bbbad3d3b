r"""Inequalities as the sets they state: `x \le 3` is (-∞, 3], `1 < x \le 2` is (1, 2], `x \ne 3` is all but a point."""

from __future__ import annotations

from rewards.math_answer import Answer, Raw, Relation, Several, Value, is_name
from rewards.math_arithmetic import has_symbols
from rewards.math_notation import same_spelling

FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_INFINITY = ("const", "oo")


def as_interval(answer: Answer) -> Answer:
    r"""Read `x \le 3`, `1 < x \le 2` and `x \ne 3` as the set they state."""
    if isinstance(answer, Several) and answer.kind == "," and any(isinstance(item, Relation) for item in answer.items):
        parts = [_interval(item) for item in answer.items]
        if all(isinstance(part, Several) for part in parts):
            return Several(answer.source, "U", tuple(parts))
    if isinstance(answer, Relation):
        return _interval(answer)
    if isinstance(answer, Value | Raw) and same_spelling(answer.source, "\\mathbb{R}"):
        return _between(answer.source, "(", _MINUS_INFINITY, _PLUS_INFINITY, ")")
    return answer


_PLUS_INFINITY = Value("\\infty", _INFINITY, None)
_MINUS_INFINITY = Value("-\\infty", ("neg", _INFINITY), None)


def _between(source: str, opening: str, low: Answer, high: Answer, closing: str) -> Several:
    return Several(source, opening + closing, (low, high))


def _interval(answer: Answer) -> Answer:
    if not isinstance(answer, Relation):
        return answer
    sides, signs = answer.sides, answer.signs
    if len(signs) == 2 and is_name(sides[1]) and _constant(sides[0]) and _constant(sides[2]):
        if signs[0] in (">", "\\ge"):
            sides, signs = sides[::-1], (FLIPPED.get(signs[1], ""), FLIPPED.get(signs[0], ""))
        if set(signs) <= {"<", "\\le"}:
            return _between(answer.source, "[("[signs[0] == "<"], sides[0], sides[2], "])"[signs[1] == "<"])
    if len(signs) != 1:
        return answer
    sign = signs[0]
    if is_name(sides[1]) and _constant(sides[0]):
        sides, sign = sides[::-1], FLIPPED.get(sign, sign)
    if not is_name(sides[0]) or not _constant(sides[1]):
        return answer
    bound = sides[1]
    if sign in ("<", "\\le"):
        return _between(answer.source, "(", _MINUS_INFINITY, bound, ")" if sign == "<" else "]")
    if sign in (">", "\\ge"):
        return _between(answer.source, "(" if sign == ">" else "[", bound, _PLUS_INFINITY, ")")
    if sign == "\\ne":
        left = _between(answer.source, "(", _MINUS_INFINITY, bound, ")")
        return Several(answer.source, "U", (left, _between(answer.source, "(", bound, _PLUS_INFINITY, ")")))
    return answer


def bounded_variable(answer: Answer) -> str | None:
    """Return the variable an inequality bounds, None for anything else."""
    if not isinstance(answer, Relation) or not isinstance(_interval(answer), Several):
        return None
    return next(side.source for side in answer.sides if is_name(side))


def _constant(answer: Answer) -> bool:
    return isinstance(answer, Value) and not has_symbols(answer.node)
