r"""The structure of an answer: number or expression, list, set, tuple or interval, relation, matrix, text.

`rewards.math_reading` builds these from text, `rewards.math_equivalence` compares two of them. What cannot be read
stays a `Raw`, equal only to itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.math_expression import Node

_DENIALS = frozenset(["not", "no", "never", "isn't", "cannot", "wrong", "false"])
_NAME = re.compile(
    r"(?:m?\s*\\(?:angle|triangle|overline|vec|hat|bar)\s*\{?\s*)?\\?[A-Za-z]+\s*\}?(?:_\s*(?:\{\w+\}|\w))?'*"
    r"(?:\s*\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?|[fghFGHPE]\s*\([^()=<>]{1,20}\)|\|\s*[A-Z]{1,3}\s*\|"
)


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
    r"""Tell whether one side of a relation is a name: x, a_1, f(x), AB, `\angle A`, words; not an expression."""
    if isinstance(side, Several):  # (x, y) = (1, 2)
        return side.kind == "()" and all(is_name(item) for item in side.items)
    if isinstance(side, Text):
        return _DENIALS.isdisjoint(side.words.split())
    return _NAME.fullmatch(side.source) is not None
