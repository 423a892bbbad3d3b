r"""Does one answer equal another? Three verdicts: True, False, and None where only computer algebra can tell.

`equivalent(gold, given)` walks the two structures (`rewards.math.answer`). Where two expressions are not plainly
rational it asks `leaf`, which returns None without computer algebra; `rewards.math.symbolic` runs the same walk with a
leaf that decides. There is no tolerance: numbers are exact fractions.

The gold decides what must match: a plain number needs a number that was worked out (`123+456` does not answer 579,
`41=42` does not answer 42), a bare list matches in any order, a tuple in its own, an interval with its own ends.
Inequalities are compared as the sets they state: `x \le 3` is (-∞, 3], `1 < x \le 2` is (1, 2], `x \ne 3` is all but a
point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeGuard

from .answer import (
    Answer,
    Based,
    Matrix,
    Ratio,
    Raw,
    Relation,
    Several,
    Text,
    Value,
    as_matrix,
    as_product,
    as_ratio,
    assigned_values,
    in_radians,
    is_name,
    letters,
    may_be_time,
    ratio_names,
    vector_entries,
)
from .arithmetic import divides_by_zero, has_symbols, is_calculation
from .notation import same_spelling
from .units import compatible

Leaf = Callable[[Value, Value], bool | None]
Pairing = Callable[[Relation, Relation], bool | None]
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_OR = re.compile(r"(?<![a-zA-Z])or(?![a-zA-Z])")
_INFINITY = ("const", "oo")
_PLUS_INFINITY = Value("\\infty", _INFINITY, None)
_MINUS_INFINITY = Value("-\\infty", ("neg", _INFINITY), None)


def _undecided(gold: object, given: object) -> bool | None:
    """Decide nothing: the leaf of the walk without computer algebra."""
    return None


def equivalent(gold: Answer, given: Answer, leaf: Leaf = _undecided, relations: Pairing = _undecided) -> bool | None:
    r"""Return whether `given` answers `gold`; None if that takes computer algebra.

    Args:
        gold, given: parsed answers.
        leaf: decides two expressions that are not both rational.
        relations: decides two equations or inequalities of more than one variable.

    >>> from rewards.math.reading import parse_answer as p
    >>> equivalent(p("0.5"), p(r"\frac{2}{4}")), equivalent(p("42"), p("41 or 42")), equivalent(p("x+1"), p("1+x"))
    (True, False, None)
    """
    if gold.source == given.source and type(gold) is type(given):
        return not _undefined(gold)
    return _Walk(leaf, relations).answers(gold, given)


def _undefined(answer: Answer) -> bool:
    """Return whether an expression divides by zero where that can be seen."""
    return isinstance(answer, Value) and answer.value is None and divides_by_zero(answer.node)


class _Walk:
    """The comparison, case by case; every method takes gold first."""

    def __init__(self, leaf: Leaf, relations: Pairing) -> None:
        self.leaf = leaf
        self.relations = relations

    def answers(self, gold: Answer, given: Answer) -> bool | None:
        if _bounded_variable(gold) and _bounded_variable(given) and _bounded_variable(gold) != _bounded_variable(given):
            return False
        if _is_inequality(gold) and _is_inequality(given) and not _bounded_variable(given):
            return self.relations(gold, given)  # -x > -1 says x < 1
        gold, given = _as_interval(gold), _as_interval(given)
        if isinstance(gold, Raw) or isinstance(given, Raw):
            return same_spelling(gold.source, given.source) or (None if isinstance(gold, Raw) else False)
        if isinstance(gold, Relation) or isinstance(given, Relation):
            return self.with_relation(gold, given)
        if isinstance(gold, Matrix) and isinstance(given, Several):
            given = as_matrix(given)
        if isinstance(gold, Several) or isinstance(given, Several):
            return self.with_several(gold, given)
        if isinstance(gold, Matrix) or isinstance(given, Matrix):
            return self.matrices(gold, given)
        if isinstance(gold, Value) and isinstance(given, Value):
            return self.values(gold, given)
        if isinstance(gold, Text) and isinstance(given, Text):
            return gold.words == given.words
        if isinstance(gold, Based) and isinstance(given, Based):
            return (gold.digits, gold.base) == (given.digits, given.base)
        if isinstance(gold, Ratio) or isinstance(given, Ratio):
            return self.ratios(gold, given)
        if isinstance(gold, Text | Value) and isinstance(given, Text | Value):
            if letters(gold) == letters(given):
                return True
            gold, given = as_product(gold), as_product(given)
            return self.values(gold, given) if isinstance(gold, Value) and isinstance(given, Value) else False
        return False

    def values(self, gold: Value, given: Value) -> bool | None:
        if {gold.unit, given.unit} == {"degree", "radian"}:
            return self.expressions(in_radians(gold), in_radians(given))
        if not compatible("%" if gold.percent else gold.unit, "%" if given.percent else given.unit):
            return False
        verdict = self.expressions(gold, given)
        if verdict is not True and "degree" in (gold.unit, given.unit) and gold.unit != given.unit:
            as_angle = self.expressions(in_radians(gold), in_radians(given))
            verdict = True if as_angle else None if None in (as_angle, verdict) else False
        return verdict

    def expressions(self, gold: Value, given: Value) -> bool | None:
        worked_out = gold.value is not None and not is_calculation(gold.node)
        # Where all of an answer is rational, its roots come out: √(3² + 4²) is 5, written in closed form.
        unfinished = is_calculation(given.node, under_roots=given.value is None)
        if worked_out and (unfinished or has_symbols(given.node)):
            return False
        if gold.value is not None and given.value is not None:
            if gold.value == given.value:
                return True
            if gold.percent != given.percent:  # the sign left out, as graders allow: 50 and 50 %
                sign, bare = (gold, given) if gold.percent else (given, gold)
                return bare.value is not None and abs(bare.value) >= 1 and sign.value == bare.value / 100
            return False
        if gold.node == given.node and gold.percent == given.percent:
            return not divides_by_zero(gold.node)
        return self.leaf(gold, given)

    def with_several(self, gold: Answer, given: Answer) -> bool | None:
        if not isinstance(given, Several):
            assert isinstance(gold, Several)
            if isinstance(given, Matrix):
                vector = vector_entries(given)
                return self.in_order(gold.items, vector) if gold.kind == "()" and vector else False
            if gold.kind in (",", "{}") and len(gold.items) == 1:
                return self.answers(gold.items[0], given)
            return False
        if not isinstance(gold, Several):
            if isinstance(gold, Matrix):
                vector = vector_entries(gold)
                return self.in_order(vector, given.items) if given.kind == "()" and vector else False
            if given.kind == "{}" and len(given.items) == 1:
                return self.answers(gold, given.items[0])
            # One value written twice ("15 39/40, or 639/40") is one value: every item must be the gold.
            return _all_of(self.answers(gold, item) for item in given.items) if given.kind == "," else False
        return self.collections(gold, given)

    def collections(self, gold: Several, given: Several) -> bool | None:
        kinds = {gold.kind, given.kind}
        if kinds <= {","}:
            return self.in_any_order(gold.items, given.items)
        if kinds <= {",", "{}"}:
            return _all_of([self.all_among(gold.items, given.items), self.all_among(given.items, gold.items)])
        if "U" in kinds or "{}" in kinds:
            return self.in_any_order(gold.items, given.items) if len(kinds) == 1 else False
        if len(kinds) == 1:
            return self.in_order(gold.items, given.items)
        if gold.kind == "()" and given.kind == "," and (values := assigned_values(given.items)):
            return self.in_order(gold.items, values)
        plain = {",", "()"} if len(gold.items) == 2 else {",", "()", "[]"}
        return self.in_order(gold.items, given.items) if kinds <= plain else False

    def all_among(self, items: Sequence[Answer], others: Sequence[Answer]) -> bool | None:
        """Return whether every item is one of the others: as sets, {1, 1, 2} is {2, 1}."""
        return _all_of(_any_of(self.answers(other, item) for other in others) for item in items)

    def in_order(self, gold: Sequence[Answer], given: Sequence[Answer]) -> bool | None:
        if len(gold) != len(given):
            return False
        return _all_of(self.answers(a, b) for a, b in zip(gold, given, strict=True))

    def in_any_order(self, gold: Sequence[Answer], given: Sequence[Answer]) -> bool | None:
        """Pair the items off; equality is transitive, so taking the first match loses nothing."""
        if len(gold) != len(given) or len(gold) > 64:
            return False
        left, unsure = list(given), False
        for item in gold:
            verdicts = [self.answers(item, other) for other in left]
            if True in verdicts:
                left.pop(verdicts.index(True))
            elif None in verdicts:
                unsure = True
            else:
                return False
        return None if unsure else True

    def matrices(self, gold: Answer, given: Answer) -> bool | None:
        if not isinstance(gold, Matrix) or not isinstance(given, Matrix):
            return False
        if len(gold.rows) != len(given.rows):
            return False
        return _all_of(self.in_order(a, b) for a, b in zip(gold.rows, given.rows, strict=True))

    def ratios(self, gold: Answer, given: Answer) -> bool | None:
        if isinstance(gold, Ratio) and isinstance(given, Value):
            return self.ratios(gold, as_ratio(given))
        if isinstance(gold, Value) and isinstance(given, Ratio):
            return self.ratios(as_ratio(gold), given)
        if not isinstance(gold, Ratio) or not isinstance(given, Ratio):
            return False
        if len(gold.parts) != len(given.parts):
            return False
        if _is_clock(gold) != _is_clock(given):  # 10:05 is not 10:5
            return False
        same = self.in_order(gold.parts, given.parts)
        numbers = [
            [p.value for p in r.parts if isinstance(p, Value) and p.value and p.unit is None] for r in (gold, given)
        ]
        if same is False and all(len(side) == 2 for side in numbers) and not (may_be_time(gold) or may_be_time(given)):
            (a, b), (c, d) = numbers
            return bool(a and b and c and d and a * d == b * c)
        return same

    def with_relation(self, gold: Answer, given: Answer) -> bool | None:
        if isinstance(gold, Relation) and isinstance(given, Relation):
            return self.two_relations(gold, given)
        if isinstance(given, Relation):
            return self.single_value(gold, given)
        assert isinstance(gold, Relation)
        if set(gold.signs) <= {"=", "\\approx"} and _is_constant_chain(gold):  # gold "0.56 = 56%": either will do
            return _any_of(self.answers(side, given) for side in gold.sides)
        if gold.signs[0] == "=" and (is_name(gold.sides[0]) or _states_ratio(gold)):
            return _any_of(self.answers(side, given) for side in gold.sides[1:])
        return False

    def single_value(self, gold: Answer, given: Relation) -> bool | None:
        """Compare what `x = 5`, `f(x) = 2x`, `5 = x`, `a:b = 2:3` or the true chain `2 + 3 = 5` comes to: one value."""
        if given.signs == ("\\approx",) and is_name(given.sides[0]):
            return self.answers(gold, given.sides[1])
        if set(given.signs) != {"="}:
            return False
        sides = given.sides
        if is_name(sides[0]) or _states_ratio(given):
            sides = sides[1:]
        elif len(sides) == 2 and (is_name(sides[1]) or _states_ratio(Relation("", sides[::-1], given.signs))):
            sides = sides[:1]
        if not all(isinstance(side, Value) for side in sides[:-1]):
            return False
        # The sides before the last may be calculations, so they are compared by value, not as answers.
        true_chain = _all_of(self.same_value(sides[-1], side) for side in sides[:-1])
        return _all_of([true_chain, self.answers(gold, sides[-1])])

    def same_value(self, left: Answer, right: Answer) -> bool | None:
        if not isinstance(left, Value) or not isinstance(right, Value):
            return False
        if left.value is not None and right.value is not None:
            return left.value == right.value
        return self.leaf(left, right)

    def two_relations(self, gold: Relation, given: Relation) -> bool | None:
        if _states_ratio(gold) and _states_ratio(given) and Ratio in (type(gold.sides[0]), type(given.sides[0])):
            same_names = ratio_names(gold.sides[0]) == ratio_names(given.sides[0])
            return self.answers(gold.sides[1], given.sides[1]) if same_names else False
        gold_solved = gold.signs == ("=",) and is_name(gold.sides[0])
        given_solved = given.signs == ("=",) and is_name(given.sides[0])
        if gold_solved and given_solved and same_spelling(gold.sides[0].source, given.sides[0].source):
            return self.answers(gold.sides[1], given.sides[1])
        if gold_solved and isinstance(gold.sides[1], Value) and gold.sides[1].value is not None:
            if given.signs == ("=",) and is_name(given.sides[1]):
                return self.two_relations(gold, Relation(given.source, given.sides[::-1], given.signs))
            return False  # x = 5 is not answered by an equation that is still to be solved, nor by y = 5
        if len(gold.signs) == len(given.signs) and len(gold.signs) > 1:
            flipped = tuple(FLIPPED.get(sign, sign) for sign in reversed(given.signs))
            same = gold.signs == given.signs and self.in_order(gold.sides, given.sides)
            return _any_of([same, gold.signs == flipped and self.in_order(gold.sides, given.sides[::-1])])
        if len(gold.signs) != 1 or len(given.signs) != 1:
            return False
        return self.relations(gold, given)


def _is_inequality(answer: Answer) -> TypeGuard[Relation]:
    return isinstance(answer, Relation) and len(answer.signs) == 1 and answer.signs[0] in FLIPPED


def _is_clock(ratio: Ratio) -> bool:
    """Return whether a ratio can only be a time: minutes with a leading zero."""
    return len(ratio.parts) > 1 and re.fullmatch(r"0\d\b.*", ratio.parts[1].source) is not None


def _states_ratio(relation: Relation) -> bool:
    r"""Return whether an equation gives the ratio of two named quantities as a number: `V_1:V_2 = 11:21`."""
    only_equal = set(relation.signs) == {"="}
    return only_equal and bool(ratio_names(relation.sides[0])) and all(_constant(side) for side in relation.sides[1:])


def _is_constant_chain(relation: Relation) -> bool:
    return all(isinstance(side, Value) and not has_symbols(side.node) for side in relation.sides)


def _as_interval(answer: Answer) -> Answer:
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


def _bounded_variable(answer: Answer) -> str | None:
    """Return the variable an inequality bounds, None for anything else."""
    if not isinstance(answer, Relation) or not isinstance(_interval(answer), Several):
        return None
    return next(side.source for side in answer.sides if is_name(side))


def _constant(answer: Answer) -> bool:
    if isinstance(answer, Ratio):
        return all(_constant(part) for part in answer.parts)
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


def _all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Return False if one is False, else None if one is not known, else True.

    >>> _all_of([True, None]), _all_of([None, False]), _all_of([])
    (None, False, True)
    """
    result: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            result = None
    return result


def _any_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Return True if one is True, else None if one is not known, else False.

    >>> _any_of([False, None]), _any_of([None, True]), _any_of([])
    (None, True, False)
    """
    result: bool | None = False
    for verdict in verdicts:
        if verdict:
            return True
        if verdict is None:
            result = None
    return result
