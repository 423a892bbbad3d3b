"""check_recipe_rewards: on rows of the recipe's own data the gold must earn the top score, and no cheat may."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grpo_lite.check import gold_completion
from grpo_lite.data import Prompts, load_prompts
from grpo_lite.errors import GRPOLiteError, RewardError
from grpo_lite.recipe import Recipe
from grpo_lite.reward_guard import limited
from grpo_lite.reward_loader import Reward, load_rewards
from rewards.testing import Report, check_rewards, score_rows

_VERDICTS = ("accuracy", "choice", "countdown", "exact_match", "format", "reasoning_gym", "unit_test")
_TOP_IS_ONE = frozenset(f"{verdict}_reward" for verdict in _VERDICTS)


def check_recipe_rewards(recipe: Recipe, prompts: Prompts) -> Report:
    """Score the gold completions and the battery of cheats by the recipe's weighted sum of rewards.

    Raises:
        RewardError: a reward does not load or breaks its contract, or `check.skip` names an unknown check.
    """
    rows = prompts.train[: recipe.check.rows]
    columns = sorted({key for row in rows for key in row if key != "prompt"})
    functions, weights = load_rewards(recipe, columns, prompts.lead_in)
    functions = [limited(function, recipe.limits.reward_timeout_s, "check") for function in functions]

    def gold(row: Mapping[str, Any]) -> str:
        return gold_completion(recipe, dict(row), prompts.lead_in)

    chat = recipe.data.format == "chat"
    try:
        return check_rewards(
            rows,
            weighted_sum(functions, weights),
            render_gold=gold,
            top=_highest_sum(recipe, functions, rows, [gold(row) for row in rows], chat),
            chat=chat,
            skip=recipe.check.skip,
        )
    except ValueError as error:
        raise RewardError(f"check: {error}") from None


def _highest_sum(
    recipe: Recipe, functions: list[Reward], rows: list[dict[str, Any]], golds: list[str], chat: bool
) -> float | None:
    """Return what a perfect completion earns: each reward's known top, or the best that any gold earns.

    So a format that no gold keeps is found, though every gold then earns the same. None without a usable gold.
    """
    highest = 0.0
    for section, function in zip(recipe.rewards, functions, strict=True):
        paid = [score for score in score_rows(function, rows, golds, chat) if score is not None]
        if not paid:
            return None
        highest += section.weight * (1.0 if section.function.rpartition(".")[2] in _TOP_IS_ONE else max(paid))
    return highest


def check_rewards_alone(recipe: Recipe) -> tuple[Report, list[str]]:
    """Check a recipe's rewards without its model; return the report and notes for people.

    Only the tokenizer's chat template matters here, and where it is not at hand the check goes on without it.

    Raises:
        GRPOLiteError: as check_recipe_rewards, or the data are at fault.
    """
    tokenizer, notes = None, []
    if recipe.data.format == "chat":
        from grpo_lite.model import load_tokenizer

        try:
            tokenizer = load_tokenizer(recipe)
        except GRPOLiteError as error:
            notes.append(f"checked without the chat template (whether it opens <think> is not known): {error}")
    prompts = load_prompts(recipe, tokenizer)
    return check_recipe_rewards(recipe, prompts), notes


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
