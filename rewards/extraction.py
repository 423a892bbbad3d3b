r"""Which answer does a text commit to? One order, stated by the recipe, and exactly one answer.

Methods, tried in the order given; the first that finds a committed answer decides, and of several the *last* counts
(a correction is legitimate):

- `answer_tag`   the last closed `<answer>…</answer>` (a box inside it is unwrapped)
- `tag:NAME`     the same for another tag: `tag:SOLUTION` is the last closed `<SOLUTION>…</SOLUTION>`
- `boxed`        the last `\boxed{…}` or `\fbox{…}`; boxes with nothing but commas, "and", "or" or blanks between them
                 are one list, so `\boxed{41}, \boxed{42}` is not the answer 42
- `hash`         what follows the last `####` on its line (GSM8K)
- `phrase`       the last "the answer is …", "answer: …", "final answer …", up to the end of the sentence; a whole
                 clause behind it (`Final answer: the largest $n$ is 34.`) commits to its value
- `first_line`   opt-in: the first line that is not blank (few-shot completions of a base model)
- `last_number`  opt-in and lenient: the last number of the text

One exception to the order: a "the answer is <number>" *after* the place where an earlier method found its answer takes
it back. An opening without its closing (`\boxed{4`, `<answer>4`) commits to nothing: it was cut off. All scans are
linear in the length of the text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

DEFAULT_METHODS = ("answer_tag", "boxed", "hash", "phrase")
Commitment = tuple[str, int]  # the answer's text, and where it ends in the completion

_TAG_METHOD = re.compile(r"tag:([A-Za-z][\w-]*)")
_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;:$&./|*•–—-]|\\[()\[\]]|\\(?:quad|qquad|text)\b|[{}]|\b\d{1,2}[.):]|\([a-z\d]\)"
    r"|\b(?:and|or|maybe|perhaps|possibly|either|else|otherwise|alternatively)\b"
    r"|\b(?:option|choice|case|possibility)\b(?:[ \t]+(?:\d{1,2}|[a-z])\b)?)*",
    re.IGNORECASE,
)
_MINUS_BEFORE = re.compile(r"(?:\A|[\s$=(\[{:])[-−](?:\\[!,;: ])?\Z")
_FACTOR_BEFORE = re.compile(r"(?:\A|[^a-zA-Z\d.\\])([a-zA-Z]|\d+)\Z")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_LETTERS_AFTER = re.compile(r"[a-zA-Z]+|\d+")
_AFTER_BOX = re.compile(r"\s*(?:\^\s*(?:\{[^{}]{0,20}\}|\\circ|\w)|_\s*(?:\{[^{}]{0,20}\}|\d+))|[ \t]?\\?%")
_DENIED = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bcannot be|\bneither)(?:\s+equal(?:\s+to)?)?[\s$*]*(?:\\[(\[])?\s*\Z", re.IGNORECASE
)
_DENIED_AFTER = re.compile(
    r"[\s$*]*(?:\\[)\]])?[\s*]*(?:is|was|would be|seems)\s+(?:not|wrong|incorrect|false)\b", re.IGNORECASE
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASH = re.compile(r"(?<!#)####(?!#)[ \t]*(.*)$", re.MULTILINE)
_HASH_LABEL = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|[:=])?\s*", re.IGNORECASE)
_PHRASE = re.compile(
    r"\banswer\b[*_]{0,3}(?:[ \t]+(?:to|for|of)[ \t]+(?:this|the)[ \t]+(?:question|problem))?"
    r"[ \t]*(?:is\b(?:[ \t]*:)?|:|=|equals\b|would be\b|must be\b)[*_]{0,3}[ \t]*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?:[*_\"'’)]*)(?=\s|\Z)|\n|\Z")
_REASON = re.compile(
    r"[,;]?\s+(?:because|since|as|so|which|where|thus|therefore|hence|rather than|instead of)\b"
    r"(?!\s+(?:is|was)\s+(?:wrong|incorrect|false)\b)(?!.*\b(?:or|maybe|perhaps|could|might)\b).*",
    re.IGNORECASE | re.DOTALL,
)
_LEAD_IN = re.compile(
    r"(?:(?:therefore|thus|then|hence|simply|just|clearly|exactly|equal to|given by)\b[ \t,:]*)+", re.IGNORECASE
)
_CLAUSE = re.compile(
    r"(?:that\s)?(?P<subject>(?:the|it|this|its|their|his|her|our)\b.*|\$[^$=<>]*[a-zA-Z][^$=<>]*\$"
    r"|\\\([^=<>]*[a-zA-Z][^=<>]*\\\))\s(?:is|are|equals?)\s(?P<value>.+)",
    re.IGNORECASE | re.DOTALL,
)
_INLINE_MATH = re.compile(r"\$[^$]*\$|\\\(.*?\\\)", re.DOTALL)
_VERB = re.compile(r"\s(?:is|are|equals?)\s", re.IGNORECASE)
_SEVERAL_CLAUSES = re.compile(r"[,;:=<>?!]")
_UNCERTAIN = re.compile(
    r"n['’]t\b|\b(?:not|no|nor|never|neither|either|or|if|unless|but|except|although|though|while|whereas|otherwise|else"
    r"|instead|maybe|perhaps|possibly|probably|likely|unlikely|could|might|may|should|would|wrong|incorrect|false"
    r"|mistaken|guess\w*|estimate\w*|approximat\w*|about|around|roughly|nearly|almost|unknown|previous|other|another"
    r"|option|choice|case|possibility|candidate|example|claim\w*|hypothe\w+|conjectur\w*|assum\w+|suppos\w+"
    r"|suspect\w*|hop(?:e|ed|es|ing)|believ\w+|think\w*|thought|says?|said)\b",
    re.IGNORECASE,
)
_NO_UNIT = (
    r"(?!(?:more|less|fewer|greater|than|times|that|which|who|where|when|for|with|without|at|by|in|on|of|to|from|until|after"
    r"|before|only|too|so|as|the|an?|it|this|above|below|over|under|off|short|away)\b)"
)
_MEASURE = re.compile(
    r"(?:[$€£¥]|\\\$)?[-−+]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?(?:\s" + _NO_UNIT + r"[a-zA-Z]+){1,3}", re.IGNORECASE
)
_OR_BEFORE = re.compile(r"(-?[\d.,/]*\d)[\s$]*(?:\\[()\[\]])?\s*\bor[\s$]*(?:\\[()\[\]])?\s*\Z", re.IGNORECASE)
_OR_AFTER = re.compile(
    r"[\s$.,;*]*(?:\\[()\[\]])?\s*\bor(?:\s+(?:maybe|perhaps|possibly|even|else|it\s+is|is\s+it))*[\s$]*(?:\\[()\[\]])?"
    r"\s*(-?\d[\d.,/]*)",
    re.IGNORECASE,
)
_OR_JUST_BEFORE = re.compile(
    r"\bor(?:\s+(?:maybe|perhaps|possibly|else|the|my|final|correct|right))*\s*\Z", re.IGNORECASE
)
_CONTRAST = re.compile(r",\s*(?:and\s+)?not\s+[$\\(]{0,3}-?\d[\d.,/]*[$\\)]{0,3}\Z", re.IGNORECASE)
_WINDOW = 80  # how far around a box or phrase its neighbours are looked at, in characters: all scans stay linear
_CONTINUES = re.compile(r"\s*(?:[,;/=<>]|(?:or|and|to|is|are|equals?)\b|\\(?:approx|pm|text))", re.IGNORECASE)
_NUMBER = re.compile(r"[-−+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|[-−+]?\.\d+")
_NUMERIC = re.compile(
    r"(?:[$€£¥]|\\\$)?\s*[-−+]?(?:[$€£¥]|\\\$)?\s*(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d+)?\s*(?:\\?%|[a-zA-Z°]*)\s*\.?"
)


def extract_answer(text: str, methods: Sequence[str] = DEFAULT_METHODS) -> str | None:
    r"""Return the answer a visible text (no thinking) commits to, or None.

    >>> extract_answer(r"I get \boxed{42}. No: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("48/2 = 24, so\n#### 72"), extract_answer("It is 72, so the answer is 72.")
    ('72', '72')
    >>> extract_answer("15\n4+4=", ["first_line"]), extract_answer(r"\boxed{4") is None
    ('15', True)
    >>> extract_answer("It is 41. <SOLUTION>42</SOLUTION>", ["tag:SOLUTION"])
    '42'
    """
    readers = [_reader(method) for method in methods]
    for index, reader in enumerate(readers):
        commitment = reader(text)
        if commitment is None:
            continue
        answer, end = commitment
        if "phrase" in methods[index + 1 :]:
            retraction = _phrase(text[end:])
            if retraction is not None and _is_value(retraction[0]):
                return retraction[0]
        return answer
    return None


def _reader(method: str) -> Callable[[str], Commitment | None]:
    if method in _METHODS:
        return _METHODS[method]
    if tag := _TAG_METHOD.fullmatch(str(method)):
        return functools.partial(_tag, name=tag[1])
    raise ValueError(f"extract names {method!r}; allowed: a list of {', '.join(_METHODS)}, tag:NAME")


def _tag(text: str, name: str) -> Commitment | None:
    start: int | None = None
    commitment: Commitment | None = None
    for tag in re.finditer(f"<(/?){name}>", text, re.IGNORECASE):
        if not tag.group(1):
            start = tag.end()
        elif start is not None:
            content = text[start : tag.start()].strip()
            start = None
            if content:
                commitment = (content, tag.end())
    if commitment is None:
        return None
    inner = _phrase(commitment[0])
    return _unbox(inner[0] if inner is not None else commitment[0]), commitment[1]


def _boxed(text: str) -> Commitment | None:
    boxes = [box for box in _boxes(text) if not _is_denied(text, box)]
    if not boxes:
        return None
    group = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if _BETWEEN_BOXES.fullmatch(text, box[1], group[-1][0]) is None:
            break
        group.append(box)
    contents = list(dict.fromkeys(_with_marks(text, box) for box in reversed(group)))
    first, last = group[-1][0], boxes[-1][1]
    if before := _OR_BEFORE.search(text, max(0, first - 60), first):  # `41 or \boxed{42}` commits to neither
        contents.insert(0, before[1])
    if after := _OR_AFTER.match(text, last, last + _WINDOW):
        contents.append(after[1])
    return ", ".join(contents), last


def _is_denied(text: str, box: tuple[int, int, str]) -> bool:
    """Return whether a box is named only to be denied: `it is not \\boxed{41}`."""
    start, end, _ = box
    before = _DENIED.search(text, max(0, start - _WINDOW), start)
    return before is not None or _DENIED_AFTER.match(text, end, end + _WINDOW) is not None


def _with_marks(text: str, box: tuple[int, int, str]) -> str:
    """Return a box's content with what is written onto the box: a sign or factor, a power, base, unit or %."""
    start, end, content = box
    minus = "-" if _MINUS_BEFORE.search(text, max(0, start - 4), start) else ""
    after = _AFTER_BOX.match(text, end, end + _WINDOW)
    content = _unbox(content)
    if "answer" in content.lower() and (inner := _phrase(_TEXT.sub(r"\1", content))) is not None:
        content = inner[0]
    if factor := _FACTOR_BEFORE.search(text, max(0, start - 20), start):
        content = f"{factor[1]} {content}"
    if letters := _LETTERS_AFTER.match(text, end):
        content += letters.group() if len(letters.group()) == 1 else f" {letters.group()}"
    if minus and re.search(r"[-+\s=]", content):
        content = f"({content})"
    return minus + content + (after.group().strip() if after else "")


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Return (start, end, content) of every closed box that is in no other closed box, in one pass over the braces."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return []
    starts: dict[int, int] = {}  # place of a box's brace -> start of the box
    closed: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        place = match.end()
        if text.startswith("{", place):
            starts[place] = match.start()
        elif text[place : place + 1].isalnum():
            closed.append((match.start(), place + 1, text[place]))
    open_braces: list[int] = []
    for brace in _BRACE.finditer(text, min(starts, default=len(text))):
        if brace.group() == "{":
            open_braces.append(brace.start())
        elif brace.group() == "}" and open_braces:
            opened = open_braces.pop()
            if opened in starts:
                closed.append((starts[opened], brace.end(), text[opened + 1 : brace.start()].strip()))
    outermost: list[tuple[int, int, str]] = []
    for box in sorted(closed):
        if box[2] and (not outermost or box[0] >= outermost[-1][1]):
            outermost.append(box)
    return outermost


def _hash(text: str) -> Commitment | None:
    if "####" not in text:
        return None
    commitment: Commitment | None = None
    for match in _HASH.finditer(text):
        content = _HASH_LABEL.sub("", match.group(1), count=1).strip()
        if content:
            commitment = (content, match.end())
    return commitment


def _phrase(text: str) -> Commitment | None:
    for match in reversed(list(_PHRASE.finditer(text))):
        content, end = _sentence(text, match.end())
        if not content:
            continue
        if _OR_JUST_BEFORE.search(text, max(0, match.start() - _WINDOW), match.start()):
            return f"or {content}", end  # "the answer is 41 or the answer is 42" commits to neither
        after = _OR_AFTER.match(text, end, end + _WINDOW)
        return (f"{content}, {after[1]}", after.end()) if after else (content, end)
    return None


def _is_value(text: str) -> bool:
    """Return whether a phrase's content is a number or a short formula, not chatter."""
    if _NUMERIC.fullmatch(text):
        return True
    bare = re.sub(r"\\[a-zA-Z]+", " ", text)
    return len(text) <= 60 and any(c.isdigit() for c in bare) and re.search(r"[a-zA-Z]{2,}", bare) is None


def _sentence(text: str, start: int) -> Commitment:
    """Return what stands from `start` to the end of the sentence, or of the next line if this one ends here."""
    while start < len(text) and text[start].isspace():
        start += 1
    limit = min(len(text), start + 2000)
    end_match = _SENTENCE_END.search(text, start, limit)
    end = end_match.start() if end_match else limit
    content = text[start:end].strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening, start):
            close = text.find(closing, start + len(opening), limit)
            while closing == "$" and close > 0 and text[close - 1] == "\\":
                close = text.find(closing, close + 1, limit)
            rest = text[start + len(opening) : close] if close > 0 else ""
            if close > 0 and not (opening == "$" and _NUMERIC.match(content) and "\\" not in rest and " " in rest):
                after = close + len(closing)
                if not _CONTINUES.match(text, after):
                    return _unbox(rest.strip()), after
                end_match = _SENTENCE_END.search(text, after, limit)  # $41$ or $42$: the whole sentence is the answer
                end = end_match.start() if end_match else limit
                content = text[start:end].strip()
            break
    is_question = text[end : end + 1] == "?"
    if (
        not is_question and (value := _clause_value(content)) is not None
    ):  # before the reason goes: "the largest n for which … is 34"
        return _unbox(value), end
    content = _CONTRAST.sub("", _REASON.sub("", content).strip())
    content = _LEAD_IN.sub("", content.strip("*_").strip())
    value = None if is_question else _clause_value(content)
    return _unbox(content if value is None else value), end


