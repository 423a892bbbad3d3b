"""A whole episode as a completion: the assistant's turns and the results of tools between them -> token ids and mask.

The ids are those of a rollout: each turn as the chat template writes it, with the end token, then what the template
puts before the next turn. `mask` is TRL's `tool_mask`: 1 where the model writes, 0 in results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_lite.errors import DataError
from grpo_lite.task.tokens import completion_ids, prompt_text, tool_result_ids

Message = dict[str, Any]
_SHOWN_CHARACTERS = 200


def is_episode(messages: Any) -> bool:
    """Return whether messages hold calls of tools, or their results."""
    return isinstance(messages, list) and any(
        isinstance(message, Mapping) and (message.get("tool_calls") or message.get("role") == "tool")
        for message in messages
    )


def split_conversation(messages: Sequence[Message], where: str) -> tuple[list[Message], list[Message]]:
    """Split a conversation before the assistant's first turn after the last other message.

    Raises:
        DataError: no prompt stands before it, or no turn after.
    """
    ends = [i for i, message in enumerate(messages) if message.get("role") not in ("assistant", "tool")]
    if not ends or ends[-1] == len(messages) - 1:
        raise DataError(
            f"{where}: {_shown(messages)} is no conversation: the user's message, then the assistant's turns."
        )
    return list(messages[: ends[-1] + 1]), list(messages[ends[-1] + 1 :])


def read_episode(messages: Sequence[Any], tools: Sequence[str], where: str) -> list[Message]:
    """Return an episode's messages as chat templates take them: no null keys, arguments as mappings, results named.

    Args:
        messages: the assistant's turns and the results between them; arguments may be JSON text, as OpenAI's are.
        tools: names that the prompt offers.
        where: the row, for messages.

    Raises:
        DataError: a role out of order, a call that no tool answers, or one of an unknown tool.
    """
    episode: list[Message] = []
    waiting: list[str] = []  # names of calls without a result yet
    for raw in messages:
        message = {key: value for key, value in raw.items() if value is not None} if isinstance(raw, Mapping) else {}
        role = message.get("role")
        if role == "tool" and waiting and isinstance(message.get("content"), str):
            episode.append({**message, "name": waiting.pop(0)})
        elif role == "assistant" and not waiting:
            calls = [_call(call, tools, where) for call in message.get("tool_calls") or []]
            waiting = [call["function"]["name"] for call in calls]
            turn = {"role": role, "content": message.get("content", ""), **({"tool_calls": calls} if calls else {})}
            episode.append(turn)
        else:
            raise DataError(
                f"{where}: {_shown(raw)} is out of order. Expected: the assistant's turn, then a result (role 'tool', "
                "text) for each of its tool_calls, then its next turn."
            )
    if waiting or not episode:
        raise DataError(f"{where}: the call of {', '.join(waiting) or 'nothing'} has no result. End with an answer.")
    return episode


def episode_ids(
    prompt: list[Message], episode: Sequence[Message], tokenizer: Any, template_kwargs: dict[str, Any], where: str
) -> tuple[list[int], list[int]]:
    """Return an episode's token ids after its prompt, and 1 for each that the model writes, else 0.

    Args:
        prompt: the messages before.
        episode: as `read_episode` returns it.
        template_kwargs: what the chat template gets, with the tools' schemas.

    Raises:
        DataError: the chat template writes a turn otherwise than after its prompt, or changes a result's text.
    """
    ids: list[int] = []
    mask: list[int] = []
    end = str(tokenizer.eos_token or "")
    for i, message in enumerate(episode):
        if message["role"] == "tool":
            if episode[i - 1]["role"] == "tool":
                continue  # added with the first result of its turn
            results = _results(episode[i:])
            added = tool_result_ids(results, tokenizer, template_kwargs)
            if added is None:
                raise DataError(
                    f"{where}: the chat template changes the result {_shown(results)}, so it cannot be masked."
                )
            ids += added
            mask += [0] * len(added)
            continue
        before = prompt_text([*prompt, *episode[:i]], tokenizer, template_kwargs)
        whole = tokenizer.apply_chat_template([*prompt, *episode[: i + 1]], tokenize=False, **template_kwargs)
        text = whole.removeprefix(before)
        if text == whole or end not in text:
            raise DataError(
                f"{where}: the chat template does not write the turn {_shown(message)} behind its prompt. Take a model "
                "whose template does, or set model.chat_template."
            )
        turn = completion_ids([text[: text.rindex(end)]], tokenizer)[0]
        ids += turn
        mask += [1] * len(turn)
    return ids, mask


def _results(messages: Sequence[Message]) -> list[Message]:
    count = next((i for i, message in enumerate(messages) if message["role"] != "tool"), len(messages))
    return list(messages[:count])


def _call(call: Any, tools: Sequence[str], where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if name not in tools:
        raise DataError(f"{where}: {_shown(call)} calls no tool of the recipe. Allowed: {', '.join(tools)}.")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        arguments = None
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: {_shown(call)} has no arguments. Give a mapping of names to values.")
    given = {key: value for key, value in arguments.items() if value is not None}  # Arrow fills in those of other rows
    return {"type": "function", "function": {"name": name, "arguments": given}}


def _shown(value: Any) -> str:
    return str(value)[:_SHOWN_CHARACTERS]
