"""Numbers in words: `forty-two`, `one hundred and five`, `two thirds`; and the number in front of a thing counted."""

from __future__ import annotations

from fractions import Fraction

_TEENS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_PARTS = """half third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"""
BASES = {word: n for n, word in enumerate(_TEENS.split())}
_TENS_VALUES = {word: 10 * n for n, word in enumerate(_TENS.split(), start=2)}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES = {"hundred": Fraction(100), "dozen": Fraction(12), **{word: Fraction(n) for word, n in _LARGE.items()}}
PARTS = {word: Fraction(1, n) for n, word in enumerate(_PARTS.split(), start=2)}
PARTS |= {
    "halve": Fraction(1, 2),
    "quarter": Fraction(1, 4),
    "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000),
}
_MOST_WORDS = 16


def number_word(words: str) -> Fraction | None:
    """Return what a number in words is worth, None for anything else.

    >>> number_word("minus twenty-one"), number_word("one hundred and five"), number_word("two thirds")
    (Fraction(-21, 1), Fraction(105, 1), Fraction(2, 3))
    >>> number_word("five and six"), number_word("twenty twelve"), number_word("five apples")
    (None, None, None)
    """
    negative = words.startswith(("negative ", "minus "))
    tokens = (words.split(" ", 1)[1] if negative else words).replace("-", " ").split()
    if not tokens or len(tokens) > _MOST_WORDS:
        return None
    part = PARTS.get(tokens[-1].removesuffix("s")) if len(tokens) > 1 else None
    value = _whole(tokens if part is None else tokens[:-1])
    if value is None:
        return None
    result = Fraction(value) * (part or 1)
    return -result if negative else result


def counted(words: str) -> tuple[Fraction, str] | None:
    """Return the number in words and the thing counted after it: `five apples`; None without either.

    >>> counted("twenty-one red apples"), counted("apples"), counted("five")
    ((Fraction(21, 1), 'red apples'), None, None)
    """
    tokens = words.split()
    for length in range(min(len(tokens) - 1, _MOST_WORDS), 0, -1):
        value = number_word(" ".join(tokens[:length]))
        if value is not None:
            return value, " ".join(tokens[length:])
    return None


def _whole(tokens: list[str]) -> int | None:
    """Return the whole number of `two thousand five hundred and six`, None if it is none."""
    total, smallest = 0, 10**15
    block: list[str] = []
    for token in tokens:
        if token in _LARGE:
            value = _below_thousand(block)
            if not value or _LARGE[token] >= smallest:
                return None
            total, smallest, block = total + value * _LARGE[token], _LARGE[token], []
        else:
            block.append(token)
    if not block:
        return total if total else None
    if total and block[0] == "and":
        block = block[1:]
    rest = _below_thousand(block)
    return None if rest is None or (total and rest == 0) else total + rest


def _below_thousand(tokens: list[str]) -> int | None:
    if "hundred" not in tokens:
        return _below_hundred(tokens)
    place = tokens.index("hundred")
    count = BASES.get(tokens[0]) if place == 1 else None
    if not count or count > 19:
        return None
    rest = tokens[place + 1 :]
    if not rest:
        return 100 * count
    below = _below_hundred(rest[1:] if rest[0] == "and" else rest)
    return None if not below else 100 * count + below


def _below_hundred(tokens: list[str]) -> int | None:
    if len(tokens) == 1:
        return BASES.get(tokens[0], _TENS_VALUES.get(tokens[0]))
    if len(tokens) == 2 and tokens[0] in _TENS_VALUES and 1 <= BASES.get(tokens[1], 0) <= 9:
        return _TENS_VALUES[tokens[0]] + BASES[tokens[1]]
    return None
