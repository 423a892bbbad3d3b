"""Rewards on text answers: equal after normalisation (`exact_match_reward`), or the right letter (`choice_reward`)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from .completion import Completion, visible_texts
from .extraction import DEFAULT_METHODS, extract_answer
from .facts import states

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_LONGEST_CHOICE_CHARS = 500
_CHOICE = re.compile(r"\W*(?:option|choice|answer)?\W*([A-Za-z])(?:\W*|[).:]\s.*)", re.IGNORECASE | re.DOTALL)


@states(top=1.0, by_row=True)
def exact_match_reward(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    extract: Sequence[str] | None = DEFAULT_METHODS,
    ignore_case: bool = True,
    ignore_punctuation: bool = True,
    prompts: Sequence[Completion] | None = None,
    prefilled: bool | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Pay 1 where the extracted answer and the gold are the same text after normalisation.

    Formula: 1 if n(extract(completion)) = n(gold), else 0; n composes Unicode (NFKC), white space to single blanks,
    and, if asked, lower case and no punctuation and articles (as SQuAD does).

    Args:
        completions: text or chat messages.
        answer: gold texts; None or blank ones are unusable.
        extract: methods of `rewards.extraction`, in order; None compares the whole visible completion.
        ignore_case, ignore_punctuation: what normalisation forgives.
        prompts: passed by TRL; shows whether a completion starts inside a thinking block.
        prefilled: whether every completion does; None looks at `prompts` (set it for chat prompts).

    Returns:
        1 or 0 per completion, None for an unusable gold.

    Source: the exact match of SQuAD (arXiv 1606.05250), with extraction in front.

    >>> exact_match_reward(["<answer>The Eiffel tower.</answer>", "It is the Louvre."], ["Eiffel Tower", "Louvre"])
    [1.0, 0.0]
    """
    scores: list[float | None] = []
    for text, gold in zip(visible_texts(completions, prompts, prefilled), answer, strict=True):
        want = _plain(str(gold), ignore_case, ignore_punctuation) if isinstance(gold, str | int | float) else ""
        if not want:
            scores.append(None)
            continue
        given = text if extract is None else extract_answer(text, extract)
        scores.append(1.0 if given is not None and _plain(given, ignore_case, ignore_punctuation) == want else 0.0)
    return scores


@states(top=1.0, by_row=True)
def choice_reward(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    choices: str = "ABCDE",
    extract: Sequence[str] = DEFAULT_METHODS,
    prompts: Sequence[Completion] | None = None,
    prefilled: bool | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Pay 1 where the committed answer is the gold's letter, and only that letter.

    Formula: 1 if letter(extract(completion)) = gold, else 0. `B`, `(B)`, `b.`, `\text{(B)}` and `B) 42 km` are the
    letter B; `A or B`, `A, B` and a word are none.

    Args:
        completions: text or chat messages.
        answer: gold letters (`B`, `(B)`) or 0-based indices into `choices`; anything else is unusable.
        choices: the letters on offer.
        extract: methods of `rewards.extraction`, in order.
        prompts: passed by TRL; shows whether a completion starts inside a thinking block.
        prefilled: whether every completion does; None looks at `prompts` (set it for chat prompts).

    Returns:
        1 or 0 per completion, None for an unusable gold.

    Source: the multiple-choice scoring of MMLU and AQuA, with a committed answer instead of a first letter.

    >>> choice_reward(["The answer is (B).", "<answer>A or B</answer>", r"\\boxed{\\text{B) 42 km}}"], ["B", "B", 1])
    [1.0, 0.0, 1.0]
    """
    scores: list[float | None] = []
    for text, gold in zip(visible_texts(completions, prompts, prefilled), answer, strict=True):
        if isinstance(gold, int) and not isinstance(gold, bool):
            want = choices[gold] if 0 <= gold < len(choices) else None
        else:
            want = _letter(str(gold), choices) if gold is not None else None
        if want is None:
            scores.append(None)
            continue
        given = extract_answer(text, extract)
        scores.append(1.0 if given is not None and _letter(given, choices) == want else 0.0)
    return scores


def _plain(text: str, ignore_case: bool, ignore_punctuation: bool) -> str:
    """Return the text as the comparison sees it."""
    text = unicodedata.normalize("NFKC", text)
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        text = "".join(" " if unicodedata.category(char)[0] in "PS" else char for char in text)
        text = _ARTICLE.sub(" ", text) if _ARTICLE.sub(" ", text).strip() else text
    return " ".join(text.split())


def _letter(text: str, choices: str) -> str | None:
    """Return the one choice a committed answer names, or None."""
    if len(text) > _LONGEST_CHOICE_CHARS:
        return None
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*|[{}$*]|\\[()]", "", text).strip()
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None
    letter = match.group(1).upper()
    # After "B) 42 km" the rest is the choice's text; if it names another letter on its own, nothing is committed.
    rest = text[match.end(1) :]
    others = re.findall(r"(?<![\w'’])([A-Z])(?![\w'’])", rest)
    if letter not in choices.upper() or any(other in choices.upper() and other != letter for other in others):
        return None
    return letter
