"""A text about invented towns, and questions that no model can know and two searches answer.

The text is always the same one; only the questions are drawn. Every answer is a number that stands in one passage only.
"""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import Any, NamedTuple

COUNT = 240
_TOWNS = ("Vel Tor Kas Ond Bra Mer Pel Sul", "mo li ra ne so", "burg by wick tun dal feld ham")
_RIVERS = ("Ar Ish Lun Neb Ost Ver", "a e o ui", "ssa lle nde rra vo ze gna mber ster dana")
_FIRST = (
    "Anna Boris Clara David Elena Felix Greta Hugo Irma Jonas Karla Leon Maria Nils Olga Paul Rosa Sven Tilda Viktor"
)
_LAST = (
    "Adler Brandt Castell Dorn Eberle Falk Gruber Holm Iven Jansen Kessler Lorenz Moser Nagel Orlow Petri Quist Roth"
)
_TRADES = ("painter", "clockmaker", "botanist", "composer", "printer", "mapmaker", "glassblower", "beekeeper")
_GOODS = ("bells", "cheese", "orchards", "lace", "market", "gardens", "salt", "theatre")


class Town(NamedTuple):
    """An invented town; the three numbers are answers."""

    name: str
    river: str
    person: str
    bridge: int
    museum: int
    inhabitants: int


@cache
def towns() -> tuple[Town, ...]:
    """Return the towns, always the same ones."""
    rng = random.Random("towns")
    names = rng.sample(_joined(_TOWNS), COUNT)
    rivers = rng.sample(_joined(_RIVERS), COUNT)
    people = rng.sample([f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()], COUNT)
    years = rng.sample(range(1100, 1990), 2 * COUNT)
    inhabitants = rng.sample(range(2100, 9900), COUNT)
    return tuple(map(Town, names, rivers, people, years[:COUNT], years[COUNT:], inhabitants))


def passages() -> list[str]:
    """Return the text: five passages a town, shuffled."""
    rng = random.Random("passages")
    text = []
    for town in towns():
        text += [
            f"The river {town.river} flows through {town.name}.",
            f"The {rng.choice(_TRADES)} {town.person} was born in {town.name}.",
            f"The stone bridge of {town.name} was built in {town.bridge}.",
            f"The museum of {town.name} was opened in {town.museum}.",
            f"{town.name} has {town.inhabitants} inhabitants and is known for its {rng.choice(_GOODS)}.",
        ]
    rng.shuffle(text)
    return text


def rows(seed: int, size: int, corpus: str) -> list[dict[str, Any]]:
    """Return distinct rows `{question, answer, corpus, queries}`; `queries` are two searches that find the answer.

    Raises:
        ValueError: `size` is out of range.
    """
    questions = list(itertools.product(towns(), _CLUES, _ASKED))
    if not 1 <= size <= len(questions):
        raise ValueError(f"there are {len(questions)} distinct questions, so size is 1 to {len(questions)}")
    made = []
    for town, (clue, finds_town), (asked, finds_answer, column) in random.Random(seed).sample(questions, size):
        made.append(
            {
                "question": asked.format(clue.format(town=town)),
                "answer": str(getattr(town, column)),
                "corpus": corpus,
                "queries": [finds_town.format(town=town), finds_answer.format(town=town)],
            }
        )
    return made


_CLUES = (
    ("the town where {town.person} was born", "{town.person} born"),
    ("the town on the river {town.river}", "river {town.river}"),
)
_ASKED = (
    ("In which year was the bridge built in {}?", "bridge {town.name} built", "bridge"),
    ("In which year was the museum opened in {}?", "museum {town.name} opened", "museum"),
    ("How many inhabitants has {}?", "{town.name} inhabitants", "inhabitants"),
)


def _joined(parts: tuple[str, ...]) -> list[str]:
    return ["".join(syllables) for syllables in itertools.product(*(part.split() for part in parts))]
