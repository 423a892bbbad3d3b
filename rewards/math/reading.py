"""From the text of a committed answer to its structure: one reader per kind of answer, tried in order.

`rewards.math.notation` first brings the text into one spelling; `rewards.math.expression` reads what is left when no
list, bracket, relation, matrix or word is found. The last three functions find brackets in the cleaned text: how deep
each place is, where a bracket closes, and how to split outside all of them.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from itertools import product as cartesian

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
    grouped_assignments,
    scaled,
    share_variable,
)
from .arithmetic import is_calculation, rational
from .expression import NotAnExpression, parse_expression
from .notation import clean
from .units import NUMBERS, counted, number_word, split_unit

_OPEN, _CLOSE = "([{", ")]}"
_SIGN = re.compile(r"\\(?:le|ge|ne|approx|equiv|sim|to|rightarrow|Rightarrow|implies|mapsto|iff)(?![a-zA-Z])|[=<>]")
_MATRIX = re.compile(
    r"\\begin\s*\{(?P<env>[pbB]?matrix|smallmatrix|array)\}(?:\s*\{[lcr|\s]*\})?(?P<body>.*)\\end\s*\{(?P=env)\}",
    re.DOTALL,
)
_MATRIX_SHELL = re.compile(
    r"[(\[]\s*(\\begin\s*\{(?:matrix|smallmatrix|array)\}.*\\end\s*\{(?:matrix|smallmatrix|array)\})\s*[)\]]", re.DOTALL
)
_BASED = re.compile(r"\(?\s*([0-9A-Za-z]+)\s*\)?\s*_\s*(?:\{\s*(\d+|\\text\{[a-z]+\})\s*\}|(\d+))")
_RATIO = re.compile(r"\s*([^:=]+)\s*:\s*([^:=]+)(?:\s*:\s*([^:=]+))?\s*")
_MEMBER = re.compile(r"\s*(?:[a-zA-Z](?:_\{?\w+\}?)?|[a-zA-Z]\([a-zA-Z]\))\s*\\in(?![a-zA-Z])\s*(.*)", re.DOTALL)
_WORDS = re.compile(r"[a-zA-Z][a-zA-Z'.&/-]*(?:[\s,]+[a-zA-Z0-9][a-zA-Z0-9'.&/-]*)*")
_PLAIN_WORDS = re.compile(r"[a-zA-Z][a-zA-Z'.]*(?:-[a-zA-Z]{3,})*(?:\s+[a-zA-Z0-9][a-zA-Z0-9'.]*(?:-[a-z]{3,})*)*")
_FRENCH_INTERVAL = re.compile(r"([\[\]])([^\[\]]*,[^\[\]]*)([\[\]])")
_JOINED = re.compile(r",|\b(?:and|or)\b")
_NO_SOLUTION = frozenset(["no solution", "no solutions", "no real solution", "no real solutions", "empty set"])
_CHOICE = re.compile(r"\(\s*([A-Z])\s*\)?|([A-Z])\s*[.)]")
_SET_BUILDER = re.compile(r"[a-zA-Z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\||:)\s*(.*)", re.DOTALL)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_BASE_IN_WORDS = re.compile(
    r"\(?\s*([0-9A-Za-z]+)\s*\)?\s*(?:\\text\{)?\s*[(,]?\s*(?:in )?base[ -]?(?:\}\s*)?(\d+|[a-z]+)\s*\)?\s*\}?\s*\)?"
)
_SCALED_MATRIX = re.compile(r"(?P<factor>[^&]*?)\s*(?:\\cdot\s*|\*\s*)?(?P<matrix>[(\[]?\s*\\begin\s*\{.*)", re.DOTALL)


@lru_cache(maxsize=4096)
def parse_answer(text: str) -> Answer:
    r"""Read a committed answer.

    >>> parse_answer("1,234").value, parse_answer(r"\{1, 2\}").kind, parse_answer("x = 5").signs
    (Fraction(1234, 1), '{}', ('=',))
    """
    cleaned = clean(text)
    if cleaned is None:
        return Raw(text[:200])
    try:
        return _parse(cleaned, 0)
    except RecursionError:
        return Raw(cleaned)


def _parse(text: str, depth: int) -> Answer:
    text = text.strip()
    if depth > 12 or not text:
        return Raw(text)
    if "," in text and _THOUSANDS.fullmatch(split_unit(text).body):
        return _read_value(text)
    french = _FRENCH_INTERVAL.fullmatch(text)
    if french is not None and french[1] + french[3] != "[]":  # ]1, 2[ is (1, 2)
        text = f"{'(' if french[1] == ']' else '['}{french[2]}{')' if french[3] == '[' else ']'}"
    for reader in (
        _read_text,
        _read_matrix,
        _read_several,
        _read_union,
        _read_relation,
        _read_bracketed,
        _read_based,
        _read_ratio,
    ):
        answer = reader(text, depth)
        if answer is not None:
            return answer
    return _read_value(text)


def _read_text(text: str, depth: int) -> Answer | None:
    r"""Read words: `\text{Evelyn}`, `east`, `(A)`; a number word is its number."""
    bare = _TEXT.sub(r" \1 ", text).strip()
    bare = bare[1:-1].strip() if bare.startswith("{") and bare.endswith("}") else bare
    choice = _CHOICE.fullmatch(bare)
    if choice is not None:
        return Text(text, choice[1] or choice[2])
    in_text = "\\text" in text
    if not (_WORDS if in_text else _PLAIN_WORDS).fullmatch(bare):
        return None
    if not in_text and len(bare) > 1 and all(len(word) == 1 for word in bare.split()):
        return None  # x y is a product
    words = " ".join(bare.lower().split()).strip(" .").removeprefix("the ")
    number = number_word(words)
    if number is not None:
        return Value(text, ("num", number), number)
    if (named := counted(words)) is not None:  # five apples
        unit = split_unit(f"1 \\text{{{named[1]}}}").unit
        return Text(text, words) if unit is None else Value(text, ("num", named[0]), named[0], unit)
    if _JOINED.search(words) and not (in_text and re.search(r"(?<!\\)(?!and\b|or\b)\b[a-z]{2,}", words)):
        return _parse(bare, depth + 1) if in_text else None  # a list; in \text{} only words keep their order
    if words in _NO_SOLUTION:
        return Several(text, "{}", ())
    if len(bare) == 1:
        return Text(text, bare) if in_text or bare.isupper() else None
    return Text(text, words) if in_text or len(bare) > 2 or words == "no" else None


def _read_matrix(text: str, depth: int) -> Answer | None:
    shell = _MATRIX_SHELL.fullmatch(text)
    match = _MATRIX.fullmatch(shell[1] if shell else text)
    if match is None or "\\begin" in match["body"]:
        return _read_scaled_matrix(text, depth)
    lines = [line for line in re.split(r"\\cr(?![a-zA-Z])", match["body"].replace("\\hline", "")) if line.strip()]
    rows = tuple(tuple(_parse(cell, depth + 1) for cell in line.split("&")) for line in lines)
    return Matrix(text, rows) if rows and len({len(row) for row in rows}) == 1 else Raw(text)


def _read_scaled_matrix(text: str, depth: int) -> Answer | None:
    r"""Read `\frac12 \begin{pmatrix}…\end{pmatrix}`: every entry times the number."""
    match = _SCALED_MATRIX.fullmatch(text) if text.count("\\begin") == 1 else None
    if match is None or not match["factor"].strip():
        return None
    factor = _parse("-1" if match["factor"].strip() == "-" else match["factor"], depth + 1)
    matrix = _read_matrix(match["matrix"].strip(), depth + 1)
    if not isinstance(factor, Value) or factor.value is None or factor.unit or not isinstance(matrix, Matrix):
        return None
    rows = []
    for row in matrix.rows:
        entries = [entry for entry in row if isinstance(entry, Value)]
        if len(entries) != len(row):
            return None
        rows.append(tuple(scaled(entry, factor.value) for entry in entries))
    return Matrix(text, tuple(rows))


def _read_several(text: str, depth: int) -> Answer | None:
    """Read a bare list: commas, semicolons, `and`, `or` outside all brackets, and `±`."""
    if re.search(r",\s", text):
        text = _GROUPED.sub(lambda m: m.group().replace(",", ""), text)
    parts = (
        _split_outside(text, r"\s*;\s*(?:(?:and|or)(?![a-zA-Z])\s*)?")
        if ";" in text
        else _split_outside(text, r",?\s*(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])\s*|\s*,\s*")
    )
    if len(parts) > 1:
        if any(not part.strip() for part in parts):
            return Raw(text)
        items = [_parse(part, depth + 1) for part in parts]
        flat = [
            inner
            for item in items
            for inner in (item.items if isinstance(item, Several) and item.kind == "," else (item,))
        ]
        if solutions := grouped_assignments(flat):
            groups = (Several(", ".join(item.source for item in group), ",", tuple(group)) for group in solutions)
            return Several(text, ",", tuple(groups))
        return Several(text, ",", tuple(share_variable(flat)))
    signs = re.findall(r"\\pm(?![a-zA-Z])|\\mp(?![a-zA-Z])", text)
    if not signs or len(signs) > 3 or text.startswith(("(", "[", "\\lbrace")):
        return None
    choices = [_parse(choice, depth + 1) for choice in _plus_minus(text, signs)]
    return Several(text, ",", tuple(share_variable(choices)))


def _plus_minus(text: str, signs: list[str]) -> list[str]:
    pieces = re.split(r"\\pm(?![a-zA-Z])|\\mp(?![a-zA-Z])", text)
    if "\\mp" in signs:  # linked: upper signs together, lower signs together
        choices = [tuple("+-"[sign == "\\mp"] for sign in signs), tuple("-+"[sign == "\\mp"] for sign in signs)]
    else:
        choices = list(cartesian("+-", repeat=len(signs)))
    return ["".join(p + s for p, s in zip(pieces, (*choice, ""), strict=True)) for choice in choices]


def _read_union(text: str, depth: int) -> Answer | None:
    removed = _split_outside(text, r"\s*\\(?:setminus|backslash)(?![a-zA-Z])\s*")
    if len(removed) == 2:
        return Several(text, "\\setminus", tuple(_parse(part, depth + 1) for part in removed))
    parts = _split_outside(text, r"\s*\\cup(?![a-zA-Z])\s*")
    if len(parts) < 2:
        return None
    sets = tuple(_parse(part, depth + 1) for part in parts)
    if all(isinstance(part, Several) and part.kind == "{}" for part in sets):
        return Several(text, "{}", tuple(item for part in sets if isinstance(part, Several) for item in part.items))
    return Several(text, "U", sets)


def _read_relation(text: str, depth: int) -> Answer | None:
    member = _MEMBER.fullmatch(text)
    if member is not None:
        return _parse(member[1], depth + 1)
    pieces: list[str] = []
    signs: list[str] = []
    start = 0
    for match in _SIGN.finditer(text):
        if _depths(text)[match.start()] == 0:
            pieces.append(text[start : match.start()])
            signs.append(match.group())
            start = match.end()
    if not signs:
        return None
    pieces.append(text[start:])
    if signs == ["\\approx"] and not pieces[0].strip():
        return _parse(pieces[1], depth + 1)
    if any(not piece.strip() for piece in pieces) or len(signs) > 6:
        return Raw(text)
    return Relation(text, tuple(_parse(piece, depth + 1) for piece in pieces), tuple(signs))


def _read_bracketed(text: str, depth: int) -> Answer | None:
    """Read what one pair of brackets encloses: a set, a tuple, an interval, or just parentheses."""
    if text.startswith("\\lbrace"):
        if not text.endswith("\\rbrace") or _closing_place(text, 0) != len(text) - len("\\rbrace"):
            return None
        inner = text[len("\\lbrace") : -len("\\rbrace")].strip()
        if not inner:
            return Several(text, "{}", ())
        builder = _SET_BUILDER.fullmatch(inner)
        parsed = _parse(builder[1] if builder else inner, depth + 1)
        if builder is not None:
            return parsed
        items = parsed.items if isinstance(parsed, Several) and parsed.kind == "," else (parsed,)
        return Several(text, "{}", items)
    if text in ("\\emptyset",):
        return Several(text, "{}", ())
    if text[0] not in "([{" or text[-1] not in ")]}" or _closing_place(text, 0) != len(text) - 1:
        return None
    inner = text[1:-1].strip()
    parsed = _parse(inner, depth + 1)
    if text[0] == "{" or (isinstance(parsed, Value | Text) and parsed.source == inner):
        if isinstance(parsed, Value) and (text[0] == "[" or text[-1] == "]"):
            return None if text[0] + text[-1] == "[]" else Raw(text)
        return parsed
    parts = _split_outside(inner, r"\s*[,;]\s*")
    if len(parts) < 2:
        return parsed if isinstance(parsed, Several) and text[0] == "(" else None
    return Several(text, text[0] + text[-1], tuple(_parse(part, depth + 1) for part in parts))


def _read_based(text: str, depth: int) -> Answer | None:
    match = _BASED.fullmatch(text)
    in_words = _BASE_IN_WORDS.fullmatch(text) if match is None else None
    if match is not None:
        name = (match[2] or match[3]).removeprefix("\\text{").removesuffix("}")
    elif in_words is not None:
        match, name = in_words, in_words[2]
    else:
        return None
    base = NUMBERS.get(name, int(name) if name.isdigit() else 0)
    digits = match[1].lstrip("0").upper() or "0"
    if not any(digit.isdigit() for digit in digits) and not digits.isupper():
        return None
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    if base == 10:
        return Value(text, ("num", Fraction(int(digits))), Fraction(int(digits)))
    return Based(text, digits, base)


def _read_ratio(text: str, depth: int) -> Answer | None:
    match = _RATIO.fullmatch(text)
    if match is None:
        return None
    return Ratio(text, tuple(_parse(part, depth + 1) for part in match.groups() if part))


def _read_value(text: str) -> Answer:
    measure = split_unit(text)
    body = re.sub(r"^(?:negative|minus)\s+(?=[\d\\])", "-", measure.body)
    if _THOUSANDS.fullmatch(body):
        body = body.replace(",", "")
    try:
        node = parse_expression(body)
    except NotAnExpression:
        return Raw(text)
    value = rational(node)
    if measure.scale != 1:
        if value is None:
            return Raw(text)
        value *= measure.scale
        node = ("num", value)
    if measure.percent:
        worked_out = value is not None and not is_calculation(node)
        if value is not None:
            value /= 100
        node = ("num", value) if worked_out else ("div", node, ("num", Fraction(100)))
    return Value(text, node, value, measure.unit, measure.percent)


def _split_outside(text: str, separator: str) -> list[str]:
    """Split at a separator outside all brackets and macros' braces."""
    parts: list[str] = []
    start = 0
    for match in re.finditer(separator, text):
        if match.end() > match.start() and _depths(text)[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


@lru_cache(maxsize=64)
def _depths(text: str) -> tuple[int, ...]:
    """Return how many brackets are open around each character; a bracket itself counts as outside."""
    depth, result, place = 0, [], 0
    while place < len(text):
        step = 7 if text.startswith(("\\lbrace", "\\rbrace"), place) else 1
        opens = text[place] in _OPEN or text.startswith("\\lbrace", place)
        closes = text[place] in _CLOSE or text.startswith("\\rbrace", place)
        depth -= closes
        result.extend([depth] * step)
        depth += opens
        place += step
    return tuple(result)


def _closing_place(text: str, place: int) -> int:
    """Return where the bracket that opens at `place` closes, −1 if it does not."""
    levels = _depths(text)
    after = place + (7 if text.startswith("\\lbrace", place) else 1)
    for index in range(after, len(text)):
        if levels[index] <= levels[place]:
            return index
    return -1
