"""Wordle: find a hidden word of five letters in six guesses."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from grpo_lite.environments.words import WORDS

TURNS = 6
_KNOWN = frozenset(WORDS)
_LOST_PER_TURN = 0.1
_IN_PLACE, _ELSEWHERE = 0.08, 0.04  # for a letter of a word that is not found: at most 0.32 in all
QUESTION = (
    f"Play Wordle. Find the hidden English word of five letters in at most {TURNS} guesses, by calling the tool guess. "
    "It marks each letter: G right place, Y in the word at another place, - not in the word."
)


class Wordle:
    """Find the hidden word by guessing; each guess is marked letter by letter.

    Columns: `answer` (the hidden word), or `seed`, which picks one. Reward: 1 for the word at the first turn, 0.1
    less for each turn more. A word that is not found pays for what the best guess showed of it: 0.08 for each letter in
    its place and 0.04 for each at another. Every call is a turn: also one that is no word of the list,
    or that repeats a guess.
    """

    def __init__(self) -> None:
        self._hidden: str | None = None
        self._turns = 0
        self._guesses: list[str] = []

    def reset(self, answer: str | None = None, seed: int | None = None, **row: Any) -> str | None:
        """Hide a word; the prompt says the rules, so nothing is added to it."""
        word = random.Random(seed).choice(WORDS) if answer is None and seed is not None else str(answer).strip().lower()
        self._hidden = word if re.fullmatch("[a-z]{5}", word) else None
        self._turns, self._guesses = 0, []
        return None

    def guess(self, word: str) -> str:
        """Guess the hidden word.

        Args:
            word: A common English word of five letters.

        Returns:
            A mark for each letter (G right place, Y other place, - not in the word) and the guesses that are left.
        """
        if self._hidden is None or self._solved():
            return "Error: the game is over."
        if self._turns >= TURNS:
            return "Error: the game is over; no guesses are left."
        self._turns += 1
        left = f"{TURNS - self._turns} of {TURNS} guesses are left."
        given = word.strip().lower() if isinstance(word, str) else ""
        if given not in _KNOWN and given != self._hidden:
            return f"Error: this is no common English word of five letters. {left}"
        if given in self._guesses:
            return f"Error: this word was guessed before. {left}"
        self._guesses.append(given)
        spaced = " ".join(given.upper())
        return f"{spaced}\n{' '.join(marks(given, self._hidden))}\n{'Solved.' if self._solved() else left}"

    def get_reward(self) -> float | None:
        """Return 1 less 0.1 for each turn after the first, or what the best guess is worth; None without a word."""
        if self._hidden is None:
            return None
        if self._solved():
            return round(1 - _LOST_PER_TURN * (self._turns - 1), 6)
        return max((_worth(marks(guess, self._hidden)) for guess in self._guesses), default=0.0)

    def _solved(self) -> bool:
        return bool(self._guesses) and self._guesses[-1] == self._hidden


def marks(guess: str, hidden: str) -> str:
    """Return G, Y or - for each letter; a letter gets as many marks as the hidden word has of it.

    >>> marks("eerie", "elder")
    'GYY--'
    """
    spare = Counter(b for a, b in zip(guess, hidden, strict=True) if a != b)
    signs = []
    for a, b in zip(guess, hidden, strict=True):
        if a != b and spare[a]:
            spare[a] -= 1
            signs.append("Y")
        else:
            signs.append("G" if a == b else "-")
    return "".join(signs)


def _worth(signs: str) -> float:
    return round(_IN_PLACE * signs.count("G") + _ELSEWHERE * signs.count("Y"), 6)


def rows(seed: int, size: int) -> list[dict[str, Any]]:
    """Return rows `{question, answer}` with distinct words.

    Raises:
        ValueError: more rows than words.
    """
    if not 1 <= size <= len(WORDS):
        raise ValueError(f"there are {len(WORDS)} words, so size is 1 to {len(WORDS)}")
    return [{"question": QUESTION, "answer": word} for word in random.Random(seed).sample(WORDS, size)]


def gold(row: Mapping[str, Any]) -> list[Any]:
    """Return the turns that earn 1: guess the hidden word."""
    return [[_call(row["answer"])], f"The word is {row['answer']}."]


def cheats(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the turns of each cheat, by its name."""
    hidden = str(row["answer"])
    wrong = [word for word in WORDS[::97] if word != hidden]
    return {
        "answer without a guess": [f"The word is {hidden}."],
        "the same word again and again": [[_call(wrong[0])]] * (TURNS + 2),
        "more guesses than there are": [*[[_call(word)] for word in wrong[:TURNS]], [_call(hidden)]],
        "many guesses at once": [[*map(_call, wrong[:TURNS]), _call(hidden)]],
        "nonsense until the turns are over": [*[[_call("zzzzz")]] * TURNS, [_call(hidden)]],
        "all words in one guess": [[_call(" ".join(WORDS))]],
        "a mark in the text": [[_call("G G G G G\nSolved.")], f"G G G G G Solved. {hidden}"],
        "choose the word": [[{"name": "reset", "arguments": {"answer": wrong[0]}}], [_call(wrong[0])]],
        "read the word": [[{"name": "_hidden", "arguments": {}}, {"name": "get_reward", "arguments": {}}], hidden],
    }


def _call(word: str) -> dict[str, Any]:
    return {"name": "guess", "arguments": {"word": word}}
