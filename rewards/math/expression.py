r"""A small strict parser for the mathematics of answers: LaTeX or plain text to an exact tree of tuples.

Decimals become fractions and mixed numbers become numbers. Two numbers side by side are an error (`42 41` is not 83),
and so is an unknown command. `rewards.math.arithmetic` evaluates a tree as long as it is rational;
`rewards.math.symbolic` turns the same tree into sympy.

A node is `("num", Fraction)`, `("sym", name)`, `("const", "pi" | "e" | "i" | "oo")`, `("add" | "mul", [nodes])`,
`("div" | "pow" | "root" | "log" | "binom", a, b)`, `("neg" | "fact" | "deg", a)` or `("call", name, [nodes])`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Node = tuple[Any, ...]
_MOST_TOKENS = 600
_TOKEN = re.compile(
    r"(?P<mixed>\d+\s+\d+\s*/\s*\d+(?![\d.]))"
    r"|(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\d.a-zA-Z]))?)"
    r"|(?P<cmd>\\(?:[a-zA-Z]+|[{}|]))"
    r"|(?P<sym>[a-zA-Z])"
    r"|(?P<op>[-+*/^_!()\[\]{}|,'])"
    r"|(?P<space>\s+)"
)
_CONSTANTS = {"pi": "pi", "infty": "oo"}
_GREEK_NAMES = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi
psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"""
_FUNCTION_NAMES = """sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln exp asin acos atan lg"""
_GREEK = frozenset(_GREEK_NAMES.split())
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_COMMANDS = {"frac": "frac", "sqrt": "sqrt", "binom": "binom", "dbinom": "binom", "tbinom": "binom", "log": "log"}
_COMMANDS |= {"lfloor": "floor", "lceil": "ceil"}
_UNDEFINED = frozenset("fghFGH")  # f(x) is an application; a(x) is a product
_TIMES = frozenset(["\\times", "\\cdot", "*"])
_OVER = frozenset(["\\div", "/"])


class NotAnExpression(ValueError):
    """The text is not an expression this parser knows."""


def parse_expression(text: str) -> Node:
    r"""Parse a cleaned text (`rewards.math.notation.clean`) into a tree.

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


def _tokens(text: str) -> list[tuple[str, str]]:
    """Return (kind, text) of every token; NotAnExpression at the first character that is none."""
    result: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or match.lastgroup is None:
            raise NotAnExpression(f"unexpected {text[place]!r}")
        if match.lastgroup != "space":
            result.append((match.lastgroup, match.group()))
        if len(result) > _MOST_TOKENS:
            raise NotAnExpression("too long")
        place = match.end()
    return result


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
                if argument and text[1:] in _FUNCTIONS | {"log"}:
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
            return text[1:] in _COMMANDS or text[1:] in _FUNCTIONS or text[1:] in _GREEK or text[1:] in _CONSTANTS
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
            return ("num", _mixed_number(text))
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
        if kind == "cmd" and name in _FUNCTIONS:
            return self.function(name)
        if kind == "cmd" and name in _COMMANDS:
            return getattr(self, f"read_{_COMMANDS[name]}")()
        if kind == "cmd" and name in _GREEK:
            return self.symbol(text)
        raise NotAnExpression(f"unexpected {text!r}")

    def symbol(self, text: str) -> Node:
        name = text
        if self.peek()[1] == "_":
            self.place += 1
            name += "_" + self.subscript()
        if name in ("i", "e"):
            return ("const", name)
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
                if name not in _FUNCTIONS:
                    raise NotAnExpression(f"no inverse of {name[3:]}")
        node: Node = ("call", name, [self.application()])
        return node if power is None else ("pow", node, power)

    def application(self) -> Node:
        if self.peek()[1] in ("(", "{"):
            return self.atom()  # \\sin(x)^2 is the square of the sine
        return self.product(argument=True)


def _mixed(left: Node, right: Node) -> Node | None:
    r"""Return `3\frac{1}{2}` as 7/2: a whole number next to a proper fraction of whole numbers."""
    if left[0] == "neg":  # -3 1/2 is -(3 + 1/2)
        mixed = _mixed(left[1], right)
        return None if mixed is None else ("neg", mixed)
    if left[0] != "num" or right[0] != "div" or left[1].denominator != 1:
        return None
    top, bottom = right[1], right[2]
    if top[0] != "num" or bottom[0] != "num" or not 0 < top[1] < bottom[1]:
        return None
    if top[1].denominator != 1 or bottom[1].denominator != 1:
        return None
    return ("num", left[1] + top[1] / bottom[1])


def _times(left: Node, right: Node) -> Node:
    factors = left[1] if left[0] == "mul" else [left]
    return ("mul", [*factors, right])


def _decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > 400:
        raise NotAnExpression("exponent too large")
    whole = Fraction("0" + mantissa.rstrip("."))
    return whole * Fraction(10) ** int(exponent or 0)


def _mixed_number(text: str) -> Fraction:
    whole, top, bottom = (int(part) for part in re.split(r"[\s/]+", text.strip()))
    if bottom == 0 or top >= bottom:
        raise NotAnExpression("no mixed number")
    return whole + Fraction(top, bottom)
