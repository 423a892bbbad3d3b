"""What doing the task looks like: `data.gold_completion` of a row, and episodes of an environment's gold policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grpo_lite.errors import DataError
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.environments import make_environment
from grpo_lite.task.episodes import Message, seeded
from grpo_lite.task.generators import Row
from grpo_lite.task.policies import gold_turns, play_turns
from grpo_lite.task.prompts import Prompts, opened_tag

NO_GOLD = "data.gold_completion is null: the rows hold no right answer"
LAST_TEXT = "Done."  # of an episode whose policy says nothing at its end: a model has to learn that it ends


@dataclass(frozen=True)
class GoldEpisode:
    """An episode of the gold policy.

    Attributes:
        row: its training row, with what `reset` returned at the end of the prompt.
        messages: the assistant's turns and the results between them; the last one is text.
        paid: what the environment pays; None where it has no `get_reward`, or the row cannot be judged.
    """

    row: Row
    messages: list[Message]
    paid: float | None


def gold_episodes(recipe: Recipe, prompts: Prompts) -> list[GoldEpisode]:
    """Play the gold policy beside each row's environment, on the training rows or the first `warmup.prompts` of them.

    A last text that is the row's answer is written as `data.gold_completion` says. Chance of Python's generator is the
    same for the same seed, and the generator is left as it was.

    Raises:
        DataError: an environment has no gold policy.
        RewardError: a policy or an environment is at fault.
    """
    assert recipe.warmup is not None
    with seeded(recipe.seed):
        return list(_played(recipe, prompts, prompts.train[: recipe.warmup.prompts]))


def _played(recipe: Recipe, prompts: Prompts, rows: list[Row]) -> Iterator[GoldEpisode]:
    toolkit = prompts.toolkit
    assert toolkit is not None
    for row in rows:
        factory = toolkit.factories[toolkit.name_of(row)]
        turns = gold_turns(factory, row)
        if turns is None:
            raise DataError(
                f"warmup.source: 'gold' is given, and {getattr(factory, '__name__', factory)} has no gold policy. Add "
                "`def gold(row)` beside the class (docs/tools-and-environments.md), or give rows with completions "
                "(warmup.source=data and warmup.data)."
            )
        calls = [turn for turn in turns if not isinstance(turn, str)]
        last = next((turn for turn in turns if isinstance(turn, str)), LAST_TEXT)
        if recipe.data.gold_completion is not None and last == str(row.get("answer")):
            last = gold_completion(recipe, row, prompts.lead_in)
        instance, columns = make_environment(factory, "environment"), toolkit.columns_of(row)
        paid, messages = play_turns(instance, columns, [*calls, last], recipe.limits, toolkit.tools)
        before = len(row["prompt"])
        yield GoldEpisode({**row, "prompt": messages[:before]}, messages[before:], paid)


def gold_completion(recipe: Recipe, row: Row, lead_in: str = "") -> str:
    """Return what a perfect completion of a row looks like, by the recipe's `data.gold_completion`.

    Where the chat template has opened the thinking already (`lead_in`), it begins inside: without the opening tag, or
    with a line of thinking and the closing tag if `data.gold_completion` shows none.

    Raises:
        DataError: there is none, or the template names a column that is not there.
    """
    from grpo_lite.rewards.extraction import extract_answer

    if recipe.data.gold_completion is None:
        raise DataError(f"{NO_GOLD}. Give what a right one looks like, over rows that hold one.")
    answer = str("" if row.get("answer") is None else row["answer"])
    final = extract_answer(answer, ("hash", "boxed")) or answer.strip()
    try:
        text = recipe.data.gold_completion.format_map({**row, "gold": final})
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"data.gold_completion: {recipe.data.gold_completion!r} does not fit the rows ({error}). "
            f"Columns: {', '.join(row)}, gold."
        ) from None
    tag = opened_tag(lead_in)
    if tag is None:
        return text
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.lstrip().startswith(opening):
        return text.lstrip().removeprefix(opening)
    return text if closing in text else f"working\n{closing}\n{text}"
