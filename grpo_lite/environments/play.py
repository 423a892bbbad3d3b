"""Play the turns of a policy in an environment, as TRL would run the model's calls."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_lite.environments.methods import NOT_TOOLS

Message = dict[str, Any]
Turn = Sequence[Mapping[str, Any]] | str  # calls made at once, or the final text


def play(
    environment_class: Callable[[], Any], row: Mapping[str, Any], turns: Sequence[Turn]
) -> tuple[float | None, list[Message]]:
    """Run one episode in a new instance; return its reward and its messages.

    The reward is None where the environment has no `get_reward`, or the row cannot be judged. What a tool raises
    becomes the text that TRL 1.16 shows to the model: `{'error': …}`.

    >>> from grpo_lite.environments.calculator import Calculator
    >>> call = {"name": "calculate", "arguments": {"expression": "17*23"}}
    >>> reward, messages = play(Calculator, {"question": "17*23", "answer": "391"}, [[call], "391"])
    >>> reward, messages[2]
    (1.0, {'role': 'tool', 'name': 'calculate', 'content': '391'})
    """
    return play_in(environment_class(), row, turns)


def play_in(
    environment: Any,
    row: Mapping[str, Any],
    turns: Sequence[Turn],
    tools: Mapping[str, Callable[..., Any]] | None = None,
) -> tuple[float | None, list[Message]]:
    """Run one episode in an instance that the caller keeps, for rewards that read it; return as `play` does.

    Args:
        environment: the instance.
        row: what its `reset` gets.
        turns: of the policy.
        tools: by name, beside the environment's own.
    """
    messages = _opening(row, environment.reset(**row))
    tools = {**(tools or {}), **tools_of(environment)}
    for turn in turns:
        if isinstance(turn, str):
            messages.append({"role": "assistant", "content": turn})
            break
        calls = [{"type": "function", "function": dict(call)} for call in turn]
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        for call in turn:
            name = str(call.get("name"))
            content = _called(tools, name, call.get("arguments"))
            messages.append({"role": "tool", "name": name, "content": content})
    reward = _awaited(environment.get_reward()) if hasattr(environment, "get_reward") else None
    return None if reward is None else float(reward), messages


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """Return the tools of an environment by name: its public methods but `reset` and `get_reward`, as in TRL."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return {name: getattr(environment, name) for name in names if not name.startswith("_") and name not in NOT_TOOLS}


def _opening(row: Mapping[str, Any], observation: Any) -> list[Message]:
    """Return the prompt's messages, with what `reset` returned appended to the last one."""
    prompt = row.get("prompt", row.get("question", ""))
    messages = [dict(part) for part in prompt] if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if observation is not None:
        messages[-1]["content"] = f"{messages[-1]['content']}{observation}"
    return messages


def _called(tools: Mapping[str, Callable[..., Any]], name: str, arguments: Any) -> str:
    """Return what the model would see of a call."""
    try:
        if name not in tools:
            raise ValueError(f"Tool {name} not found.")
        return str(_awaited(tools[name](**arguments)))
    except Exception as error:  # whatever a tool raises is shown to the model, never raised into the run
        return str({"error": str(error)})


def _awaited(value: Any) -> Any:
    return asyncio.run(value) if inspect.iscoroutine(value) else value
