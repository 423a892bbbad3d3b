"""The policies beside an environment's class: asked for the turns of a row, and played without a model.

`gold(row)` returns the turns of a player who does the task; `cheats(row)` those of players who do not, by name
(grpo_lite/environments/__init__.py says what turns are).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_lite.environments.methods import tools_of
from grpo_lite.errors import RewardError
from grpo_lite.recipe.recipe import LimitsSection
from grpo_lite.task.episodes import Message, answer_calls, observed, reward_of
from grpo_lite.task.generators import Row
from grpo_lite.task.tool_guard import ToolFailure, ToolGuard

Turn = Sequence[Mapping[str, Any]] | str  # calls made at once, or the final text


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
    environment: Any, row: Row, turns: Sequence[Turn], limits: LimitsSection, tools: Sequence[Callable[..., Any]] = ()
) -> tuple[float | None, list[Message]]:
    """Play the turns of a policy in an instance; return the reward and the messages, as a model's would be.

    The reward is None where the environment has no `get_reward`, or the row cannot be judged.

    Args:
        environment: the instance.
        row: what its `reset` gets.
        turns: of the policy.
        limits: of the calls.
        tools: beside the environment's own.

    Raises:
        RewardError: `reset` or `get_reward` fails, or a call takes too long.
    """
    guard = ToolGuard(limits, lambda line: None)
    messages = [dict(message) for message in row["prompt"]]
    try:
        observation = guard.reset(environment, row, environment.reset)
        if observation is not None:
            messages[-1] = observed(messages[-1], observation)
        (budgets,) = guard.budgets(1)
        by_name = {tool.__name__: tool for tool in tools} | tools_of(environment)
        by_name = {name: guard.wrap(tool, budgets) for name, tool in by_name.items()}
        for turn in turns:
            if isinstance(turn, str):
                messages.append({"role": "assistant", "content": turn})
                break
            calls = [{"type": "function", "function": dict(call)} for call in turn]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            messages += answer_calls(by_name, calls)[0]
            if guard.timeouts:
                raise ToolFailure(guard.last_failure)
        has_reward = hasattr(environment, "get_reward")
        return reward_of(environment, messages, limits.reward_timeout_s) if has_reward else None, messages
    except (ToolFailure, RewardError) as failure:
        reason = str(failure).removeprefix("environment: ").rstrip(".")
        raise RewardError(f"environment: {reason}, with the row {row}.") from None


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
