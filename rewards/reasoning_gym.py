"""Rewards for reasoning-gym tasks, judged by the library's own verifiers (optional dependency `reasoning-gym`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.completion import Completion, completion_text, prompt_prefills_think, visible_text
from rewards.extraction import DEFAULT_METHODS, extract_answer


def reasoning_gym_reward(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    metadata: Sequence[Mapping[str, Any] | str | None],
    *,
    question: Sequence[str] | None = None,
    extract: Sequence[str] = DEFAULT_METHODS,
    prompts: Sequence[Completion] | None = None,
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
        prompts: passed by TRL; shows whether the completion starts inside a thinking block.

    Returns:
        One value in [0, 1] per completion; None where the metadata name no known task.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.

    Source: reasoning-gym 0.1.25, `reasoning_gym.factory.get_score_answer_fn` and `ProceduralDataset.score_answer`.
    """
    try:
        from reasoning_gym.factory import get_score_answer_fn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reasoning_gym_reward needs reasoning-gym: pip install 'grpo-lite[reasoning-gym]'"
        ) from error
    scores: list[float | None] = []
    for index, completion in enumerate(completions):
        raw = metadata[index]
        details = json.loads(raw) if isinstance(raw, str) else raw
        task = (details or {}).get("source_dataset")
        try:
            verify = get_score_answer_fn(task) if task else None
        except ValueError:  # an unknown task
            verify = None
        if verify is None:
            scores.append(None)
            continue
        prefilled = prompts is not None and prompt_prefills_think(prompts[index])
        given = extract_answer(visible_text(completion_text(completion), prefilled=prefilled), extract)
        entry = {"question": question[index] if question else "", "answer": answer[index], "metadata": details}
        scores.append(float(verify(given, entry)) if given is not None else 0.0)
    return scores
