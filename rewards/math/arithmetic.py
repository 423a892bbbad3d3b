"""What an expression tree is worth, exactly, as long as it is rational; and what kind of expression it is.

No computer algebra: `rational` evaluates with fractions and gives up (None) on symbols, irrational numbers and numbers
too big to write down.
"""

from __future__ import annotations

from fractions import Fraction
from math import comb, factorial, isqrt
from typing import Any

from .expression import Node

_MOST_BITS = 40_000


def rational(node: Node) -> Fraction | None:
    r"""Return the exact value of a tree without symbols, roots or constants; None if it is not plainly rational.

    >>> from rewards.math.expression import parse_expression as parse
    >>> rational(parse(r"1.5 \times 10^3")), rational(parse(r"\sqrt{2}"))
    (Fraction(1500, 1), None)
    """
    kind = node[0]
    if kind == "num":
        return node[1]
    if kind in ("sym", "const", "call", "deg"):
        return None
    values = [rational(child) for child in (node[1] if kind in ("add", "mul") else node[1:])]
    if any(value is None for value in values):
        return None
    known: list[Fraction] = [value for value in values if value is not None]
    if sum(_bits(value) for value in known) > _MOST_BITS:
        return None
    if kind == "add":
        return sum(known, Fraction(0))
    if kind == "mul":
        product = Fraction(1)
        for value in known:
            product *= value
        return product
    return _RATIONAL[kind](*known)


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        root = _root(Fraction(exponent.denominator), base) if base >= 0 else None
        return None if root is None else _power(root, Fraction(exponent.numerator))
    if base == 0 and exponent <= 0:
        return None
    if abs(base) != 1 and _bits(base) * abs(exponent) > _MOST_BITS:
        return None
    return base**exponent.numerator if abs(base) != 1 else base ** (exponent.numerator % 2)


def _root(degree: Fraction, value: Fraction) -> Fraction | None:
    """Return the exact real root, or None if it is irrational or not real."""
    if degree.denominator != 1 or not 2 <= degree <= 64:
        return None
    n = degree.numerator
    if value < 0:
        root = _root(degree, -value) if n % 2 else None
        return None if root is None else -root
    parts = [_integer_root(part, n) for part in (value.numerator, value.denominator)]
    return None if parts[0] is None or parts[1] is None else Fraction(parts[0], parts[1])


def _integer_root(value: int, n: int) -> int | None:
    low, high = 0, 1 << (value.bit_length() // n + 1)
    if n == 2:
        low = high = isqrt(value)
    while low < high:
        middle = (low + high) // 2
        if middle**n < value:
            low = middle + 1
        else:
            high = middle
    return low if low**n == value else None


def _log(base: Fraction, value: Fraction) -> Fraction | None:
    if base <= 0 or base == 1 or value <= 0:
        return None
    power, count = Fraction(1), 0
    grows = (base > 1) == (value >= 1)
    while (power < value) == (value > 1) and power != value and count < 4096:
        power = power * base if grows else power / base
        count += 1
        if _bits(power) > _MOST_BITS:  # 1.0000001 to the 4000th has 28,000 digits, and takes seconds
            return None
    return Fraction(count if grows else -count) if power == value else None


def _factorial(value: Fraction) -> Fraction | None:
    return Fraction(factorial(value.numerator)) if value.denominator == 1 and 0 <= value <= 1000 else None


def _binomial(n: Fraction, k: Fraction) -> Fraction | None:
    whole = n.denominator == k.denominator == 1 and 0 <= k <= n <= 2000
    return Fraction(comb(n.numerator, k.numerator)) if whole else None


_RATIONAL: dict[str, Any] = {
    "div": lambda a, b: a / b if b else None,
    "neg": lambda a: -a,
    "pow": _power,
    "root": _root,
    "log": _log,
    "fact": _factorial,
    "binom": _binomial,
}


def is_number(node: Node) -> bool:
    """Return whether a tree is a number as one writes it down: 5, -1/2, 2.5."""
    if node[0] == "neg":
        return is_number(node[1])
    if node[0] == "div":
        return all(is_number(part) and part[0] != "div" for part in node[1:])
    return bool(node[0] == "num")


def is_calculation(node: Node, *, under_roots: bool = True) -> bool:
    """Return whether a tree still adds, multiplies or divides plain numbers; `a × 10ⁿ` is a way to write one.

    Args:
        under_roots: whether a calculation counts that stands under a root or logarithm. Without it √(3² + 4²) is a
            number in closed form; √((40 + 2)²) still is a calculation.
    """
    kind = node[0]
    if kind in ("num", "sym", "const"):
        return False
    if kind == "mul":
        scientific = len(node[1]) == 2 and node[1][1][0] == "pow" and node[1][1][1] == ("num", Fraction(10))
        if not scientific and sum(_is_numeric(child) for child in node[1]) > 1:
            return True
    if kind == "add" and sum(_is_numeric(child) for child in node[1]) > 1:
        return True
    if kind == "div" and not is_number(node) and _is_numeric(node[1]) and _is_numeric(node[2]):
        power_below = node[2][0] == "pow" and is_number(node[2][1]) and is_number(node[1])
        if not power_below:  # 1/10^3 is a way to write a number too
            return True
    children = node[1] if kind in ("add", "mul") else node[2] if kind == "call" else node[1:]
    if kind in ("root", "log") and not under_roots and _is_numeric(node[2]) and node[2][0] != "pow":
        children = [node[1]]
    return any(is_calculation(child, under_roots=under_roots) for child in children)


def _is_numeric(node: Node) -> bool:
    if node[0] == "num":
        return True
    if node[0] in ("sym", "const", "root", "call"):
        return False
    return all(_is_numeric(child) for child in (node[1] if node[0] in ("add", "mul") else node[1:]))


def has_symbols(node: Node) -> bool:
    """Return whether a tree has a variable, or a function that is not known."""
    if node[0] == "sym" or (node[0] == "call" and node[1].endswith("()")):
        return True
    if node[0] in ("num", "const"):
        return False
    children = node[1] if node[0] in ("add", "mul") else node[2] if node[0] == "call" else node[1:]
    return any(has_symbols(child) for child in children)


def divides_by_zero(node: Node) -> bool:
    if node[0] == "div" and node[2] == ("num", Fraction(0)):
        return True
    children = node[1] if node[0] in ("add", "mul") else node[2] if node[0] == "call" else node[1:]
    return any(
        isinstance(child, tuple) and child and isinstance(child[0], str) and divides_by_zero(child)
        for child in children
    )
