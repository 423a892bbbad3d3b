"""The words of the mathematics of answers: tokens, names of functions and letters, exact numbers."""

from __future__ import annotations

import re
from fractions import Fraction

MOST_TOKENS = 600

_TOKEN = re.compile(
    r"(?P<mixed>\d+\s+\d+\s*/\s*\d+(?![\d.]))"
    r"|(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\d.a-zA-Z]))?)"
    r"|(?P<cmd>\\(?:[a-zA-Z]+|[{}|]))"
    r"|(?P<sym>[a-zA-Z])"
    r"|(?P<op>[-+*/^_!()\[\]{}|,'])"
    r"|(?P<space>\s+)"
)
CONSTANTS = {"pi": "pi", "infty": "oo"}
_GREEK_NAMES = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi
psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"""
_FUNCTION_NAMES = """sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln exp asin acos atan lg"""
GREEK = frozenset(_GREEK_NAMES.split())
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
UNDEFINED = frozenset("fghFGH")  # f(x) is an application; a(x) is a product
TIMES = frozenset(["\\times", "\\cdot", "*"])
OVER = frozenset(["\\div", "/"])


class NotAnExpression(ValueError):
    """The text is not an expression this parser knows."""


def tokens(text: str) -> list[tuple[str, str]]:
    """Return (kind, text) of every token; NotAnExpression at the first character that is none."""
    found: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or match.lastgroup is None:
            raise NotAnExpression(f"unexpected {text[place]!r}")
        if match.lastgroup != "space":
            found.append((match.lastgroup, match.group()))
        if len(found) > MOST_TOKENS:
            raise NotAnExpression("too long")
        place = match.end()
    return found


def decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > 400:
        raise NotAnExpression("exponent too large")
    whole = Fraction("0" + mantissa.rstrip("."))
    return whole * Fraction(10) ** int(exponent or 0)


def mixed_number(text: str) -> Fraction:
    whole, top, bottom = (int(part) for part in re.split(r"[\s/]+", text.strip()))
    if bottom == 0 or top >= bottom:
        raise NotAnExpression("no mixed number")
    return whole + Fraction(top, bottom)
