r"""The leaf that decides: two expressions, compared exactly with sympy. Runs only inside the killable judge process.

Equal means: the same number, or the same function wherever one of the two is real. Rational numbers are compared
exactly; others on 50 correct digits, which refutes, and then on as many as rule out chance for numbers of that size,
which confirms. There is no tolerance: `\pi + 10^{-400}` is not π. Functions are compared at rational points. Answers
that this package's own parser cannot read are compared by math-verify, and only where the gold is such an answer.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import sympy
from sympy import Expr, Rational, Symbol

from .answer import Relation, Value
from .equivalence import FLIPPED, equivalent
from .expression import Node
from .reading import parse_answer

_MOST_BITS = 2_000_000
_LARGEST_EXPONENT = 10_000
_MOST_DIGITS = 20_000
_POINTS = [Rational(n, d) for n, d in ((31, 17), (-22, 13), (5, 7), (-3, 11), (71, 23), (113, 41), (-9, 4), (2, 29))]
_CALLS: dict[str, Any] = {
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "cot": sympy.cot,
    "sec": sympy.sec,
    "csc": sympy.csc,
    "arcsin": sympy.asin,
    "arccos": sympy.acos,
    "arctan": sympy.atan,
    "arccot": sympy.acot,
    "asin": sympy.asin,
    "acos": sympy.acos,
    "atan": sympy.atan,
    "sinh": sympy.sinh,
    "cosh": sympy.cosh,
    "tanh": sympy.tanh,
    "ln": sympy.log,
    "log": sympy.log,
    "exp": sympy.exp,
    "lg": lambda x: sympy.log(x, 10),
    "abs": sympy.Abs,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
}


class Undecided(Exception):
    """Neither proof nor refutation: too big a number, or an expression that is not defined."""


def judge(gold: str, given: str) -> bool:
    """Return whether a committed answer is the gold, by computer algebra; call it in a process that can be killed.

    Raises:
        Undecided: sympy cannot tell.
    """
    expected, answer = parse_answer(gold), parse_answer(given)
    verdict = equivalent(expected, answer, _same_expression, _same_relation)
    if verdict is None:
        return judge_by_math_verify(gold, given)
    return verdict


def _same_expression(gold: Value, given: Value) -> bool:
    left, right = _sympy(gold.node), _sympy(given.node)
    return _same(left, right)


def _same(left: Expr, right: Expr) -> bool:
    """Return whether two sympy expressions are equal."""
    if left.has(sympy.nan, sympy.zoo) or right.has(sympy.nan, sympy.zoo):
        return False
    if left == right:
        return True
    if left.has(sympy.oo) or right.has(sympy.oo):
        return False
    if left.is_Rational and right.is_Rational:
        return False
    left, right = _without_functions(left), _without_functions(right)
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    return _same_functions(left, right, symbols) if symbols else _same_numbers(left, right)


def _without_functions(expression: Expr) -> Expr:
    """Replace f(x + 1) by a symbol of that name: nothing is known of f, so its values are free."""
    calls = expression.atoms(sympy.core.function.AppliedUndef)
    names = {call: f"{call.func}({','.join(str(sympy.expand(argument)) for argument in call.args)})" for call in calls}
    return expression.xreplace({call: Symbol(name, real=True) for call, name in names.items()})


def _same_numbers(left: Expr, right: Expr) -> bool:
    """Compare two numbers on 50 digits to refute, and on as many as their size calls for to confirm."""
    return not _differ(left, right, 50) and not _differ(left, right, _enough_digits(left, right))


def _enough_digits(left: Expr, right: Expr) -> int:
    """Return a number of digits at which two different short expressions cannot agree by chance.

    Closed forms in roots that differ, differ at a place bounded by the size of their numbers (root separation); four
    times all their digits is far beyond it for the nesting that fits in an answer.
    """
    numbers = [*left.atoms(Rational), *right.atoms(Rational)]
    bits = sum(int(number.p).bit_length() + int(number.q).bit_length() for number in numbers)
    digits = 200 + bits * 4 // 3
    if digits > _MOST_DIGITS:
        raise Undecided("numbers too long to be told apart")
    return digits


def _same_functions(left: Expr, right: Expr, symbols: list[Symbol]) -> bool:
    """Compare at rational points; where one side is real they must agree, and often enough one must be real."""
    complex_numbers = left.has(sympy.I) or right.has(sympy.I)
    agreed = 0
    for shift in range(len(_POINTS)):
        point = {symbol: _POINTS[(shift + 3 * i) % len(_POINTS)] + i for i, symbol in enumerate(symbols)}
        a, b = (side.subs(point) for side in (left, right))
        values = [sympy.N(value, 30) for value in (a, b)]
        if any(value.has(sympy.nan, sympy.zoo, sympy.oo) or not value.is_number for value in values):
            continue
        real = [abs(sympy.im(value)) < sympy.Float("1e-20") for value in values]
        if not complex_numbers and not any(real):
            continue
        if (a != b) if a.is_Rational and b.is_Rational else not _same_numbers(a, b):
            return False
        agreed += 1
    if agreed >= 5:
        return True
    return bool(sympy.simplify(left - right) == 0)


def _differ(left: Expr, right: Expr, digits: int) -> bool:
    """Return whether two numbers differ on that many digits."""
    a, b = _digits_of(left, digits), _digits_of(right, digits)
    return bool(abs(a - b) > (abs(a) + abs(b)) * Rational(1, 10 ** (digits - 20)))


def _digits_of(number: Expr, digits: int) -> Expr:
    """Return a number to that many digits, parts of it that vanish at that precision set to zero."""
    value = sympy.N(number, digits, maxn=2 * digits + 200)
    if not value.is_number or not value.is_finite:
        raise Undecided("not a finite number")
    smallest = Rational(1, 10 ** (digits - 10))
    real, imaginary = (part if abs(part) > smallest else sympy.Integer(0) for part in value.as_real_imag())
    return real + sympy.I * imaginary


def _same_relation(gold: Relation, given: Relation) -> bool:
    """Return whether two equations or inequalities agree: one left-minus-right is a constant times the other."""
    sides = [side for relation in (gold, given) for side in relation.sides]
    if not all(isinstance(side, Value) for side in sides):
        return False
    left, right = (_difference(relation) for relation in (gold, given))
    if left == 0 or right == 0 or not left.free_symbols or left.free_symbols != right.free_symbols:
        return False
    symbols = sorted(left.free_symbols, key=str)
    first = {symbol: _POINTS[i % len(_POINTS)] + i for i, symbol in enumerate(symbols)}
    denominator = left.subs(first)
    if denominator == 0 or denominator.has(sympy.nan, sympy.zoo, sympy.oo):
        return bool(sympy.simplify(left - right) == 0 and gold.signs == given.signs)
    factor = right.subs(first) / denominator
    if factor == 0 or not _same(factor * left, right):
        return False
    if gold.signs[0] == "=" or given.signs[0] == "=" or gold.signs[0] == "\\ne":
        return gold.signs == given.signs
    return (gold.signs[0] if factor > 0 else FLIPPED.get(gold.signs[0])) == given.signs[0]


def _difference(relation: Relation) -> Expr:
    left, right = relation.sides
    assert isinstance(left, Value)
    assert isinstance(right, Value)
    return _sympy(left.node) - _sympy(right.node)


def _sympy(node: Node) -> Expr:
    """Turn a tree into sympy, refusing numbers too big to write down."""
    kind = node[0]
    if kind == "num":
        value: Fraction = node[1]
        return Rational(value.numerator, value.denominator)
    if kind == "sym":
        return Symbol(node[1], real=True)
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[node[1]]
    if kind == "call":
        name, arguments = node[1], [_sympy(argument) for argument in node[2]]
        return sympy.Function(name)(*arguments) if name.endswith("()") else _CALLS[name](*arguments)
    children = [_sympy(child) for child in (node[1] if kind in ("add", "mul") else node[1:])]
    if kind in ("pow", "root", "fact", "binom"):
        _refuse_giants(kind, children)
    match kind:
        case "add":
            return sympy.Add(*children)
        case "mul":
            return sympy.Mul(*children)
        case "neg":
            return -children[0]
        case "div":
            return children[0] / children[1]
        case "pow":
            return children[0] ** children[1]
        case "root":
            odd = children[0].is_Integer and children[0] % 2 == 1
            return sympy.real_root(children[1], children[0]) if odd else sympy.root(children[1], children[0])
        case "log":
            return sympy.log(children[1], children[0])
        case "fact":
            return sympy.factorial(children[0])
        case "binom":
            return sympy.binomial(*children)
        case "deg":
            return children[0] * sympy.pi / 180
    raise Undecided(f"unknown node {kind}")


def _refuse_giants(kind: str, children: list[Expr]) -> None:
    if kind == "pow" and children[0].is_Rational and children[1].is_Rational:
        size = int(children[0].p).bit_length() + int(children[0].q).bit_length()
        if abs(children[0]) != 1 and size * abs(children[1]) > _MOST_BITS:
            raise Undecided("a power too big")
    # Digits grow with the exponent: e^{e^{e^3}} has two hundred million before the point.
    elif kind == "pow" and all(c.is_number for c in children) and abs(sympy.N(children[1], 15)) > _LARGEST_EXPONENT:
        raise Undecided("a power too big")
    if kind in ("fact", "binom") and any(child.is_Rational and child > 20_000 for child in children):
        raise Undecided("a factorial too big")


def judge_by_math_verify(gold: str, given: str) -> bool:
    """Let math-verify compare what this package cannot read; its time-outs are off, the judge's own limit holds."""
    from math_verify import verify

    left, right = _read_by_math_verify(gold), _read_by_math_verify(given)
    # Decimals compare to 30 places instead of 6: 1e-7 is not 2e-7.
    if not verify(left, right, float_rounding=30, numeric_precision=30, timeout_seconds=None):
        return False
    numbers = isinstance(left, Expr) and isinstance(right, Expr) and left.is_number and right.is_number
    return not numbers or not _differ(left.doit(), right.doit(), 50)


def _read_by_math_verify(text: str) -> Any:
    """Parse a whole text with math-verify's parser. Its own `parse` would search the text for anything that parses."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    latex = normalize_latex(text, config)
    try:
        return latex2sympy(
            latex, is_real=not should_treat_as_complex(latex), convert_degrees=False, normalization_config=None
        )
    except Exception as error:  # its grammar's errors are bare Exceptions
        raise Undecided("not parsed") from error
