"""The text of a completion: from TRL's two shapes to the part that answers, without the thinking.

First step of every text reward: `completion_text` flattens a chat completion, `visible_text` drops the thinking. What
is left goes to `rewards.extraction` (which answer does it commit to?) or is compared as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Completion = str | Sequence[Message] | Message | None

# Blanks and attributes in a tag are forgiven: what is thinking earns nothing, so nobody gains by misspelling it.
_THINK_TAG = re.compile(
    r"<\s{0,9}(/?)\s{0,9}(?:\w{1,20}:)?(?:think|thinking|thought|reasoning)(?:\s[^<>]{0,99})?(?<!/)>", re.IGNORECASE
)
_OPEN_THINK_AT_END = re.compile(r"<(?:think|thinking|thought|reasoning)>\s*\Z", re.IGNORECASE)


def completion_text(completion: Completion) -> str:
    r"""Return the text a completion says to the user, whether it came as text or as chat messages.

    Of several messages (tool use) the last assistant message with text counts: that is where the answer is. A separate
    `reasoning_content` is thinking and is left out.

    >>> completion_text([{"role": "assistant", "content": "It is 4."}])
    'It is 4.'
    >>> completion_text({"role": "assistant", "content": [{"type": "text", "text": "It is 4."}]})
    'It is 4.'
    """
    if completion is None:
        return ""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        return _content_text(completion.get("content"))
    texts = [_content_text(message.get("content")) for message in completion if message.get("role") != "tool"]
    return next((text for text in reversed(texts) if text.strip()), "")


def _content_text(content: Any) -> str:
    """Return the text of a message's content: a string, a list of typed parts, or nothing (a bare tool call)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content)
    raise TypeError(f"message content must be text or a list of parts, got {type(content).__name__}")


def prompt_end(prompt: Completion) -> str:
    """Return the text a prompt ends with, as far as it leads into the completion.

    A rendered prompt leads into it. Chat messages do so only if the last one is a started assistant turn: what the chat
    template appends is not in them.

    >>> prompt_end("2+2?<think>"), prompt_end([{"role": "user", "content": "Write <think>"}])
    ('2+2?<think>', '')
    """
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    last = prompt if isinstance(prompt, Mapping) else prompt[-1] if prompt else {}
    return _content_text(last.get("content")) if last.get("role") == "assistant" else ""


def prompt_prefills_think(prompt: Completion) -> bool:
    """Return whether a prompt ends inside an open thinking tag, so that the completion starts with thinking.

    >>> prompt_prefills_think("<|im_start|>assistant\\n<think>\\n"), prompt_prefills_think("What is 2+2?")
    (True, False)
    """
    return _OPEN_THINK_AT_END.search(prompt_end(prompt)[-64:]) is not None


def visible_texts(
    completions: Sequence[Completion], prompts: Sequence[Completion] | None = None, prefilled: bool | None = None
) -> list[str]:
    """Return what each completion says outside its thinking: the text that answers.

    Args:
        completions: text or chat messages.
        prompts: their prompts, which may end inside a thinking block.
        prefilled: whether all prompts do; None looks at `prompts`. With chat prompts, whose template is not visible
            here, set it.
    """
    texts = [completion_text(completion) for completion in completions]
    if prefilled is not None or prompts is None:
        return [visible_text(text, prefilled=bool(prefilled)) for text in texts]
    return [
        visible_text(text, prefilled=prompt_prefills_think(prompt)) for text, prompt in zip(texts, prompts, strict=True)
    ]


def visible_text(text: str, *, prefilled: bool = False) -> str:
    r"""Return the text without its thinking blocks.

    A closing tag without an opening one ends a block that the prompt opened: everything before it is thinking. A block
    that never closes hides all that follows. Nested openings do not nest (models quote the tag): the first closing tag
    ends the block.

    >>> visible_text("<think>41?</think>It is 42.")
    'It is 42.'
    >>> visible_text("41?</think>It is 42."), visible_text("It is 42<think>or"), visible_text("42", prefilled=True)
    ('It is 42.', 'It is 42', '')
    """
    if "<" not in text:
        return "" if prefilled else text
    parts: list[str] = []
    start, inside = 0, prefilled
    for tag in _THINK_TAG.finditer(text):
        closing = bool(tag.group(1))
        if not inside and not closing:
            parts.append(text[start : tag.start()])
            inside = True
        elif closing:
            if not inside:
                parts.clear()
            inside, start = False, tag.end()
    if not inside:
        parts.append(text[start:])
    return "".join(parts)
