"""Rewards for reasoning-gym tasks, judged by the library's own verifiers (optional dependency `reasoning-gym`).

The verifiers parse what the model wrote, some of them with sympy; they run in the judge process (`rewards.judge`), so a
hanging one costs its limit and not the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from .completion import Completion, visible_texts
from .extraction import DEFAULT_METHODS, extract_answer
from .facts import states


@states(top=1.0)
def reasoning_gym_reward(
    completions: Sequence[Completion],
    entry: Sequence[Mapping[str, Any] | str | None] | None = None,
    *,
    answer: Sequence[Any] | None = None,
    metadata: Sequence[Mapping[str, Any] | str | None] | None = None,
    question: Sequence[str] | None = None,
    extract: Sequence[str] = DEFAULT_METHODS,
    timeout_s: float = 2.0,
    log_metric: Callable[[str, float], None] | None = None,
    prompts: Sequence[Completion] | None = None,
    prefilled: bool | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Pay what the task's own verifier pays for the extracted answer.

    Formula: `get_score_answer_fn(metadata["source_dataset"])(extract(completion), entry)`, where entry is the row as
    reasoning-gym made it; 0 without a committed answer.

    Args:
        completions: text or chat messages.
        entry: the whole row as reasoning-gym made it, as a mapping or as JSON text (which survives `datasets`' column
            typing).
        answer, metadata, question: the row's columns instead, where `entry` is not given; metadata like entry.
        extract: methods of `rewards.extraction`, in order.
        timeout_s: limit per answer, in seconds; over it the answer counts as wrong.
        log_metric: passed by TRL. Gets the fractions of the batch that ran into the limit or broke the verifier, as
            `reasoning_gym_reward/{timeout,broken}`.
        prompts: passed by TRL; shows whether a completion starts inside a thinking block.
        prefilled: whether every completion does; None looks at `prompts` (set it for chat prompts).

    Returns:
        One value in [0, 1] per completion; None where the metadata name no known task.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: neither `entry` nor `answer` and `metadata` are given.

    Source: reasoning-gym 0.1.25, `get_score_answer_fn` and `ProceduralDataset.score_answer`.

    >>> row = {"question": "3 + 4 =", "answer": "7", "metadata": {"source_dataset": "basic_arithmetic"}}
    >>> reasoning_gym_reward(["<answer>7</answer>", "<answer>8</answer>"], [row, row])  # doctest: +SKIP
    [1.0, 0.0]
    """
    if find_spec("reasoning_gym") is None:
        raise ModuleNotFoundError("reasoning_gym_reward needs reasoning-gym: pip install 'grpo-lite[reasoning-gym]'")
    from . import judge

    rows = _entries(len(completions), entry, answer, metadata, question)
    scores: list[float | None] = [0.0] * len(completions)
    items: list[tuple[int, str, str]] = []
    for index, text in enumerate(visible_texts(completions, prompts, prefilled)):
        row = rows[index]
        if not (row.get("metadata") or {}).get("source_dataset"):
            scores[index] = None
            continue
        items.append((index, extract_answer(text, extract) or "", json.dumps(row, default=str)))
    verdicts = judge.ask("reasoning_gym", [(given, row) for _, given, row in items], timeout_s)
    broken = 0
    for (index, given, _), verdict in zip(items, verdicts, strict=True):
        if verdict == judge.UNKNOWN:
            scores[index] = None
        elif verdict in (judge.TIMEOUT, judge.UNDECIDED, judge.CRASH):
            broken += verdict != judge.TIMEOUT
        elif given:
            scores[index] = float(verdict)
    if log_metric is not None and len(completions):
        log_metric("reasoning_gym_reward/timeout", verdicts.count(judge.TIMEOUT) / len(completions))
        log_metric("reasoning_gym_reward/broken", broken / len(completions))
    return scores


def _entries(
    count: int,
    entry: Sequence[Mapping[str, Any] | str | None] | None,
    answer: Sequence[Any] | None,
    metadata: Sequence[Mapping[str, Any] | str | None] | None,
    question: Sequence[str] | None,
) -> list[Mapping[str, Any]]:
    """Return one reasoning-gym row per completion, from whichever columns the dataset has; {} where it is missing."""
    if entry is not None:
        return [_mapping(row) for row in entry]
    if answer is None or metadata is None:
        raise ValueError("reasoning_gym_reward: needs the column `entry`, or the columns `answer` and `metadata`")
    questions = question if question is not None else [""] * count
    return [
        {"question": q, "answer": a, "metadata": _mapping(m)}
        for q, a, m in zip(questions, answer, metadata, strict=True)
    ]


def _mapping(raw: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    value = json.loads(raw) if isinstance(raw, str) and raw.strip() else raw
    return value if isinstance(value, Mapping) else {}
