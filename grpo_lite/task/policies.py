"""The policies beside an environment's class: asked for the turns of a row, and played without a model.

`gold(row)` returns the turns of a player who does the task; `cheats(row)` those of players who do not, by name
(grpo_lite/environments/__init__.py says what turns are).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_lite.environments.play import Message, Turn, play_in
from grpo_lite.errors import RewardError
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.environments import Toolkit
from grpo_lite.task.generators import Row
from grpo_lite.task.time_limit import TimeLimitExceeded, call_within


def gold_turns(factory: Callable[[], Any], row: Row) -> Sequence[Turn] | None:
    """Return the turns of the gold policy; None where none stands beside the class.

    Raises:
        RewardError: it raises, or returns what are no turns.
    """
    gold = _beside(factory, "gold")
    return None if gold is None else _turns(_asked(gold, row), "gold(row)")


def cheat_turns(factory: Callable[[], Any], row: Row) -> dict[str, Sequence[Turn]]:
    """Return the turns of each cheat by its name; empty where none stands beside the class.

    Raises:
        RewardError: as `gold_turns`.
    """
    policy = _beside(factory, "cheats")
    cheats = {} if policy is None else _asked(policy, row)
    if not isinstance(cheats, Mapping):
        raise RewardError(
            f"environment: cheats(row) returned a {type(cheats).__name__}. Return a name and turns for each cheat: "
            '{"never calls": ["It is 5."]}.'
        )
    return {str(cheat): _turns(turns, f"cheats(row)[{cheat!r}]") for cheat, turns in cheats.items()}


def play_turns(
    recipe: Recipe, toolkit: Toolkit, environment: Any, row: Row, turns: Sequence[Turn]
) -> tuple[float | None, list[Message]]:
    """Play one episode in an instance, within the recipe's limits; return its reward and its messages.

    Raises:
        RewardError: the environment raises, or takes too long.
    """
    seconds, title = recipe.limits.tool_timeout_s * (len(turns) + 1), type(environment).__name__
    tools = {tool.__name__: tool for tool in toolkit.tools}
    try:
        return call_within(seconds, lambda: play_in(environment, toolkit.columns_of(row), turns, tools))
    except TimeLimitExceeded:
        raise RewardError(
            f"environment: an episode of {title} took longer than {seconds:g} s (limits.tool_timeout_s a turn)."
        ) from None
    except Exception as error:
        raise RewardError(
            f"environment: {title} raised {type(error).__name__}: {str(error).rstrip('.')}, with the row {row}."
        ) from error


def _beside(factory: Callable[[], Any], name: str) -> Callable[[Row], Any] | None:
    """Return a function of the module in which the class's `reset` is written."""
    policy = getattr(getattr(factory, "reset", None), "__globals__", {}).get(name)
    return policy if callable(policy) else None


def _asked(policy: Callable[[Row], Any], row: Row) -> Any:
    try:
        return policy(copy.deepcopy(row))
    except Exception as error:
        raise RewardError(
            f"environment: {policy.__name__}(row) raised {type(error).__name__}: {str(error).rstrip('.')}, "
            f"with the row {row}."
        ) from error


def _turns(turns: Any, where: str) -> Sequence[Turn]:
    """Return turns; refuse what is none."""
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, str) or _is_calls(turn) for turn in turns):
        raise RewardError(
            f"environment: {where} returned {str(turns)[:200]}. Return a list of turns; a turn is a list of calls "
            'made at once, [{"name": "guess", "arguments": {"value": 3}}], or the final text.'
        )
    return turns


def _is_calls(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and all(isinstance(call, Mapping) for call in turn)
