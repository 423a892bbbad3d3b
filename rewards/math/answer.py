r"""The structure of an answer: number or expression, list, set, tuple or interval, relation, matrix, text.

`rewards.math.reading` builds these from text, `rewards.math.equivalence` compares two of them. What cannot be read
stays a `Raw`, equal only to itself. The functions are other views of an answer that a comparison may take: degrees in
radians, letters as a product, a fraction as a ratio, the coordinates of a point.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .expression import Node, parse_expression

_DENIALS = frozenset(["not", "no", "never", "isn't", "cannot", "wrong", "false"])
_NAME = re.compile(
    r"(?:m?\s*\\(?:angle|triangle|overline|vec|hat|bar)\s*\{?\s*)?\\?[A-Za-z]+\s*\}?(?:_\s*(?:\{\w+\}|\w))?'*"
    r"(?:\s*\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?|[fghFGHPE]\s*\([^()=<>]{1,20}\)|\|\s*[A-Z]{1,3}\s*\|"
)
_NESTED = r"([^{}]*(?:\{[^{}]*\}[^{}]*)*)"
_QUOTIENT = re.compile(rf"\\frac\s*\{{{_NESTED}\}}\s*\{{{_NESTED}\}}|([^/]+)/([^/]+)")
_CONSTANTS = frozenset(["e", "i", "\\pi", "\\infty"])


@dataclass(frozen=True, slots=True)
class Value:
    """One mathematical expression; `value` where it is a plain rational number."""

    source: str
    node: Node
    value: Fraction | None
    unit: str | None = None
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Words, or a choice's letter."""

    source: str
    words: str


