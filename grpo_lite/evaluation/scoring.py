"""Which completions are right: the recipe's rewards and scores, applied to completions or episodes as training would.

Place in the line: beneath `evaluate`, the probe and rejection sampling, which generate and then ask here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_lite.recipe.recipe import ENVIRONMENT_REWARD, Recipe
from grpo_lite.task.episodes import Episode, Player
from grpo_lite.task.generators import Row
from grpo_lite.task.guard import limited
from grpo_lite.task.prompts import columns_of, lead_in
from grpo_lite.task.rewards import Reward, import_function, load_function, load_second_opinion, top_of

Completions = Sequence[list[int]] | Sequence[Episode]  # one a row


def score_completions(
    tokenizer: Any, recipe: Recipe, rows: Sequence[Row], completions: Completions, player: Player | None = None
) -> tuple[list[bool | None], list[bool | None]]:
    """Return whether each completion is leniently and strictly right; None where the gold is unusable.

    Args:
        player: of the episodes, whose environments may pay.
    """
    primary = recipe.primary_score
    lenient = _scores(primary, "eval.lenient", tokenizer, recipe, rows, completions, player)
    threshold = getattr(primary, "threshold", None) or _right_from(primary)
    right: list[bool | None] = [None if score is None else score >= threshold for score in lenient]
    strict = list(right)
    for i, section in enumerate(recipe.eval.strict):
        scores = _scores(section, f"eval.strict[{i}]", tokenizer, recipe, rows, completions, player)
        for j, score in enumerate(scores):
            if strict[j]:
                strict[j] = score is not None and score >= section.threshold
    return right, strict


def right_of_each(right: Sequence[bool | None], samples: int) -> list[int | None]:
    """Return how many of each row's samples are right; None where one of them cannot be judged."""
    groups = [right[start : start + samples] for start in range(0, len(right), samples)]
    return [None if None in group else sum(map(bool, group)) for group in groups]


def _right_from(section: Any) -> float:
    """Return from which score a reward's completion is right: 1, or the top that the reward states if that is lower."""
    if section.function == ENVIRONMENT_REWARD:
        return 1.0
    return min(1.0, top_of(import_function(section.function, "rewards[0]")))


def second_opinions(tokenizer: Any, recipe: Recipe, rows: Sequence[Row], completions: Completions) -> list[bool] | None:
    """Return whether the first reward's second opinion accepts each completion; None if there is none."""
    if not recipe.rewards:
        return None
    section, where = recipe.rewards[0], "rewards[0]"
    columns, opened = _columns(recipe, rows), lead_in(rows, recipe, tokenizer)
    reward = import_function(section.function, where)  # only the opinion is called: eval.lenient may replace the reward
    opinion = load_second_opinion(reward, section, where, columns, opened)
    if opinion is None:
        return None
    top = top_of(opinion)
    opinion = limited(opinion, recipe.limits.reward_timeout_s, where)
    scores = call_reward(opinion, tokenizer, recipe, rows, completions)
    return [score is not None and score >= top for score in scores]


def _scores(
    section: Any, where: str, tokenizer: Any, recipe: Recipe, rows: Sequence[Row], completions: Completions,
    player: Player | None,
) -> list[float | None]:  # fmt: skip
    if section.function == ENVIRONMENT_REWARD:
        assert player is not None  # recipe/checks.py
        return player.rewards(completions)  # type: ignore[arg-type]
    opened, budget = lead_in(rows, recipe, tokenizer), recipe.limits.judge_budget
    function = load_function(section, where, _columns(recipe, rows), opened, budget)
    function = limited(function, recipe.limits.reward_timeout_s, where)
    return call_reward(function, tokenizer, recipe, rows, completions)


def call_reward(
    function: Reward, tokenizer: Any, recipe: Recipe, rows: Sequence[Row], completions: Completions
) -> list[float | None]:
    """Score completions, one a row, by one reward, as many in a call as in training.

    An episode whose environment could not be reset has no score; one with a call that could not be ended has 0.
    """
    columns, size = columns_of(rows), recipe.schedule.batch
    ends = [given.ended if isinstance(given, Episode) else None for given in completions]
    scores: list[float | None] = [0.0 if end == "hung" else None for end in ends]
    played = [i for i, end in enumerate(ends) if end not in ("reset", "hung")]
    for start in range(0, len(played), size):
        batch = played[start : start + size]
        results = function(
            **_as_in_training(tokenizer, recipe, [rows[i] for i in batch], [completions[i] for i in batch]),
            **{key: [rows[i].get(key) for i in batch] for key in columns},
        )
        for i, score in zip(batch, results, strict=True):
            scores[i] = score
    return scores


def _as_in_training(tokenizer: Any, recipe: Recipe, rows: list[Row], completions: list[Any]) -> dict[str, Any]:
    """Return what TRL gives a reward beside the columns: chat completions are lists of messages."""
    if isinstance(completions[0], Episode):
        with_environments = {"environments": [e.environment for e in completions]} if recipe.environment else {}
        return {
            "completions": [episode.messages for episode in completions],
            "prompts": [episode.prompt for episode in completions],
            "completion_ids": [list(episode.ids) for episode in completions],
            **with_environments,
        }
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    if not isinstance(rows[0]["prompt"], str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    return {
        "completions": texts,
        "prompts": [row["prompt"] for row in rows],
        "completion_ids": [list(ids) for ids in completions],
    }


def _columns(recipe: Recipe, rows: Sequence[Row]) -> list[str]:
    return [*columns_of(rows), *(["environments"] if recipe.environment is not None else [])]
