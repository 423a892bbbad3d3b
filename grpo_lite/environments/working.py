"""Whether an answer came out of a tool: what the model sent, what the tool showed, and what of it is paid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?", re.ASCII)
_WORD = re.compile(r"\w+")
_SMALL = 10  # a whole number below stands in any program, so sending it states no answer
_LONGEST = 200  # characters of an answer; longer text equals no number


class Working:
    """The working of one episode.

    It is paid if the last result is the answer, the model sent something of the question, and it never sent the answer
    itself before it was shown. Who hides a known answer in arithmetic (`390+1`) is not noticed. He gains
    nothing: he knows the answer.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._answer = row.get("answer")
        self._shown = _question(row)
        self._numbers = _numbers(self._shown)
        self._used = not self._numbers  # a question without numbers is used by any call
        self._stated = False
        self._result: str | None = None

    def send(self, text: str) -> None:
        """Note what the model sent to a tool."""
        self._used = self._used or bool(self._numbers & _numbers(text))
        self._stated = self._stated or self.states_answer(text)

    def show(self, result: str, text: str = "") -> None:
        """Note a tool's result, and the whole text that the model sees of it."""
        self._result = result
        self._shown += f"\n{text or result}"

    def reward(self) -> float | None:
        """Return 1 or 0; None for a row without an answer."""
        if self._answer is None:
            return None
        right = self._result is not None and same(self._result, str(self._answer))
        return float(right and self._used and not self._stated)

    def states_answer(self, text: str) -> bool:
        """Return whether a text holds the answer, which neither the question nor a result has shown so far."""
        number = _number(str(self._answer))
        if number is not None and abs(number) < _SMALL and number.denominator == 1:
            return False
        return holds(text, self._answer) and not holds(self._shown, self._answer)

    def names_answer(self, query: str) -> bool:
        """Return whether a query holds the answer, a small number too, or has no word beside the answer's."""
        if holds(self._shown, self._answer):
            return False
        words = set(_WORD.findall(query.casefold()))
        only_of_it = bool(words) and words <= set(_WORD.findall(str(self._answer).casefold()))
        return only_of_it or holds(query, self._answer)


def holds(text: str, answer: Any) -> bool:
    """Return whether a text contains an answer: as a number of its own, or as words in any case."""
    wanted = str(answer).strip()
    number = _number(wanted)
    if number is not None:
        return abs(number) in _numbers(text)
    return bool(wanted) and wanted.casefold() in text.casefold()


def same(text: str, answer: str) -> bool:
    """Return whether two texts are equal, or the same number: `1,024` and `1024.0`."""
    if text.strip() == answer.strip():
        return True
    number = _number(text)
    return number is not None and number == _number(answer)


def _question(row: Mapping[str, Any]) -> str:
    """Return the text that the model was asked: the column `question`, or the messages of `prompt`."""
    question = row.get("question", row.get("prompt", ""))
    if not isinstance(question, list):
        return str(question)
    return "\n".join(str(part.get("content")) for part in question if isinstance(part, Mapping))


def _number(text: str) -> Fraction | None:
    stripped = text.strip().replace(",", "")
    if len(stripped) > _LONGEST or not re.fullmatch(r"[+-]?\d+(\.\d*)?(/\d+)?", stripped, re.ASCII):
        return None
    try:
        return Fraction(stripped)
    except (ValueError, ZeroDivisionError):
        return None


def _numbers(text: str) -> set[Fraction]:
    """Return the numbers in a text, without their signs."""
    runs = (run.replace(",", "") for run in _NUMBER.findall(text))
    return {Fraction(run) for run in runs if len(run) <= _LONGEST}
