"""check_recipe_rewards: on rows of the recipe's own data the gold must earn the top score, and no cheat may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo_lite.check import gold_completion
from grpo_lite.data import Prompts
from grpo_lite.errors import RewardError
from grpo_lite.recipe import Recipe
from grpo_lite.reward_loader import Reward, load_rewards
from rewards.testing import Report, check_rewards


def check_recipe_rewards(recipe: Recipe, prompts: Prompts) -> Report:
    """Score the gold completions and the battery of cheats by the recipe's weighted sum of rewards.

    Raises:
        RewardError: a reward does not load or breaks its contract, or `check.skip` names an unknown check.
    """
    rows = prompts.train[: recipe.check.rows]
    columns = sorted({key for row in rows for key in row if key != "prompt"})
    functions, weights = load_rewards(recipe, columns)
    try:
        return check_rewards(
            rows,
            weighted_sum(functions, weights),
            render_gold=lambda row: gold_completion(recipe, dict(row)),
            chat=recipe.data.format == "chat",
            skip=recipe.check.skip,
        )
    except ValueError as error:
        raise RewardError(f"check: {error}") from None


def require_paid_gold(recipe: Recipe, prompts: Prompts, show: Callable[[str], None]) -> Report:
    """Run the check before training, in a line; refuse to train on rewards that do not pay the gold.

    Raises:
        RewardError: a gold completion does not earn the top score.
    """
    report = check_recipe_rewards(recipe, prompts)
    if not report.gold_scores:
        raise RewardError(
            f"{recipe.name}: the rewards do not pay the right answer, so there is nothing to learn:\n{report.table()}\n"
            "Correct data.answer, data.gold_completion (what a perfect completion looks like) or the rewards; "
            "or train all the same with check.enabled=false."
        )
    cheats = sorted({finding.check for finding in report.findings})
    tail = f"; {len(cheats)} kinds of cheat are paid too ({', '.join(cheats)}), see `grpo-lite rewards check`"
    show(
        f"rewards: gold completions earn {report.top:g}, cheats succeed in {report.gameability_rate:.1%} of tries"
        + (tail if cheats else "")
    )
    return report


def weighted_sum(functions: list[Reward], weights: list[float]) -> Callable[..., list[float | None]]:
    """Return TRL's total reward as one function: Σ weight × reward over the rewards that are not None."""

    def total(completions: list[Any], **columns: Any) -> list[float | None]:
        parts = [function(completions=completions, **columns) for function in functions]
        sums: list[float | None] = []
        for values in zip(*parts, strict=True):
            paid = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
            sums.append(None if values[0] is None else sum(paid))
        return sums

    return total