def _clause_value(sentence: str) -> str | None:
    """Return the value of `the largest $n$ is 34`: one quantity, one value, no doubt; None for any other sentence.

    The last verb separates them. Another verb before it must belong to the quantity ("the probability that it is even
    is 1/2"), so no number and no "and" may follow that one.
    """
    clause = _CLAUSE.fullmatch(sentence.strip("*_ "))
    if clause is None or _UNCERTAIN.search(sentence):
        return None
    subject = clause["subject"]
    earlier_verb = _VERB.search(subject)
    if earlier_verb and re.search(r"\d|\band\b", subject[earlier_verb.end() :], re.IGNORECASE):
        return None
    if _SEVERAL_CLAUSES.search(_INLINE_MATH.sub(" ", subject)):
        return None
    value = _LEAD_IN.sub("", clause["value"].strip("*_ "))
    if _INLINE_MATH.fullmatch(value):
        return value.strip("$").removeprefix("\\(").removesuffix("\\)").strip()
    return value if _is_value(value) or _MEASURE.fullmatch(value) else None


def _unbox(content: str) -> str:
    """Return the content with its boxes opened, a few levels deep: `6 * 7 = \\boxed{42}` is `6 * 7 = 42`.

    Words around a single box say nothing; numbers around it do, and stay.
    """
    for _ in range(3):
        boxes = _boxes(content)
        if not boxes:
            break
        pieces, place = [], 0
        for start, end, inner in boxes:
            pieces += [content[place:start], inner]
            place = end
        outside = "".join([*pieces[::2], content[place:]])
        if len(boxes) == 1 and not any(c.isdigit() for c in outside) and not _is_denied(content, boxes[0]):
            content = boxes[0][2]
        else:
            content = "".join([*pieces, content[place:]])
    return content


def _first_line(text: str) -> Commitment | None:
    stripped = text.lstrip()
    line = stripped.partition("\n")[0].strip()
    left, equals, _ = line.partition("=")
    if not line or (equals and any(char.isdigit() for char in left)):  # 2+3=5 repeats the few-shot lines, no answer
        return None
    return line, len(text) - len(stripped) + len(line)


def _last_number(text: str) -> Commitment | None:
    last: Commitment | None = None
    for match in _NUMBER.finditer(text):
        last = (match.group(), match.end())
    return last


_METHODS: dict[str, Callable[[str], Commitment | None]] = {
    "answer_tag": functools.partial(_tag, name="answer"),
    "boxed": _boxed,
    "hash": _hash,
    "phrase": _phrase,
    "first_line": _first_line,
    "last_number": _last_number,
}
