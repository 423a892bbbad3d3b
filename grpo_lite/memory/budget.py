"""choose: which steps, evaluation and caps of a recipe fit into a given time, and what that changes. Torch-free.

Place in the line: before a run begins, from `times` that a probe measured or `card_time` estimated. What is chosen is a
list of overrides, as a user would type them, so a run's recipe holds the numbers and a resumed run keeps them.

Training gets three quarters of what start, warm-up and merge leave, evaluation a quarter; what one of them does not
need the other gets. So a longer budget never means fewer steps or problems.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from grpo_lite.commands import either, hint
from grpo_lite.errors import GRPOLiteError
from grpo_lite.memory.card_time import card_times, not_estimated
from grpo_lite.memory.plan import MemoryPlan
from grpo_lite.memory.times import Times, held_out_rows, kept_times, measured_times
from grpo_lite.models.device import Card, published_speed
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.units import duration, span

TRAINING_SHARE = 0.75
RESERVE = 1.2  # the time is planned this much longer than expected
LEAST_PROBLEMS = 50  # fewer find nothing
SCORES_SHARE = 0.1  # of the training, that held-out scores between steps may take
RARELY_CUT = 0.01  # share of completions beyond half the cap up to which the cap is halved
ASSUMED_ROWS = 200  # evaluated, where the data says how many there are and is not read
LONGEST_S = 30 * 24 * 3600.0
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")


@dataclass(frozen=True)
class Budget:
    """What was chosen for a time, and how long it is expected to take."""

    limit_s: float
    spent_s: float  # of it, before the choice
    times: Times
    steps: int
    whole_steps: int  # of the recipe
    rows: int  # evaluated
    whole_rows: int
    overrides: tuple[str, ...]
    notes: tuple[str, ...]
    training_s: float
    evaluation_s: float
    fixed_s: float  # start, warm-up, merge
    whole_s: float  # of the whole recipe

    @property
    def expected_s(self) -> float:
        """Seconds from the command to its end."""
        return self.spent_s + self.fixed_s + self.training_s + self.evaluation_s

    def to_json(self) -> dict[str, Any]:
        """Return plain data for run.json; the deadline reads `evaluation_s`."""
        return {
            "limit_s": self.limit_s, "expected_s": round(self.expected_s, 1), "steps": self.steps, "rows": self.rows,
            "evaluation_s": round(self.evaluation_s, 1), "step_s": self.times.step_s, "source": self.times.source,
            "overrides": list(self.overrides),
        }  # fmt: skip


def read_duration(text: str) -> float:
    """Return the seconds of `3h`, `90m`, `2h30m` or `45s`.

    Raises:
        GRPOLiteError: it is none of these.
    """
    match = _DURATION.fullmatch(text.strip().lower().replace(" ", ""))
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if not 0 < seconds <= LONGEST_S:
        option = either("BUDGET=", "--budget ")
        raise GRPOLiteError(
            f"{option}{text}: not a time above 0 and up to 30 days. Write hours, minutes or seconds, such as "
            f"{option}3h, {option}90m or {option}2h30m."
        )
    return seconds


def choose(
    recipe: Recipe,
    times: Times,
    limit_s: float,
    whole_steps: int,
    held_out: int,
    given: Collection[str] = (),
    spent_s: float = 0.0,
) -> Budget:
    """Choose steps, evaluated problems, samples and caps that take no longer than `limit_s`, with a reserve.

    Args:
        recipe: the recipe.
        times: of its parts.
        limit_s: the budget, in seconds.
        whole_steps: steps of the whole recipe.
        held_out: held-out rows that it would evaluate on.
        given: keys that the user has set, which are not touched.
        spent_s: seconds of the budget that are gone already.

    Raises:
        GRPOLiteError: not even a step and a small evaluation fit; with the least budget.
    """
    fixed_s = times.fixed_s(recipe)
    left_s = (limit_s - spent_s) / RESERVE - fixed_s
    whole_s = times.run_s(recipe, whole_steps, held_out)
    notes: list[str] = []
    overrides: list[str] = []
    steps, rows, chosen = whole_steps, held_out, recipe
    if whole_s - fixed_s > left_s:
        chosen, overrides, notes = _cheaper(recipe, times, given)
        parts = _divide(chosen, times, left_s, whole_steps, held_out, given)
        if parts is None:
            raise _too_small(chosen, times, limit_s, spent_s, held_out, given)
        steps, rows, samples = parts
        if samples != chosen.eval.samples:
            chosen = chosen.with_section("eval", samples=samples)
            overrides.append(f"eval.samples={samples}")
        if steps != whole_steps:
            overrides.insert(0, f"grpo.max_steps={steps}")
            notes.append(_on_the_learning_rate(recipe, steps))
        if rows != held_out:
            overrides.append(f"eval.limit={rows}")
    if recipe.limits.max_minutes is None or recipe.limits.max_minutes * 60 > limit_s:
        overrides.append(f"limits.max_minutes={limit_s / 60:g}")
    kept = [key for key in given if key in ("grpo.max_steps", "eval.limit", "eval.samples")]
    if kept:
        notes.append(f"given, so not chosen: {', '.join(sorted(kept))}")
    training_s, evaluation_s = times.training_s(chosen, steps, rows), times.evaluation_s(chosen, rows)
    if spent_s + fixed_s + training_s + evaluation_s > limit_s:
        notes.append("with what is given that is more than the budget, so training will pause in time to evaluate")
    return Budget(
        limit_s, spent_s, times, steps, whole_steps, rows, held_out, tuple(overrides), tuple(notes), training_s,
        evaluation_s, fixed_s, whole_s,
    )  # fmt: skip


def plan_budget(
    recipe: Recipe, limit_s: float, given: Collection[str], card: Card | None, plan: MemoryPlan | None
) -> Budget:
    """Choose for a card without loading anything: by a probe of this recipe on it, else by its published speeds.

    Args:
        recipe: the recipe.
        limit_s: the budget, in seconds.
        given: keys that the user has set.
        card: the GPU; None: whatever the last probe ran on.
        plan: of the recipe's memory on the card.

    Raises:
        GRPOLiteError: no speed is known, or the budget is too small.
    """
    kept = kept_times(recipe)
    same = card is None or published_speed(str(kept.get("device"))) == published_speed(card.name)
    base_bytes = 2 * plan.job.shape.parameters if plan else 0
    times = measured_times(recipe, None, base_bytes) if same else None
    if times is None and card and plan:
        times = card_times(recipe, plan.job, card)
    if times is None:
        if card and plan:
            why = f"on {card.name} is not known, and it is not estimated {not_estimated(recipe, plan.job, card)}. "
        else:
            why = f"here is not known. Name a card for an estimate ({either('GPU=t4', '--gpu t4')}). "
        raise GRPOLiteError(
            f"{recipe.name}: how long a step takes {why}On the machine that will train, "
            f"{hint('probe', recipe=recipe.name)} measures it, and so does "
            f"{hint('train', recipe=recipe.name, budget=brief(limit_s))}."
        )
    steps = recipe.schedule.max_steps if recipe.schedule.max_steps > 0 else int(kept.get("steps") or 0)
    if not steps:
        raise GRPOLiteError(
            f"{recipe.name}: its steps follow from grpo.num_train_epochs and the rows, which are not read here. Give "
            f"grpo.max_steps, or {hint('probe', recipe=recipe.name)} first."
        )
    rows = held_out_rows(recipe)
    if rows is None:
        rows = int(kept.get("held_out") or 0)
    assumed = recipe.eval.enabled and not rows
    budget = choose(recipe, times, limit_s, steps, ASSUMED_ROWS if assumed else rows, given)
    if assumed:
        note = f"{ASSUMED_ROWS} held-out problems are assumed, since the data is not read here"
        budget = replace(budget, notes=(*budget.notes, note))
    return budget


def _divide(
    recipe: Recipe, times: Times, left_s: float, whole_steps: int, held_out: int, given: Collection[str]
) -> tuple[int, int, int] | None:
    """Return steps, evaluated rows and samples a row that fit; None where not even one step does."""
    rows, samples, least_s = _least_evaluation(recipe, times, held_out, given)
    whole_s = times.evaluation_s(recipe, held_out)
    step_s = _mean_step_s(recipe, times, held_out)
    steps = whole_steps
    if "grpo.max_steps" not in given:
        if left_s - least_s < step_s:
            return None
        training_s = min(max(TRAINING_SHARE * left_s, left_s - whole_s), left_s - least_s)
        steps = min(whole_steps, int(max(training_s, step_s) / step_s))
    for_evaluation_s = min(max((1 - TRAINING_SHARE) * left_s, left_s - whole_steps * step_s), left_s - steps * step_s)
    if whole_s <= for_evaluation_s:
        return steps, held_out, recipe.eval.samples
    cheap = recipe.with_section("eval", samples=samples)
    none_s, one_s = (times.evaluation_s(cheap, n) for n in (0, 1))  # further sets are scored whatever the rows
    fitting = int((for_evaluation_s - none_s) / (one_s - none_s)) if one_s > none_s else held_out
    if "eval.limit" in given or fitting >= held_out:
        return steps, held_out, samples
    return steps, max(rows, fitting - fitting % 10 if fitting > 2 * LEAST_PROBLEMS else fitting), samples


def _mean_step_s(recipe: Recipe, times: Times, held_out: int) -> float:
    """Return the seconds of a step with its share of the held-out scores between steps."""
    steps = recipe.eval.every or 1
    return times.training_s(recipe, steps, held_out) / steps


def _least_evaluation(recipe: Recipe, times: Times, held_out: int, given: Collection[str]) -> tuple[int, int, float]:
    """Return the fewest rows, and samples a row, that an evaluation may have, and its seconds."""
    rows = held_out if "eval.limit" in given else min(held_out, LEAST_PROBLEMS)
    samples = recipe.eval.samples if "eval.samples" in given else 0
    return rows, samples, times.evaluation_s(recipe.with_section("eval", samples=samples), rows)


def _cheaper(recipe: Recipe, times: Times, given: Collection[str]) -> tuple[Recipe, list[str], list[str]]:
    """Return the recipe with rarer held-out scores and, where hardly a completion needs it, half the cap."""
    overrides, notes = [], []
    every, cap = recipe.eval.every, recipe.max_completion_length
    if every and "eval.every" not in given:
        rarest = math.ceil(recipe.eval.every_limit * times.completion_s / (SCORES_SHARE * times.step_s))
        if rarest > every:
            recipe = recipe.with_section("eval", every=rarest)
            overrides.append(f"eval.every={rarest}")
    share = dict(times.truncated).get(cap // 2)
    elsewhere = any("max_completion_length" in reward.kwargs for reward in recipe.rewards)
    fixed = "grpo.max_completion_length" in given or recipe.sampling.length_stages or elsewhere
    if share is not None and share <= RARELY_CUT and cap >= 64 and not fixed:
        overrides.append(f"grpo.max_completion_length={cap // 2}")
        notes.append(
            f"{share:.1%} of the probed completions are longer than {cap // 2} tokens, so the cap is halved; give "
            f"grpo.max_completion_length={cap} to keep it"
        )
    return recipe, overrides, notes


def _on_the_learning_rate(recipe: Recipe, steps: int) -> str:
    """Return what fewer steps change about the learning rate."""
    kind = str(recipe.grpo.get("lr_scheduler_type") or "linear")
    rising = float(recipe.grpo.get("warmup_steps") or 0)
    if kind == "constant" or (kind == "constant_with_warmup" and rising >= 1):
        return "the learning rate is constant: this is the first part of the whole run"
    if kind == "constant_with_warmup":
        return f"the learning rate rises over the first {rising:.2g} of the steps, then is constant"
    return f"the learning rate ({kind}) falls to its end over these steps ({steps}), not over the whole recipe's"


def _too_small(
    recipe: Recipe, times: Times, limit_s: float, spent_s: float, held_out: int, given: Collection[str]
) -> GRPOLiteError:
    rows, _, evaluation_s = _least_evaluation(recipe, times, held_out, given)
    step_s = _mean_step_s(recipe, times, held_out)
    least_s = spent_s + RESERVE * (times.fixed_s(recipe) + step_s + evaluation_s)
    option = either("BUDGET=", "--budget ")
    return GRPOLiteError(
        f"{option}{brief(limit_s)}: too little for {recipe.name}. One step takes {duration(step_s)}, scoring {rows} "
        f"problems {duration(evaluation_s)}, start, warm-up and merge {duration(times.fixed_s(recipe))} "
        f"({times.source}), and a fifth is kept in reserve. The least is {option}{brief(least_s)}. "
        "merge=false or eval.enabled=false leaves a part out."
    )


def brief(seconds: float) -> str:
    """Return a time as `--budget` reads it, in whole minutes rounded up where it is not shorter than two.

    >>> brief(10800), brief(5430), brief(95), brief(600)
    ('3h', '1h31m', '95s', '10m')
    """
    if seconds < 120:
        return f"{math.ceil(seconds)}s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes or not hours else "")


def budget_lines(recipe: Recipe, budget: Budget) -> Iterator[str]:
    """Yield what was chosen for a budget, why, and how long it is expected to take."""
    times = budget.times
    completions = round(budget.steps * recipe.schedule.sampled_per_step)
    yield f"budget: {brief(budget.limit_s)} for everything, set-up of packages apart; times {times.source}"
    of = f" of {budget.whole_steps:,}" if budget.steps != budget.whole_steps else ""
    yield (
        f"budget: training: {budget.steps:,}{of} steps of {times.step_s:.3g} s, {completions:,} completions, "
        f"{duration(budget.training_s)}"
    )
    of = f" of {budget.whole_rows:,}" if budget.rows != budget.whole_rows else ""
    if recipe.eval.enabled:
        yield f"budget: evaluation: {budget.rows:,}{of} problems, {duration(budget.evaluation_s)}"
    counted = " (the warm-up is not counted)" if recipe.warmup and not times.warmup_s else ""
    before = f"; {duration(budget.spent_s)} of the budget have passed" if budget.spent_s >= 1 else ""
    yield f"budget: start, warm-up and merge: {duration(budget.fixed_s)}{counted}{before}"
    low, high = times.bounds(recipe, budget.expected_s - budget.spent_s)
    likely, whole = span(budget.spent_s + low, budget.spent_s + high), span(*times.bounds(recipe, budget.whole_s))
    yield f"budget: about {duration(budget.expected_s)} in all, within {likely}; the whole recipe: {whole}"
    if budget.expected_s <= budget.limit_s < budget.spent_s + high:
        yield "budget: should it not fit after all, training pauses in time to evaluate and merge"
    if budget.overrides:
        yield f"budget: chosen: {' '.join(budget.overrides)}"
    for note in budget.notes:
        yield f"budget: {note}"