@dataclass(frozen=True, slots=True)
class Several:
    """A list (`kind` ","), set ("{}"), union ("U") or bracketed pair or tuple ("()", "[)" …) of answers."""

    source: str
    kind: str
    items: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    r"""A chain of sides and signs: `x = 5`, `1 < x \le 2`, `41 = 42`."""

    source: str
    sides: tuple[Answer, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of answers."""

    source: str
    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a number base: the form asked for is the answer, so nothing is converted."""

    source: str
    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """`a:b`, a ratio or a time of day."""

    source: str
    parts: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Raw:
    """Something this module cannot read."""

    source: str


Answer = Value | Text | Several | Relation | Matrix | Based | Ratio | Raw


def is_name(side: Answer) -> bool:
    r"""Return whether one side of a relation is a name: x, a_1, f(x), AB, `\angle A`, words; not an expression."""
    if isinstance(side, Several):  # (x, y) = (1, 2)
        return side.kind == "()" and all(is_name(item) for item in side.items)
    if isinstance(side, Text):
        return _DENIALS.isdisjoint(side.words.split())
    return _NAME.fullmatch(side.source) is not None


def ratio_names(side: Answer) -> tuple[str, ...]:
    r"""Return the quantities whose ratio one side of an equation is: V_1, V_2 of `V_1:V_2`, NO, BO of `\frac{NO}{BO}`.

    Nothing for any other side, and for a constant among the names: `\frac{\pi}{e}` is a number.
    """
    if isinstance(side, Ratio):
        names = tuple(part.source.strip() for part in side.parts) if all(is_name(part) for part in side.parts) else ()
    else:
        quotient = _QUOTIENT.fullmatch(side.source) if isinstance(side, Value) else None
        names = tuple(part.strip() for part in quotient.groups() if part is not None) if quotient else ()
        names = names if all(_NAME.fullmatch(name) for name in names) else ()
    return names if _CONSTANTS.isdisjoint(names) and len(set(names)) == len(names) else ()


def in_radians(value: Value) -> Value:
    """Return an angle in degrees as the number it is."""
    if value.unit != "degree":
        return value
    factor: Node = ("div", ("const", "pi"), ("num", Fraction(180)))
    return Value(value.source + "*", ("mul", [value.node, factor]), None)


def letters(answer: Text | Value) -> str:
    """Return an answer's letters, so that the name `A` and the symbol `A` compare equal."""
    return answer.source.strip("() ").removeprefix("\\text{").removesuffix("}")


def as_product(answer: Text | Value) -> Answer:
    """Read a short run of letters as a product of variables: `abc` next to `a b c`."""
    word = answer.source
    if isinstance(answer, Value) or not 1 <= len(word) <= 4 or not word.isalpha():
        return answer
    return Value(word, parse_expression(word), None)


def as_ratio(value: Value) -> Answer:
    """Read the fraction 2/3 as the ratio 2:3."""
    if value.value is None or value.value.denominator == 1 or value.unit or value.percent:
        return Raw(value.source)
    parts = (value.value.numerator, value.value.denominator)
    return Ratio(value.source, tuple(Value(str(n), ("num", Fraction(n)), Fraction(n)) for n in parts))


def may_be_time(ratio: Ratio) -> bool:
    """Return whether `a:b` could be a time of day, which is not to be reduced: 2:30 is not 1:15."""
    minutes = ratio.parts[1].source
    return len(minutes) == 2 and minutes.isdigit() and int(minutes) < 60


def assigned_values(items: Sequence[Answer]) -> tuple[Answer, ...]:
    """Return the values of `x = 3, y = 4`, variables in alphabetical order, to compare with the point (3, 4)."""
    if not all(isinstance(item, Relation) and item.signs == ("=",) and is_name(item.sides[0]) for item in items):
        return ()
    names = [item.sides[0].source for item in items if isinstance(item, Relation)]
    return tuple(item.sides[1] for item in items if isinstance(item, Relation)) if names == sorted(set(names)) else ()


def grouped_assignments(items: list[Answer]) -> list[list[Answer]]:
    """Return the solutions of `p = 5, q = 2; p = 7, q = 2`, each a list of its assignments; none for any other list.

    Every solution names the same variables, two at least, in the same order.
    """
    names = [_assigned_name(item) for item in items]
    width = len(set(names))
    if None in names or not 2 <= width < len(names) or len(names) % width:
        return []
    if names != names[:width] * (len(names) // width):
        return []
    return [items[start : start + width] for start in range(0, len(items), width)]


def _assigned_name(item: Answer) -> str | None:
    solved = isinstance(item, Relation) and item.signs == ("=",) and is_name(item.sides[0])
    return item.sides[0].source if isinstance(item, Relation) and solved else None


def as_matrix(several: Several) -> Answer:
    """Read `[[1, 0], [0, 1]]` as the matrix of these rows."""
    rows = [item.items for item in several.items if isinstance(item, Several) and item.kind in ("[]", "()")]
    whole = several.kind in ("[]", "()") and len(rows) == len(several.items) and len({len(row) for row in rows}) == 1
    return Matrix(several.source, tuple(rows)) if whole else several


def vector_entries(matrix: Matrix) -> tuple[Answer, ...]:
    """Return the entries of a row or column vector, none for a wider matrix."""
    if len(matrix.rows) == 1:
        return matrix.rows[0]
    return tuple(row[0] for row in matrix.rows) if len(matrix.rows[0]) == 1 else ()


def share_variable(items: list[Answer]) -> list[Answer]:
    """Read `x = 1, 2` and `x = 1, x = 2` as the list 1, 2 with one variable named once or each time."""
    heads = [
        item.sides[0]
        for item in items
        if isinstance(item, Relation) and item.signs == ("=",) and is_name(item.sides[0])
    ]
    if not heads or len({head.source for head in heads}) != 1:
        return items
    relations = [isinstance(item, Relation) for item in items]
    if all(relations) or (relations[0] and not any(relations[1:])):
        return [item.sides[1] if isinstance(item, Relation) and len(item.sides) == 2 else item for item in items]
    return items


def scaled(entry: Value, factor: Fraction) -> Value:
    """Return a matrix entry times a number."""
    source = f"{factor} {entry.source}"
    if entry.value is not None:
        return Value(source, ("num", factor * entry.value), factor * entry.value)
    return Value(source, ("mul", [("num", factor), entry.node]), None)
