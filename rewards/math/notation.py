r"""One spelling for the many ways to write the same mathematics: LaTeX variants, Unicode signs, separators, spacing.

`clean` rewrites notation only; it never changes a value. `12{,}34` (no valid grouping) and control characters survive
as they are, and the parser refuses them.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST_CHARS = 4000

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_VULGAR |= {"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9", "⅒": "1/10", "⅐": "1/7"}
_SIGNS = {
    **dict.fromkeys("−‒–—―﹣－", "-"),
    **dict.fromkeys("‘’′", "'"),
    **dict.fromkeys("٬،、", ","),
    **dict.fromkeys("٫。", "."),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f", ""),
    **dict.fromkeys("\u2061\u2062\u2063", " "),
    "＋": "+",
    "×": r" \times ",
    "⋅": r" \cdot ",
    "·": r" \cdot ",
    "∙": r" \cdot ",
    "∗": "*",
    "÷": r" \div ",
    "⁄": "/",
    "∕": "/",
    "π": r" \pi ",
    "𝜋": r" \pi ",
    "θ": r" \theta ",
    "α": r" \alpha ",
    "β": r" \beta ",
    "λ": r" \lambda ",
    "φ": r" \phi ",
    "∞": r" \infty ",
    "≤": r" \le ",
    "≥": r" \ge ",
    "⩽": r" \le ",
    "⩾": r" \ge ",
    "≠": r" \ne ",
    "≈": r" \approx ",
    "±": r" \pm ",
    "∓": r" \mp ",
    "∪": r" \cup ",
    "∩": r" \cap ",
    "∈": r" \in ",
    "∅": r" \emptyset ",
    "ℝ": r" \mathbb{R} ",
    "°": r" \deg ",
    "º": r" \deg ",
    "√": r" \sqrt ",
    "∛": r" \sqrt[3] ",
    "％": "%",
}
_TRANSLATE = str.maketrans(_SIGNS)
_SUPER_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
_SUB_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_TYPESET_FRACTION = re.compile("(?<=\\d)?([⁰¹²³⁴⁵⁶⁷⁸⁹]+)[⁄/∕]([₀₁₂₃₄₅₆₇₈₉]+)")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

_THOUSANDS = re.compile(r"(?<![\d.}])\d{1,3}(?:(?:,\\!|\{,\}|,\\,|\\[,; ]|~|[ \u00a0])\s?\d{3})+(?!\d|\{,\}|,\\!|\s?/)")
_THOUSANDS_MARK = re.compile(r"\{,\}|\\[!,; ]|[,~\s]")
_SPACING = re.compile(r"\\(?:[,;:>]|quad|qquad|enspace|thinspace|hspace\*?\{[^{}]*\}|hfill)(?![a-zA-Z])|\\ |~|\s")
_NOTHING = re.compile(
    r"\\!|\\(?:left|right|middle|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits|boldsymbol|ensuremath)(?![a-zA-Z])\.?"
)
_FONT = re.compile(
    r"\\(?:text(?:normal|bf|it|rm|sf|tt|up)?|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|emph|rm|operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_MATHEMATICS = re.compile(r"\\(?:frac|sqrt|pi|cdot|times|pm|infty)(?![a-zA-Z])|[{}]")
_UNIT_POWER = re.compile(r"([a-zA-Z]+(?:/[a-zA-Z]+)?)\s*\^\s*\{?\s*(\d)\s*\}?")
_UNIT_OVER = re.compile(r"([a-zA-Z]+)(?:\\[,;: ]|\\cdot|[\s~·])+([a-zA-Z]+)\s*\^\s*\{?\s*-\s*(\d)\s*\}?")
_UNIT_FRACTION = re.compile(r"\\frac\s*\{\s*\\text\{(\w+)\}\s*\}\s*\{\s*\\text\{(\w+)\}\s*(?:\^\s*\{?(\d)\}?)?\s*\}")
_UNIT_QUOTIENT = re.compile(
    r"\\text\{(\w+)\}\s*(?:/\s*\\text\{(\w+)\}|(?:\\cdot)?\s*\\text\{(\w+)\}\s*\^\s*\{\s*-\s*(\d)\s*\})"
)
_CURRENCY_CODE = re.compile(r"\A(USD|EUR|GBP)\s*(?=[-\d.])")
_MEASURE_IN_TEXT = re.compile(r"([-+]?[\d.,/]+)\s+([a-zA-Z][a-zA-Z ./]*)")
_NOTE = re.compile(r"\(\s*([a-z][a-z ]{2,})\s*\)")
_FENCE = re.compile(r"\s*```[a-z]*\s*([^`]*?)\s*```\s*")
_OVER = re.compile(r"\{([^{}]*?)\\over(?![a-zA-Z])([^{}]*)\}")
_LETTER_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_LETTER_CUP = re.compile(r"(?<=[\])])\s*U\s*(?=[\[(])")
_REALS = re.compile(r"\\mathbb\s+R(?![a-zA-Z])|\\mathbb\s*\{\s*R\s*\}|\\R(?![a-zA-Z])")
_REALS_WITHOUT = re.compile(r"(?<=\\mathbb\{R\})\s*-\s*(?=\\lbrace)")
_ROW_GAP = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]")
_APOSTROPHES = re.compile(r"(?<![\d'])\d{1,3}(?:'\d{3})+(?![\d'])")
_SPLIT_FRACTION = re.compile(r"\^\s*\{?\s*(\d+)\s*\}?\s*/\s*_\s*\{?\s*(\d+)\s*\}?")
_REPEATING = re.compile(r"(\d{1,20})\.(\d{0,20})\\(?:overline|bar)\s*\{(\d{1,20})\}")
_DECORATION = re.compile(
    r"\\(?:color|textcolor)\s*\{[a-zA-Z]+\}|\\(?:[hv]?phantom|label|tag\*?)\s*\{[^{}]*\}|(?<=[\d)])\{\s*\}|\\(?:underline|bf|it|rm|bm|tiny|small|normalsize|large|Large|LARGE|huge|Huge|checkmark|"
    r"blacksquare|square|Box)(?![a-zA-Z])"
)
_ELLIPSIS = re.compile(r"\.{2,}|…")
_FRAC = re.compile(r"\\(?:[dtcsx]|nice)frac(?![a-zA-Z])")
_RENAMED = re.compile(
    r"\\(leq|geq|neq|leqslant|geqslant|varnothing|degree|lbrack|rbrack|lparen|rparen|ast|star|"
    r"thickapprox|simeq|cong|vert|lvert|rvert|mid|colon|land|lor|gt|lt|varphi|varepsilon|Reals|ldots|cdots|langle|rangle)(?![a-zA-Z])"
)
_NEW_NAMES = {
    "leq": r"\le ",
    "geq": r"\ge ",
    "leqslant": r"\le ",
    "geqslant": r"\ge ",
    "neq": r"\ne ",
    "varnothing": r"\emptyset ",
    "degree": r"\deg ",
    "lbrack": "[",
    "rbrack": "]",
    "lparen": "(",
    "rparen": ")",
    "ast": "*",
    "star": "*",
    "thickapprox": r"\approx ",
    "simeq": r"\approx ",
    "cong": r"\approx ",
    "vert": "|",
    "lvert": "|",
    "rvert": "|",
    "mid": "|",
    "colon": ":",
    "land": " and ",
    "lor": " or ",
    "gt": ">",
    "lt": "<",
    "varphi": r"\phi ",
    "varepsilon": r"\epsilon ",
    "Reals": r"\mathbb{R}",
    "ldots": r"\dots ",
    "cdots": r"\dots ",
    "langle": "(",
    "rangle": ")",
}
_BARE_WORD = re.compile(
    r"(?<![\\a-zA-Z{])(sqrt|pi|sin|cos|tan|cot|sec|csc|ln|log|exp|arcsin|arccos|arctan|infinity|inf|oo|infty|theta|alpha|beta)"
    r"(?![a-zA-Z])"
)
_DEGREES = re.compile(
    r"\^\s*\{\s*\\(?:circ|deg)\s*\}|\^\s*\\(?:circ|deg)(?![a-zA-Z])|\\text\{degrees?\}|(?<=\d)\s*\bdegrees?\b"
)
_PERCENT = re.compile(r"\\%|\\text\{(?:\\?%|per ?cent(?:age)?|pct)\}|(?<=\d)\s*(?:per ?cent(?:age)?|pct)\b")
_PLAIN_SIGNS = (("**", "^"), ("<=", r"\le "), (">=", r"\ge "), ("!=", r"\ne "), ("\\&", "&"), ("==", "="), ("\\#", "#"))
_ASCII_FAST = re.compile(r"-?\d+(?:\.\d+)?")


def clean(text: str) -> str | None:
    r"""Return the text in one spelling, or None if it cannot be an answer (too long, control characters).

    >>> clean(r"$\left(1{,}234,\,\dfrac12\right)$."), clean("−3½ °"), clean(r"10,\!080")
    ('(1234, \\frac12)', '-3 1/2 \\deg', '10080')
    """
    text = text.strip()
    if len(text) > LONGEST_CHARS:
        return None
    if _ASCII_FAST.fullmatch(text):
        return text
    if _CONTROL.search(text):
        return None
    if not text.isascii():
        text = _to_ascii(text)
    text = _strip_delimiters(text)
    text = _ROW_GAP.sub(r"\\\\", text)
    if "\\\\" in text:  # a row's end in a matrix; elsewhere a command escaped twice
        text = text.replace("\\\\", "\\cr ") if "\\begin" in text else text.replace("\\\\", "\\")
    text = _THOUSANDS.sub(lambda m: _THOUSANDS_MARK.sub("", m.group()), text)
    text = _CURRENCY_CODE.sub(lambda m: {"USD": "\\USD ", "EUR": "€", "GBP": "£"}[m[1]], text)
    text = text.replace("\\$", "\\USD ").replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    text = _DECORATION.sub("", _NOTHING.sub("", text))
    text = _OVER.sub(r"\\frac{\1}{\2}", _FRAC.sub(r"\\frac", text))
    text = _FONT.sub(_font_content, text)
    text = _UNIT_FRACTION.sub(_unit_over, text)
    text = _UNIT_QUOTIENT.sub(_unit_over, text)
    text = _SPACING.sub(" ", text)
    text = _RENAMED.sub(lambda m: _NEW_NAMES[m.group(1)], text)
    text = _ELLIPSIS.sub(r"\\dots ", text)
    for old, new in _PLAIN_SIGNS:
        text = text.replace(old, new)
    text = _REPEATING.sub(_repeating, text)
    text = _DEGREES.sub(r" \\deg ", text)
    text = _PERCENT.sub("%", text)
    text = _BARE_WORD.sub(
        lambda m: "\\" + {"infinity": "infty", "inf": "infty", "oo": "infty"}.get(m.group(1), m.group(1)), text
    )
    text = _LETTER_CUP.sub(r" \\cup ", _LETTER_TIMES.sub(r" \\times ", text))
    text = _REALS_WITHOUT.sub(r" \\setminus ", _REALS.sub(r"\\mathbb{R}", text))
    text = _APOSTROPHES.sub(lambda m: m.group().replace("'", ""), text)
    text = _SPLIT_FRACTION.sub(r" \1/\2", text)
    text = " ".join(text.split())
    return _strip_ends(text)


def same_spelling(left: str, right: str) -> bool:
    r"""Return whether two cleaned texts differ in nothing but insignificant blanks.

    >>> same_spelling("x + 1", "x+1"), same_spelling("4 2", "42")
    (True, False)
    """
    return left == right or _squeezed(left) == _squeezed(right)


_INSIGNIFICANT = re.compile(r"(?<![a-zA-Z0-9.])\s+|\s+(?![a-zA-Z0-9.])")


def _squeezed(text: str) -> str:
    return _INSIGNIFICANT.sub("", text)


def _to_ascii(text: str) -> str:
    """Write Unicode mathematics as LaTeX and every decimal digit, full-width or Arabic, as 0 to 9."""
    for sign, fraction in _VULGAR.items():
        if sign in text:
            text = re.sub(rf"(?<=\d)\s*{sign}", f" {fraction}", text).replace(sign, fraction)
    text = _TYPESET_FRACTION.sub(lambda m: f" {m[1].translate(_SUPERSCRIPTS)}/{m[2].translate(_SUBSCRIPTS)}", text)
    text = _SUPER_RUN.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUB_RUN.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = text.translate(_TRANSLATE)
    text = unicodedata.normalize("NFKC", text).translate(_TRANSLATE)
    return "".join(str(unicodedata.decimal(char, char)) for char in text)


_WRAPPERS = (("`", "`"), ("$", "$"), ("*", "*"), ("_", "_"), ('"', '"'), ("'", "'"), ("“", "”"))


def _strip_delimiters(text: str) -> str:
    r"""Remove `$…$`, `\(…\)`, `\[…\]` and emphasis around the whole text, and stray `$` that are no currency."""
    if (fenced := _FENCE.fullmatch(text)) is not None:
        text = fenced[1]
    for _ in range(4):
        before = text
        text = text.strip().removeprefix("=")
        for opening, closing in (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), *_WRAPPERS):
            if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
                inner = text[len(opening) : -len(closing)]
                if opening not in inner:
                    text = inner
        if text == before:
            break
    if "$" in text:
        if re.match(r"[-+]?\s*(?:US)?\$\s*-?[\d.]", text) and text.count("$") - text.count("\\$") == 1:
            return re.sub(r"(?<!\\)\$", r"\\$", text)
        text = re.sub(r"(?<!\\)\$", " ", text)
    return text


def _repeating(match: re.Match[str]) -> str:
    r"""Write a repeating decimal as the fraction it is: 0.1\overline{6} is (16 - 1)/90."""
    whole, fixed, period = match.groups()
    top = int(whole + fixed + period) - int(whole + fixed)
    return f"\\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def _font_content(match: re.Match[str]) -> str:
    r"""Keep words in `\text{}`, and unwrap numbers, signs, single letters and the words `or` and `and`."""
    content = match.group(1).strip()
    bare = content.strip(",. ").lower()
    if bare in ("or", "and"):
        return f" {content} "
    if match.start() > 0 and (power := _UNIT_POWER.fullmatch(content)):
        return f"\\text{{{power[1]}}}^{power[2]}"
    if match.start() > 0 and (over := _UNIT_OVER.fullmatch(content)):
        return f"\\text{{{over[1]}/{over[2]}}}" + ("" if over[3] == "1" else f"^{over[3]}")
    if _MATHEMATICS.search(content):
        return f" {content} "
    if measure := _MEASURE_IN_TEXT.fullmatch(content):
        return f"{measure[1]} \\text{{{measure[2]}}}"
    if match.start() > 0 and (note := _NOTE.fullmatch(content)):
        content = note[1]
    if re.search(r"[a-zA-Z]{2,}", content):
        return f"\\text{{{' '.join(content.split())}}}"
    if bare in ("e", "i", "d"):  # upright constants
        return content
    if len(bare) == 1 and bare.isalpha() and match.start() > 0:
        return f"\\text{{{content}}}"  # after something: a unit (5\text{ m}); alone: a name
    return match.group(1)


def _unit_over(match: re.Match[str]) -> str:
    r"""Write a quotient of units as one unit: `\frac{\text{m}}{\text{s}^2}` is `\text{m/s}^2`."""
    top, *below = (group for group in match.groups() if group is not None)
    power = f"^{below[1]}" if len(below) > 1 and below[1] != "1" else ""
    return f" \\text{{{top}/{below[0]}}}{power}"


def _strip_ends(text: str) -> str:
    """Remove what ends a sentence, not a number: `5.` is 5."""
    text = text.strip()
    while text and text[-1] in ".,;:\\" and not text.endswith("\\dots"):
        text = text[:-1].rstrip()
    return text
