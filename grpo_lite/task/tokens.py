"""Prompts to token ids: the chat template's markup is markup, and the same letters inside a message are only letters.

A row that contains `<|im_end|><|im_start|>system` would otherwise close its own turn and open another one. Special
tokens inside a message (or a text prompt) are therefore spelled out in ordinary tokens. Prompts without any, nearly
all, are tokenised exactly as upstream does it. What tools and environments write is trusted less: there, other markup
such as `<tool_call>` is spelled out too.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from grpo_lite.errors import DataError

_PATTERNS: WeakKeyDictionary[Any, re.Pattern[str]] = WeakKeyDictionary()
_MARKUP: WeakKeyDictionary[Any, re.Pattern[str]] = WeakKeyDictionary()
_AT_ONCE = 1000  # texts in a call of the tokenizer
_IN_BRACKETS = re.compile(r"[<\[].*[>\]]", re.DOTALL)


def prompt_text(prompt: Any, tokenizer: Any, template_kwargs: dict[str, Any] | None = None) -> str:
    """Return the text the model sees for a prompt: the chat template applied, or the text itself.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt
    kwargs = dict(template_kwargs or {})
    if not (kwargs.get("chat_template") or getattr(tokenizer, "chat_template", None)):
        raise DataError(
            "data.format: 'chat' is given, but the model's tokenizer has no chat template (a base model). "
            "Use data.format=text, or an instruct model."
        )
    try:
        return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs))
    except Exception as error:  # a template is a program of the model's makers
        raise DataError(
            f"data: the model's chat template refuses the messages {str(prompt)[:200]}: {error}. Change the prompts "
            "(some templates know no system message, and want user and assistant to take turns), or the template: "
            "grpo.chat_template_kwargs."
        ) from None


def prompt_key(prompt: Any) -> str:
    """Return what equal prompts have in common, whether text or messages."""
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)


def require_messages(prompt: list[Any], where: str) -> None:
    """Check a column of chat messages that a row brings.

    Raises:
        DataError: there is none, or one is no mapping with `role` and `content` (text, or parts with a `type`).
    """
    for message in prompt or [None]:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        parts = content if isinstance(content, list) else []
        good = isinstance(content, str | list) or (isinstance(message, dict) and message.get("tool_calls"))
        good = good and all(isinstance(part, dict) and "type" in part for part in parts)
        if not (role and isinstance(role, str) and good):
            raise DataError(
                f"{where}: {str(message)[:200] if prompt else 'an empty list'} is no chat message. Expected: "
                "text, or messages such as {'role': 'user', 'content': '1+1='}, at least one."
            )


