r"""Inequalities as the sets they state: `x \le 3` is (-∞, 3], `1 < x \le 2` is (1, 2], `x \ne 3` is all but a point."""

from __future__ import annotations

import re
from itertools import pairwise

from rewards.math_answer import Answer, Raw, Relation, Several, Text, Value, is_name
from rewards.math_arithmetic import has_symbols
from rewards.math_notation import same_spelling

FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_INFINITY = ("const", "oo")
_OR = re.compile(r"(?<![a-zA-Z])or(?![a-zA-Z])")


def as_interval(answer: Answer) -> Answer:
    r"""Read `x \le 3`, `1 < x \le 2` and `x \ne 3` as the set they state."""
    if isinstance(answer, Several) and answer.kind == "," and any(isinstance(item, Relation) for item in answer.items):
        parts = [_interval(item) for item in answer.items]
        if all(isinstance(part, Several) for part in parts):
            if _OR.search(answer.source):
                return Several(answer.source, "U", tuple(parts))
            return _intersection(answer, parts)
    if isinstance(answer, Relation):
        return _interval(answer)
    if _is_all_reals(answer):
        return _between(answer.source, "(", _MINUS_INFINITY, _PLUS_INFINITY, ")")
    if isinstance(answer, Several) and answer.kind == "\\setminus":
        return _without_points(answer)
    return answer


def _intersection(answer: Several, parts: list[Answer]) -> Answer:
    """Return the interval between two half lines: `x > 1, x < 5`, without an "or", holds both."""
    lines = [part for part in parts if isinstance(part, Several) and len(part.items) == 2]
    below = [line for line in lines if line.items[0] == _MINUS_INFINITY]
    above = [line for line in lines if line.items[1] == _PLUS_INFINITY]
    if len(parts) != 2 or len(below) != 1 or len(above) != 1:
        return answer
    return _between(answer.source, above[0].kind[0], above[0].items[0], below[0].items[1], below[0].kind[1])


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


def _is_all_reals(answer: Answer) -> bool:
    if isinstance(answer, Text):
        return answer.words in ("all real numbers", "all reals", "real numbers", "reals")
    return isinstance(answer, Value | Raw) and same_spelling(answer.source, "\\mathbb{R}")


def _without_points(answer: Several) -> Answer:
    r"""Return `\mathbb{R} \setminus \{a, b\}` as the intervals between the points, if these are plain numbers."""
    whole, points = answer.items
    if not _is_all_reals(whole) or not isinstance(points, Several) or points.kind != "{}":
        return answer
    values = sorted(
        ((p.value, p) for p in points.items if isinstance(p, Value) and p.value is not None), key=lambda pair: pair[0]
    )
    if len(values) != len(points.items) or not values:
        return answer
    ends: list[Answer] = [_MINUS_INFINITY, *(point for _, point in values), _PLUS_INFINITY]
    pieces = tuple(_between(answer.source, "(", a, b, ")") for a, b in pairwise(ends))
    return Several(answer.source, "U", pieces)
