"""The reward for the agreed form. `format_reward` counts tags, so repeating or nesting them earns nothing.

It judges form only; pair it with an accuracy reward, and gate it (`rewards.gate`) where form must not pay on its own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from .completion import Completion, completion_text, prompt_end
from .facts import states

_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # fillers and the empty Braille cell: letters that show nothing


@states(top=1.0, by_row=True)
def format_reward(
    completions: Sequence[Completion],
    *,
    tags: Sequence[str] = ("think", "answer"),
    pattern: str | None = None,
    mode: Literal["strict", "soft"] = "strict",
    prefilled: bool | None = None,
    prompts: Sequence[Completion] | None = None,
    max_answer_chars: int = 1000,
    **kwargs: Any,
) -> list[float | None]:
    r"""Pay 1 for a completion in the agreed form.

    Formula: with tags t1 … tn, 1 if the completion is exactly `<t1>…</t1> … <tn>…</tn>`, where each tag opens and
    closes once, in order, around non-blank text, with nothing but white space outside, and the last block holds at most
    `max_answer_chars`; else 0 (strict), or ½ · (blocks that are right and in order) / n (soft), so partial credit
    stays at or under ½ and repeating a tag spoils its block.

    Args:
        completions: text or chat messages.
        tags: the blocks in order; case counts.
        pattern: a regular expression the whole completion must match instead of `tags` (`.` matches newlines).
        mode: `soft` gives the partial credit above; it needs `tags`.
        prefilled: whether the prompt already wrote the first opening tag, which the model then does not write. None
            looks at the end of each prompt's text; with chat prompts, whose template is not visible here, set it
            (`rewards.format.ends_with_tag(rendered_prompt, "think")`).
        prompts: passed by TRL.
        max_answer_chars: longest last block accepted, in characters, against enumerating all answers.

    Returns:
        One value in [0, 1] per completion.

    Source: TRL 1.16 `think_format_reward` and open-r1 `format_reward`, which accept 14 and 11 of 28 hacked forms.

    >>> format_reward(["<think>2+2\nis 4</think>\n<answer>4</answer>", "<think>x</think><think>x</think>4"])
    [1.0, 0.0]
    >>> format_reward(["2+2 is 4</think><answer>4</answer>"], prompts=["2+2?<think>"])
    [1.0]
    >>> format_reward(["so <answer>4</answer>"], mode="soft")
    [0.25]
    """
    if mode not in ("strict", "soft"):
        raise ValueError(f"format_reward: mode is {mode!r}; allowed: 'strict', 'soft'")
    if pattern is not None:
        if mode == "soft":
            raise ValueError("format_reward: mode 'soft' needs tags; a pattern matches or does not")
        compiled = re.compile(pattern, re.DOTALL)
        return [1.0 if compiled.fullmatch(completion_text(text)) else 0.0 for text in completions]
    if not tags or len(set(tags)) != len(tags):
        raise ValueError(f"format_reward: tags must be one or more different names, got {list(tags)!r}")
    marker = re.compile(f"<(/?)({'|'.join(re.escape(tag) for tag in tags)})>")
    scores: list[float | None] = []
    for index, completion in enumerate(completions):
        opened = prefilled
        if opened is None:
            opened = prompts is not None and ends_with_tag(prompt_end(prompts[index]), tags[0])
        text = (f"<{tags[0]}>" if opened else "") + completion_text(completion)
        right = _right_blocks(text, tags, marker, max_answer_chars)
        if right == len(tags) and _only_blocks(text, tags):
            scores.append(1.0)
        else:
            scores.append(0.5 * right / len(tags) if mode == "soft" else 0.0)
    return scores


def ends_with_tag(rendered_prompt: str, tag: str) -> bool:
    r"""Return whether a rendered prompt ends with an opening tag, which the model then does not write itself.

    >>> ends_with_tag("<|im_start|>assistant\n<think>\n", "think")
    True
    """
    return rendered_prompt.rstrip().endswith(f"<{tag}>")


def _right_blocks(text: str, tags: Sequence[str], marker: re.Pattern[str], max_answer_chars: int) -> int:
    """Count the blocks that open and close once, hold text, and follow the blocks counted before them."""
    places: dict[tuple[bool, str], list[re.Match[str]]] = {}
    for match in marker.finditer(text):
        places.setdefault((bool(match.group(1)), match.group(2)), []).append(match)
    right, end = 0, 0
    for tag in tags:
        opening, closing = places.get((False, tag), []), places.get((True, tag), [])
        if len(opening) != 1 or len(closing) != 1 or opening[0].start() < end or closing[0].start() < opening[0].end():
            continue
        content = text[opening[0].end() : closing[0].start()].strip()
        if not _is_visible(content) or marker.search(content) or (tag == tags[-1] and len(content) > max_answer_chars):
            continue
        right, end = right + 1, closing[0].end()
    return right


def _is_visible(text: str) -> bool:
    """Return whether a text shows anything: zero-width and control characters are no reasoning."""
    return any(unicodedata.category(char)[0] not in "ZCM" and char not in _BLANK for char in text)


def _only_blocks(text: str, tags: Sequence[str]) -> bool:
    """Return whether nothing but white space stands outside the blocks, each known to occur once and in order."""
    position = 0
    for tag in tags:
        start = text.index(f"<{tag}>")
        if text[position:start].strip():
            return False
        position = text.index(f"</{tag}>") + len(tag) + 3
    return not text[position:].strip()
