"""The turns of an episode as people read them: `→ add(a=2, b=3)` for a call, `← 5` for its result. No torch.

For the report, the page of `make ui`, the chat and the doctor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
_ERROR = ("{'error':", '{"error":')  # how TRL writes what a tool raised


def turns_of(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each part: `said`, `call`, `result` or `failed`.

    >>> call = {"function": {"name": "add", "arguments": {"a": 2}}}
    >>> messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": "add", "content": "2"}]
    >>> list(turns_of(messages))
    [('call', 'add(a=2)'), ('result', '2')]
    """
    for message in messages:
        content = message.get("content")
        text = content if isinstance(content, str) else "" if content is None else _json(content)
        if message.get("role") == "tool":
            yield ("failed" if text.startswith(_ERROR) else "result"), text
            continue
        if text.strip():
            yield "said", text.strip()
        for call in message.get("tool_calls") or ():
            yield "call", call_text(call)


def call_text(call: Mapping[str, Any]) -> str:
    """Return a call as Python writes one."""
    function = call.get("function") or call
    arguments = function.get("arguments")
    written = (
        ", ".join(f"{key}={_json(value)}" for key, value in arguments.items())
        if isinstance(arguments, Mapping)
        else _json(arguments)
    )
    return f"{function.get('name')}({written})"


def message_text(message: Message) -> str:
    """Return one message for a screen; the lines of a result stand below each other.

    >>> print(message_text({"role": "tool", "content": "C R A N E\\n- Y - Y Y"}))
    ← C R A N E
      - Y - Y Y
    """
    marks = {"said": "", "call": "→ ", "result": "← ", "failed": "← "}
    return "\n".join(
        marks[kind] + text.replace("\n", "\n  " if marks[kind] else "\n") for kind, text in turns_of([message])
    )


def calls_of(messages: Sequence[Message]) -> list[str]:
    """Return the calls of an episode as text."""
    return [text for kind, text in turns_of(messages) if kind == "call"]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
