"""Rewards for reasoning-gym tasks, judged by the library's own verifiers (optional dependency `reasoning-gym`).

The verifiers parse what the model wrote, some of them with sympy; they run in the judge process (`rewards.judge`), so a
hanging one costs its limit and not the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from rewards.completion import Completion, visible_texts
from rewards.extraction import DEFAULT_METHODS, extract_answer


def reasoning_gym_reward(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    metadata: Sequence[Mapping[str, Any] | str | None],
    *,
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
        answer: the row's `answer` column.
        metadata: the row's `metadata` column, as a mapping or as JSON text (which survives `datasets`' column typing).
        question: the row's `question` column; a few verifiers read it.
        extract: methods of `rewards.extraction`, in order.
        timeout_s: limit per answer, in seconds; over it the answer counts as wrong.
        log_metric: passed by TRL. Gets the fractions of the batch that ran into the limit or broke the verifier, as
            `reasoning_gym_reward/{timeout,broken}`.
        prompts: passed by TRL; shows whether a completion starts inside a thinking block.
        prefilled: whether every completion does; None looks at `prompts` (say it yourself for chat prompts).

    Returns:
        One value in [0, 1] per completion; None where the metadata name no known task.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.

    Source: reasoning-gym 0.1.25, `get_score_answer_fn` and `ProceduralDataset.score_answer`.

    >>> row = {"source_dataset": "basic_arithmetic"}
    >>> reasoning_gym_reward(["<answer>7</answer>", "<answer>8</answer>"], ["7", "7"], [row, row])  # doctest: +SKIP
    [1.0, 0.0]
    """
    if find_spec("reasoning_gym") is None:
        raise ModuleNotFoundError("reasoning_gym_reward needs reasoning-gym: pip install 'grpo-lite[reasoning-gym]'")
    from rewards import judge

    scores: list[float | None] = [0.0] * len(completions)
    items: list[tuple[int, str, str]] = []
    for index, text in enumerate(visible_texts(completions, prompts, prefilled)):
        raw = metadata[index]
        details = json.loads(raw) if isinstance(raw, str) else raw
        if not details or not details.get("source_dataset"):
            scores[index] = None
            continue
        given = extract_answer(text, extract)
        entry = {"question": question[index] if question else "", "answer": answer[index], "metadata": details}
        items.append((index, given or "", json.dumps(entry, default=str)))
    verdicts = judge.ask("reasoning_gym", [(given, entry) for _, given, entry in items], timeout_s)
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
