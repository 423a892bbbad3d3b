r"""A small strict parser for the mathematics of answers: LaTeX or plain text to a tree of tuples, exactly.

Decimals become fractions, mixed numbers become numbers, two numbers side by side are an error (`42 41` is not 83), and
a command that is not known is an error instead of a symbol. Evaluating needs no computer algebra as long as everything
is rational (`rational`); the rest is for `rewards.symbolic`, which turns the same tree into sympy.

A node is `("num", Fraction)`, `("sym", name)`, `("const", "pi" | "e" | "i" | "oo")`, `("add" | "mul", [nodes])`,
`("div" | "pow" | "root" | "log" | "binom", a, b)`, `("neg" | "fact" | "deg", a)` or `("call", name, [nodes])`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import comb, factorial, isqrt
from typing import Any

Node = tuple[Any, ...]

MOST_TOKENS = 600
_MOST_BITS = 40_000

_TOKEN = re.compile(
    r"(?P<mixed>\d+\s+\d+\s*/\s*\d+(?![\d.]))"
    r"|(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\d.a-zA-Z]))?)"
    r"|(?P<cmd>\\(?:[a-zA-Z]+|[{}|]))"
    r"|(?P<sym>[a-zA-Z])"
    r"|(?P<op>[-+*/^_!()\[\]{}|,'])"
    r"|(?P<space>\s+)"
)
_CONSTANTS = {"pi": "pi", "infty": "oo"}
_GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar".split()
)
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln exp asin acos atan lg".split()
)
_UNDEFINED = frozenset("fghFGH")  # f(x) is an application; a(x) is a product
_TIMES = frozenset(["\\times", "\\cdot", "*"])
_OVER = frozenset(["\\div", "/"])


class NotAnExpression(ValueError):
    """The text is not an expression this parser knows."""


def parse_expression(text: str) -> Node:
    r"""Parse a cleaned text (`rewards.notation.clean`) into a tree.

    Raises:
        NotAnExpression: unknown command, unbalanced brackets, two numbers side by side, too long.

    >>> parse_expression(r"3 \frac{1}{2}")
    ('num', Fraction(7, 2))
    >>> parse_expression("2x+1")
    ('add', [('mul', [('num', Fraction(2, 1)), ('sym', 'x')]), ('num', Fraction(1, 1))])
    """
    parser = _Parser(_tokens(text))
    try:
        node = parser.sum()
    except RecursionError:
        raise NotAnExpression("nested too deeply") from None
    if parser.place != len(parser.tokens):
        raise NotAnExpression(f"unexpected {parser.tokens[parser.place][1]!r}")
    return node


def rational(node: Node) -> Fraction | None:
    r"""Return the exact value of a tree without symbols, roots or constants; None if it is not plainly rational.

    >>> rational(parse_expression(r"1.5 \times 10^3")), rational(parse_expression(r"\sqrt{2}"))
    (Fraction(1500, 1), None)
    """
    kind = node[0]
    if kind == "num":
        return node[1]  # type: ignore[no-any-return]
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


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or match.lastgroup is None:
            raise NotAnExpression(f"unexpected {text[place]!r}")
        if match.lastgroup != "space":
            tokens.append((match.lastgroup, match.group()))
        if len(tokens) > MOST_TOKENS:
            raise NotAnExpression("too long")
        place = match.end()
    return tokens


class _Parser:
    """Recursive descent over the tokens; each method reads one level of precedence and returns its node."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.place = 0
        self.bars = 0  # open absolute values: `|` then closes

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def take(self, text: str) -> None:
        if self.peek()[1] != text:
            raise NotAnExpression(f"expected {text!r}, found {self.peek()[1]!r}")
        self.place += 1

    def sum(self) -> Node:
        terms = [self.product()]
        while self.peek()[1] in ("+", "-"):
            sign = self.tokens[self.place][1]
            self.place += 1
            term = self.product()
            terms.append(term if sign == "+" else ("neg", term))
        return terms[0] if len(terms) == 1 else ("add", terms)

    def product(self, *, argument: bool = False) -> Node:
        """Read factors; an `argument` of a function without parentheses ends at a sign or at the next function."""
        node = self.signed()
        while True:
            kind, text = self.peek()
            if text in _TIMES or text in _OVER:
                if argument:
                    return node
                self.place += 1
                right = self.signed()
                node = ("div", node, right) if text in _OVER else _times(node, right)
            elif self.starts_factor(kind, text):
                if argument and text[1:] in FUNCTIONS | {"log"}:
                    return node
                if kind in ("num", "mixed"):
                    raise NotAnExpression("a number after a factor without a sign")
                right = self.power()
                node = _mixed(node, right) or _times(node, right)
            else:
                return node

    def starts_factor(self, kind: str, text: str) -> bool:
        if kind in ("num", "mixed", "sym"):
            return True
        if text == "|":
            return self.bars == 0
        if kind == "cmd":
            return text[1:] in _COMMANDS or text[1:] in FUNCTIONS or text[1:] in _GREEK or text[1:] in _CONSTANTS
        return text in ("(", "[", "{")

    def signed(self) -> Node:
        negative = False
        signs = 0
        while self.peek()[1] in ("+", "-"):
            negative ^= self.peek()[1] == "-"
            self.place += 1
            signs += 1
        if signs > 2:
            raise NotAnExpression("a run of signs")
        node = self.power()
        return ("neg", node) if negative else node

    def power(self) -> Node:
        node = self.atom()
        while True:
            text = self.peek()[1]
            if text == "^":
                self.place += 1
                node = ("pow", node, self.script())
            elif text == "!":
                self.place += 1
                if self.peek()[1] == "!":
                    raise NotAnExpression("double factorial")
                node = ("fact", node)
            elif text == "\\deg":
                self.place += 1
                node = ("deg", node)
            else:
                return node

    def script(self) -> Node:
        """Read an exponent: a braced or parenthesised expression, or one signed atom."""
        negative = self.peek()[1] == "-"
        if negative:
            self.place += 1
        node = self.power() if self.peek()[1] != "{" else self.braced()
        return ("neg", node) if negative else node

    def braced(self) -> Node:
        self.take("{")
        node = self.sum()
        self.take("}")
        return node

    def atom(self) -> Node:
        kind, text = self.peek()
        self.place += 1
        if kind == "num":
            return ("num", _decimal(text))
        if kind == "mixed":
            return _mixed_number(text)
        if kind == "sym":
            return self.symbol(text)
        if text in ("(", "[", "{"):
            closing = {"(": ")", "[": "]", "{": "}"}[text]
            bars, self.bars = self.bars, 0
            node = self.sum()
            self.take(closing)
            self.bars = bars
            return node
        if text == "|":
            self.bars += 1
            node = self.sum()
            self.take("|")
            self.bars -= 1
            return ("call", "abs", [node])
        name = text[1:]
        if kind == "cmd" and name in _CONSTANTS:
            return ("const", _CONSTANTS[name])
        if kind == "cmd" and name in FUNCTIONS:
            return self.function(name)
        if kind == "cmd" and name in _COMMANDS:
            return getattr(self, f"read_{_COMMANDS[name]}")()  # type: ignore[no-any-return]
        if kind == "cmd" and name in _GREEK:
            return self.symbol(text)
        raise NotAnExpression(f"unexpected {text!r}")

    def symbol(self, text: str) -> Node:
        name = text
        if self.peek()[1] == "_":
            self.place += 1
            name += "_" + self.subscript()
        if name == "i":
            return ("const", "i")
        if name == "e":
            return ("const", "e")
        if name in _UNDEFINED and self.peek()[1] == "(":
            return ("call", f"{name}()", [self.atom()])
        return ("sym", name)

    def subscript(self) -> str:
        if self.peek()[1] != "{":
            self.place += 1
            return self.tokens[self.place - 1][1] if self.place <= len(self.tokens) else ""
        end = next((i for i in range(self.place, len(self.tokens)) if self.tokens[i][1] == "}"), None)
        if end is None:
            raise NotAnExpression("open subscript")
        name = "".join(token[1] for token in self.tokens[self.place + 1 : end])
        self.place = end + 1
        return name

    def argument(self) -> Node:
        """Read a macro's argument: `{…}`, or one digit or letter (`\\frac12`)."""
        kind, text = self.peek()
        if text == "{":
            return self.braced()
        if kind == "num" and text[0].isdigit():
            if len(text) > 1:
                self.tokens[self.place] = ("num", text[1:])
            else:
                self.place += 1
            return ("num", Fraction(int(text[0])))
        if kind == "mixed":
            raise NotAnExpression("ambiguous argument")
        return self.atom()

    def read_frac(self) -> Node:
        top = self.argument()
        return ("div", top, self.argument())

    def read_binom(self) -> Node:
        top = self.argument()
        return ("binom", top, self.argument())

    def read_sqrt(self) -> Node:
        degree: Node = ("num", Fraction(2))
        if self.peek()[1] == "[":
            self.place += 1
            degree = self.sum()
            self.take("]")
        if self.peek()[0] == "num" and self.peek()[1][0].isdigit():
            return ("root", degree, self.atom())  # \sqrt12 is read as √12, as people write it
        return ("root", degree, self.argument())

    def read_log(self) -> Node:
        base: Node = ("num", Fraction(10))
        if self.peek()[1] == "_":
            self.place += 1
            base = self.argument()
            return ("log", base, self.application())
        return ("call", "log", [self.application()])

    def read_floor(self) -> Node:
        return self.closed("floor", "\\rfloor")

    def read_ceil(self) -> Node:
        return self.closed("ceil", "\\rceil")

    def closed(self, name: str, closing: str) -> Node:
        node = self.sum()
        self.take(closing)
        return ("call", name, [node])

    def function(self, name: str) -> Node:
        """Read a function's argument, and a power written between name and argument: `\\sin^2 x`."""
        power: Node | None = None
        if self.peek()[1] == "^":
            self.place += 1
            power = self.script()
            if power == ("neg", ("num", Fraction(1))):
                name, power = f"arc{name}", None
                if name not in FUNCTIONS:
                    raise NotAnExpression(f"no inverse of {name[3:]}")
        node: Node = ("call", name, [self.application()])
        return node if power is None else ("pow", node, power)

    def application(self) -> Node:
        if self.peek()[1] in ("(", "{"):
            return self.atom()  # \\sin(x)^2 is the square of the sine
        return self.product(argument=True)


