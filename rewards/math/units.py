r"""Units, currencies, percent, degrees and numbers in words around a value: the explicit policy of the math rewards.

- A unit may be left out on either side: gold `5\text{ cm}` is answered by 5, gold 18 by `\$18` or `18 dollars`.
- Two units that are both known must be the same unit: 5 cm is not 5 m. Nothing is converted: 5 cm is not 50 mm here.
- Words that are no unit of measurement (`72 clips`) name what is counted; two of them are not compared.
- `million`, `dozen` and the like multiply.
- `50\%` is 0.5; where only one side has the sign, 50 answers it too (graders' habit), if the bare value is at least 1.
- `90^\circ` is 90 (the unit left out) and π/2 (mathematics).
- Numbers may be words: `forty-two`, `one hundred and five`, `two thirds`, also in front of a thing counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_SAME = """
mm millimeter millimetre; cm centimeter centimetre; dm decimeter; m meter metre; km kilometer kilometre
in inch inches; ft foot feet; yd yard; mi mile; mg milligram; g gram; kg kilogram; lb lbs pound; oz ounce; ton tonne
s sec second; min minute; h hr hour; day; week; month; yr year; ms millisecond
l liter litre; ml milliliter millilitre; gal gallon; qt quart; pint; cup
mph; km/h kph kmh; m/s mps; celsius; fahrenheit
n newton; j joule; w watt; kw kilowatt; v volt; pa pascal; hz hertz; mol mole; k kelvin
acre; hectare ha; dollar usd buck; cent; euro eur; pence penny pennies; rupee rs inr; yen yuan
degree deg; radian rad; am; pm
"""
_CANONICAL = {
    alias: group.split()[0]
    for line in _SAME.strip().splitlines()
    for group in line.split(";")
    for alias in group.split()
}
_UNITS = frozenset([*_CANONICAL.values(), "%", "pound sterling"])
_GLUED_NAMES = "cm mm km kg mg ml ft lb lbs oz mph hr hrs min sec am pm usd m/s km/h cm/s"
_GLUED = frozenset(_GLUED_NAMES.split())
_SPEEDS = {"mi per h": "mph", "mi/h": "mph", "km per h": "km/h", "m per s": "m/s"}
_SIGNS = {
    "\\USD": "dollar",
    "€": "euro",
    "£": "pound sterling",
    "¥": "yen",
    "₹": "rupee",
    "\\euro": "euro",
    "\\pounds": "pound sterling",
}
_NOT_UNITS = """or and not mod modulo plus minus times over divided if to versus vs than approximately about possibly
maybe either no equals is between through per percent negative positive squared cubed factorial base least most infinity
none quarter remainder pi sqrt root with unknown wrong incorrect false sure zero one two three four five six seven eight
nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion
dozen"""
_DEGREES: tuple[set[str], ...] = ({"degree", "celsius"}, {"degree", "fahrenheit"})
_NOT_A_UNIT = frozenset(_NOT_UNITS.split())
_UNIT_WORD = re.compile(r"[a-z][a-z'/-]*")
_ABBREVIATION = re.compile(r"\b([a-z])\.\s*([a-z])\b\.?")
_PREFIX = re.compile(
    r"(?P<minus>-?)\s*(?:US\s*(?=\\USD))?(?P<sign>\\USD|\\euro|\\pounds|[€£¥₹])\s*(?P<body>.*)",
    re.DOTALL,
)
_ORDINAL = re.compile(
    r"(?P<body>\d*(?P<last>\d))\s*(?:\^\s*)?(?:\{\s*)?(?:\\text\{\s*)?(?P<suffix>st|nd|rd|th)\s*\}?\s*\}?(?:\s+[a-z]{4,})?"
)
_SUFFIX_SIGN = re.compile(r"(?P<body>.*?[\d})])\s*(?P<sign>\\USD|[€£¥₹])", re.DOTALL)
_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?"
_TEXT_UNIT = re.compile(r"(?P<body>.*\S)\s*\\text\{(?P<unit>[^{}]*)\}" + _POWER, re.DOTALL)
_WORD_UNIT = re.compile(r"(?P<body>.*?[\d})!%])\s*-?\s*(?P<unit>[a-zA-Z][a-zA-Z.'/ -]*)" + _POWER, re.DOTALL)
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREE = re.compile(
    r"(?P<body>.*\S)\s*\\deg\s*(?:\\text\{\s*)?(?P<scale>[CF](?![a-zA-Z])|(?i:celsius|fahrenheit))?\s*\}?", re.DOTALL
)
_TEENS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_PART_NAMES = """half third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"""
NUMBERS = {word: n for n, word in enumerate(_TEENS.split())}
_TENS_VALUES = {word: 10 * n for n, word in enumerate(_TENS.split(), start=2)}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES = {"hundred": Fraction(100), "dozen": Fraction(12), **{word: Fraction(n) for word, n in _LARGE.items()}}
_PARTS = {word: Fraction(1, n) for n, word in enumerate(_PART_NAMES.split(), start=2)}
_PARTS |= {
    "halve": Fraction(1, 2),
    "quarter": Fraction(1, 4),
    "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000),
}
_MOST_WORDS = 16


@dataclass(frozen=True, slots=True)
class Measure:
    """A body of mathematics with what stands around it."""

    body: str
    unit: str | None = None
    percent: bool = False
    scale: Fraction = Fraction(1)


def split_unit(text: str) -> Measure:
    r"""Split a cleaned text into its mathematics and its unit.

    >>> split_unit(r"15 \text{cm}^2")
    Measure(body='15', unit='cm^2', percent=False, scale=Fraction(1, 1))
    >>> split_unit(r"\USD 3 million").scale, split_unit("72 clips").body, split_unit("41 or 42").unit
    (Fraction(1000000, 1), '72', None)
    """
    unit: str | None = None
    scale = Fraction(1)
    prefix = _PREFIX.fullmatch(text)
    if prefix is not None:
        text, unit = prefix["minus"] + prefix["body"], _SIGNS[prefix["sign"]]
    suffix = _SUFFIX_SIGN.fullmatch(text)
    if suffix is not None and unit is None:
        text, unit = suffix["body"], _SIGNS[suffix["sign"]]
    if text.endswith("%"):
        return Measure(text[:-1].rstrip(), None, True)
    degree = _DEGREE.fullmatch(text)
    if degree is not None and "\\deg" not in degree["body"] and not _TRIGONOMETRY.search(degree["body"]):
        scale_name = {"c": "celsius", "f": "fahrenheit"}.get((degree["scale"] or "").lower()[:1])
        return Measure(degree["body"], scale_name or "degree")
    ordinal = _ORDINAL.fullmatch(text)
    if ordinal is not None and ordinal["suffix"] == _ordinal_suffix(ordinal["body"]):
        return Measure(ordinal["body"], "th")
    match = _TEXT_UNIT.fullmatch(text) or _WORD_UNIT.fullmatch(text)
    if match is not None:
        glued = "\\text" not in match.group() and match.end("body") == match.start("unit")
        words = _ABBREVIATION.sub(r"\1\2", match["unit"].lower()).replace(".", " ").split()
        factor = _factor(words)
        if factor is not None:
            scale, words = factor, words[1:]
        named = _unit_name(words, match["power"], in_text="\\text" in match.group(), glued=glued)
        if named is not None or (scale != 1 and not words):
            text, unit = match["body"].rstrip(), named or unit
        else:
            scale = Fraction(1)
    return Measure(text, unit, False, scale)


def _factor(words: list[str]) -> Fraction | None:
    """Return what `million` or, where nothing else is named, `thirds` multiplies by."""
    first = words[0].removesuffix("s") if words else ""
    alone = len(words) == 1 or (len(words) > 1 and words[1] == "of")
    return _SCALES.get(first) or (_PARTS.get(first) if alone else None)


def _ordinal_suffix(digits: str) -> str:
    """Return the ending of an ordinal: 21st, 12th."""
    if digits[-2:] in ("11", "12", "13"):
        return "th"
    return {"1": "st", "2": "nd", "3": "rd"}.get(digits[-1], "th")


def _unit_name(words: list[str], power: str | None, *, in_text: bool, glued: bool) -> str | None:
    """Return the unit's one name, the words themselves for a thing counted, or None if the words are no unit.

    Outside `\\text{}` letters may be variables: `5 m`, `5xy`. There a unit of one letter, a short unknown word and
    what sticks to the number without being a common unit are left to the mathematics.
    """
    if not words or len(words) > 6 or not all(_UNIT_WORD.fullmatch(word) for word in words):
        return None
    if any(word in _NOT_A_UNIT or word.removesuffix("s") in _NOT_A_UNIT for word in words if word != "per"):
        return None
    if not in_text:
        if glued and words[0] not in _GLUED:
            return None
        wordy = len(words[0]) >= 3 and any(len(word) >= 4 for word in words)  # 5 red apples
        if len(words[0]) < 2 or (len(words[0]) < 4 and not wordy and _canonical(words[0]) not in _UNITS):
            return None
    if len(words) > 1 and words[0] in ("degree", "degrees"):
        words = words[1:]  # degrees Celsius
    degree = power
    if words[0] in ("square", "sq") and len(words) > 1:
        words, degree = words[1:], "2"
    elif words[0] in ("cubic", "cu") and len(words) > 1:
        words, degree = words[1:], "3"
    elif words[-1] in ("squared", "cubed"):
        words, degree = words[:-1], "2" if words[-1] == "squared" else "3"
    name = " ".join(_canonical(word) for word in words)
    name = _SPEEDS.get(name, name)
    return f"{name}^{degree}" if degree not in (None, "1") else name


def _canonical(word: str) -> str:
    for form in (word, word.removesuffix("s"), word.removesuffix("es")):
        if form in _CANONICAL:
            return _CANONICAL[form]
    return word.removesuffix("s")


def compatible(left: str | None, right: str | None) -> bool:
    """Return whether two units may stand on the two sides of one answer.

    A missing unit fits any. Things counted may be named differently, a unit of measurement may not; `day` and
    `school day` share a word and will do.

    >>> compatible("cm", None), compatible("clip", "video"), compatible("cm", "m"), compatible("cm", "cm^2")
    (True, True, False, False)
    """
    if left is None or right is None or left == right or {left, right} in _DEGREES:
        return True
    (left_words, left_power), (right_words, right_power) = _parts(left), _parts(right)
    if left_words & right_words and left_power == right_power:
        return True
    return not any(word in _UNITS for word in left_words | right_words)


def _parts(unit: str) -> tuple[set[str], str]:
    name, _, power = unit.partition("^")
    return set(name.split()) - {"per"}, power


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
    part = _PARTS.get(tokens[-1].removesuffix("s")) if len(tokens) > 1 else None
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
    count = NUMBERS.get(tokens[0]) if place == 1 else None
    if not count or count > 19:
        return None
    rest = tokens[place + 1 :]
    if not rest:
        return 100 * count
    below = _below_hundred(rest[1:] if rest[0] == "and" else rest)
    return None if not below else 100 * count + below


def _below_hundred(tokens: list[str]) -> int | None:
    if len(tokens) == 1:
        return NUMBERS.get(tokens[0], _TENS_VALUES.get(tokens[0]))
    if len(tokens) == 2 and tokens[0] in _TENS_VALUES and 1 <= NUMBERS.get(tokens[1], 0) <= 9:
        return _TENS_VALUES[tokens[0]] + NUMBERS[tokens[1]]
    return None