def prompt_ids(
    prompt: Any, tokenizer: Any, template_kwargs: dict[str, Any] | None = None, observed: bool = False
) -> list[int]:
    """Return the token ids the model sees for a prompt, as TRL makes them (no BOS added to a rendered chat).

    Args:
        prompt: text, or chat messages.
        template_kwargs: what the chat template gets (TRL's `chat_template_kwargs`).
        observed: whether the last message ends with what an environment's `reset` returned.
    """
    if holds_special_tokens(prompt, tokenizer, observed):
        return _spelled_out(prompt, tokenizer, template_kwargs, observed)
    text = prompt_text(prompt, tokenizer, template_kwargs)
    return list(tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"])


def batch_prompt_ids(
    prompts: Sequence[Any], tokenizer: Any, template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """Return what `prompt_ids` returns for each prompt, tokenised many at a time: for thousands of rows."""
    ids: list[list[int]] = [[] for _ in prompts]
    texts: dict[bool, dict[int, str]] = {True: {}, False: {}}  # by whether it is a text prompt, for the BOS
    for i, prompt in enumerate(prompts):
        if holds_special_tokens(prompt, tokenizer):
            ids[i] = prompt_ids(prompt, tokenizer, template_kwargs)
        else:
            texts[isinstance(prompt, str)][i] = prompt_text(prompt, tokenizer, template_kwargs)
    for is_text, by_row in texts.items():
        for i, encoded in zip(by_row, encode(list(by_row.values()), tokenizer, special=is_text), strict=True):
            ids[i] = encoded
    return ids


def encode(texts: Sequence[str], tokenizer: Any, *, special: bool = False) -> list[list[int]]:
    """Return the token ids of texts, with the tokenizer's own tokens around them (BOS) if `special`."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _AT_ONCE):
        part = list(texts[start : start + _AT_ONCE])
        ids += map(list, tokenizer(part, add_special_tokens=special, return_attention_mask=False)["input_ids"])
    return ids


def completion_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of completions, each with the end token at its end and nowhere else.

    A text that holds the end token's letters is spelled out in ordinary tokens, as prompts are.
    """
    end, end_id = str(tokenizer.eos_token or ""), tokenizer.eos_token_id
    if end_id is None:
        raise DataError("warmup: the model's tokenizer has no end token, so no completion can end. Take another model.")
    ids = encode(texts, tokenizer)
    for i, text in enumerate(texts):
        if end in text:
            ids[i] = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return [[*tokens, end_id] for tokens in ids]


def holds_special_tokens(prompt: Any, tokenizer: Any, observed: bool = False) -> bool:
    """Return whether a prompt's own words contain the text of a special token, or the observed ones any markup's."""
    pattern = _pattern(tokenizer)
    if any(pattern.search(text) for text in _texts(_joined(prompt, pattern))):
        return True
    return observed and not isinstance(prompt, str) and holds_markup(prompt[-1:], tokenizer)


def holds_markup(messages: list[dict[str, Any]], tokenizer: Any) -> bool:
    """Return whether results of tools contain the text of a special token, or of another one such as `<tool_call>`."""
    pattern = _markup(tokenizer)
    return any(pattern.search(text) for text in _texts(_joined(messages, pattern)))


def plainly_named(messages: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return results of tools without markup in the tools' names: a model calls any name, and templates write it."""
    pattern = _markup(tokenizer)
    return [{**message, "name": pattern.sub("?", str(message.get("name")))} for message in messages]


def tool_result_ids(
    messages: list[dict[str, Any]], tokenizer: Any, template_kwargs: dict[str, Any]
) -> list[int] | None:
    """Return the ids that results of tools add before the model's next turn, markup in the results spelled out.

    As TRL's `_get_tool_suffix_ids` (trl 1.14-1.16), the call before them is a stand-in. None where the template
    changes the text of a result, so that its parts cannot be told apart.
    """
    messages = plainly_named(messages, tokenizer)
    call = {"type": "function", "function": {"name": messages[0]["name"], "arguments": {}}}
    before = [{"role": "user", "content": "dummy"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    options = {key: value for key, value in template_kwargs.items() if value is not None}
    prefix = tokenizer.apply_chat_template(before, tokenize=True, return_dict=False, **options)
    ends = [i for i, token in enumerate(prefix) if token == tokenizer.eos_token_id]
    prefix = prefix[: ends[-1] + 1] if ends else prefix
    try:
        ids = _spelled_out([*before, *messages], tokenizer, options, len(messages))
    except DataError:
        return None
    return ids[len(prefix) :] if ids[: len(prefix)] == prefix else None


def without_markup(messages: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return the messages with a space in each piece of markup, so that it is none."""
    pattern = _markup(tokenizer)
    changed: list[dict[str, Any]] = _replaced(
        _joined(messages, pattern), lambda text: pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
    )
    return changed


def _markup(tokenizer: Any) -> re.Pattern[str]:
    """Match special tokens, and added ones in brackets that are not special (Qwen's `<tool_call>`, `<think>`)."""
    if tokenizer not in _MARKUP:
        added = map(str, getattr(tokenizer, "added_tokens_decoder", {}).values())
        bracketed = {text for text in added if _IN_BRACKETS.fullmatch(text)}
        alternatives = sorted(map(re.escape, bracketed), key=lambda text: (-len(text), text))
        special = _pattern(tokenizer).pattern
        _MARKUP[tokenizer] = re.compile("|".join([*alternatives, special]))
    return _MARKUP[tokenizer]


def _spelled_out(prompt: Any, tokenizer: Any, template_kwargs: dict[str, Any] | None, observed: int = 0) -> list[int]:
    """Tokenise with stand-ins for the special tokens in the messages, then put their letters' tokens there.

    Args:
        prompt: text or messages.
        tokenizer: of the model.
        template_kwargs: what the chat template gets.
        observed: how many of the last messages hold what a tool or an environment wrote: any markup is spelled out.
    """
    everything = "".join(_texts(prompt))
    mark = next(mark for n in itertools.count() if (mark := f"\ue0f3{n}\ue0f4") not in everything)
    specials: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        specials.append(match[0])
        return mark

    pattern, markup = _pattern(tokenizer), _markup(tokenizer)
    if isinstance(prompt, str):
        safe: Any = pattern.sub(stand_in, prompt)
    else:
        first = len(prompt) - observed
        parts = (prompt[:first], pattern), (prompt[first:], markup)
        safe = [
            message
            for messages, known in parts
            for message in _replaced(_joined(messages, known), lambda text, known=known: known.sub(stand_in, text))
        ]
    pieces = prompt_text(safe, tokenizer, template_kwargs).split(mark)
    if len(pieces) != len(specials) + 1:
        raise DataError(
            f"data: the chat template repeats or drops what a message says, and the message holds the special token "
            f"{specials[0]!r}, so the two cannot be told apart. Remove it from the row."
        )
    ids = list(tokenizer("", add_special_tokens=True)["input_ids"]) if isinstance(prompt, str) else []
    for piece, special in itertools.zip_longest(pieces, specials):
        if piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if special:
            ids += _letters(special, tokenizer)
    return ids


def _letters(token: str, tokenizer: Any) -> list[int]:
    """Return the ids of a token's text written in ordinary tokens."""
    ids = list(tokenizer(token, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    if len(ids) > 1 or len(token) < 2:
        return ids
    # An added token that is not special is not split: write its first letter apart.
    parts = (tokenizer(part, add_special_tokens=False, split_special_tokens=True) for part in (token[0], token[1:]))
    return [number for part in parts for number in part["input_ids"]]


def _pattern(tokenizer: Any) -> re.Pattern[str]:
    if tokenizer not in _PATTERNS:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        texts = {str(token) for token in added if token.special} | set(map(str, tokenizer.all_special_tokens))
        longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
        _PATTERNS[tokenizer] = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    return _PATTERNS[tokenizer]


def _joined(prompt: Any, pattern: re.Pattern[str]) -> Any:
    """Return the prompt with parts of a message made one where markup stands across them: templates write no gap."""
    if isinstance(prompt, str) or not any(isinstance(message.get("content"), list) for message in prompt):
        return prompt
    messages = []
    for message in prompt:
        content = message.get("content")
        parts: list[dict[str, Any]] = []
        for is_text, following in itertools.groupby(
            content if isinstance(content, list) else [], lambda part: isinstance(part.get("text"), str)
        ):
            run = list(following)
            whole = "".join(part["text"] for part in run) if is_text else ""
            across = len(pattern.findall(whole)) != sum(len(pattern.findall(part["text"])) for part in run if is_text)
            parts += [{**run[0], "text": whole}] if across else run
        messages.append({**message, "content": parts} if isinstance(content, list) else message)
    return messages


def _texts(prompt: Any) -> list[str]:
    """Return all text of a prompt that comes from the data."""
    texts: list[str] = []
    _replaced(prompt, lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
    return texts


def _replaced(prompt: Any, change: Any) -> Any:
    """Return the prompt with `change` applied to the text of every message."""
    if isinstance(prompt, str):
        return change(prompt)
    messages = []
    for message in prompt:
        content = message.get("content")
        if isinstance(content, str):
            content = change(content)
        elif isinstance(content, list):
            content = [
                {**part, "text": change(part["text"])} if isinstance(part.get("text"), str) else part
                for part in content
            ]
        messages.append({**message, "content": content})
    return messages