_COMMANDS = {"frac": "frac", "sqrt": "sqrt", "binom": "binom", "dbinom": "binom", "tbinom": "binom", "log": "log"}
_COMMANDS |= {"lfloor": "floor", "lceil": "ceil"}


def _decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > 400:
        raise NotAnExpression("exponent too large")
    return Fraction(mantissa.rstrip(".") if not mantissa.startswith(".") else "0" + mantissa) * Fraction(10) ** int(
        exponent or 0
    )


def _mixed_number(text: str) -> Node:
    whole, top, bottom = (int(part) for part in re.split(r"[\s/]+", text.strip()))
    if bottom == 0 or top >= bottom:
        raise NotAnExpression("no mixed number")
    return ("num", whole + Fraction(top, bottom))


def _mixed(left: Node, right: Node) -> Node | None:
    r"""Return `3\frac{1}{2}` as 7/2: a whole number next to a proper fraction of whole numbers."""
    if left[0] == "neg":  # -3 1/2 is -(3 + 1/2)
        mixed = _mixed(left[1], right)
        return None if mixed is None else ("neg", mixed)
    if left[0] != "num" or right[0] != "div" or left[1].denominator != 1:
        return None
    top, bottom = right[1], right[2]
    if (
        top[0] != "num"
        or bottom[0] != "num"
        or not 0 < top[1] < bottom[1]
        or {top[1].denominator, bottom[1].denominator} != {1}
    ):
        return None
    return ("num", left[1] + top[1] / bottom[1])


def _times(left: Node, right: Node) -> Node:
    factors = left[1] if left[0] == "mul" else [left]
    return ("mul", [*factors, right])
