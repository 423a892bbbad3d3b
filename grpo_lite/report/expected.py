"""Is this run going as it should? Its curve or score against the band of `expected:`, and why it may be below."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo_lite.errors import RecipeError
from grpo_lite.recipe.expected import Expected
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe, values_by_key
from grpo_lite.report import diagnoses
from grpo_lite.report.evidence import Evidence, Finding

WINDOW = 3  # logged steps whose mean is compared, so that one batch decides nothing
_PATIENCE = 3  # such means in a row outside before it counts
_ELSEWHERE = (
    "name",
    "description",
    "least_gpu",
    "seed",
    "expected",
    "limits",
    "log",
    "eval",
    "check",
    "memory",
    "merge",
)
_NO_MATTER = ("save_steps", "save_total_limit", "logging_steps", "report_to", "gradient_checkpointing")
# Findings that explain a run below its band, the likeliest first.
_REASONS = (
    diagnoses.zero_reward, diagnoses.unusable_golds, diagnoses.learning_rate_too_low, diagnoses.truncation,
    diagnoses.kl_blow_up, diagnoses.grad_norm_spikes, diagnoses.entropy_collapse, diagnoses.equal_groups,
    diagnoses.format_up_accuracy_flat, diagnoses.length_collapse,
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Args:
        step: of the latest value.
        value: a mean over the last steps, or a score.
        low, high: the band there.
        margin: by how much the value may be wrong, for a score: half its interval.
        since: the step since which it is outside without a break; None: inside, or outside only just now.
    """

    step: int
    value: float
    low: float
    high: float
    margin: float = 0.0
    since: int | None = None

    @property
    def below(self) -> bool:
        return self.since is not None and self.value < self.low

    @property
    def above(self) -> bool:
        return self.since is not None and self.value > self.high

    @property
    def place(self) -> str:
        """Where the value lies, in few words; at the edge: not in the band, and not surely outside."""
        return "below" if self.below else "above" if self.above else "at the edge" if self.outside_by else "inside"

    @property
    def outside_by(self) -> float:
        """By how much the value is outside the band; 0 inside."""
        return max(self.low - self.value, self.value - self.high, 0.0)


def smoothed(e: Evidence, metric: str) -> list[tuple[int, float]]:
    """Return a metric's mean over the last three logged steps, at each step that has three."""
    known = [(int(record["step"]), float(record[metric])) for record in e.steps if _is_number(record.get(metric))]
    windows = [known[i - WINDOW : i] for i in range(WINDOW, len(known) + 1)]
    return [(window[-1][0], sum(value for _, value in window) / WINDOW) for window in windows]


def measured(e: Evidence, expected: Expected) -> list[tuple[int, float, float]]:
    """Return the run's values to compare: step, value, margin."""
    if not expected.of_scores:
        return [(step, value, 0.0) for step, value in smoothed(e, expected.metric)]
    part = e.scores.get(expected.metric.partition("/")[2]) or e.scores.get("lenient") or {}
    columns = [(0, "base"), (e.last_step, "trained")]
    return [
        (step, rate["rate"], (rate["high"] - rate["low"]) / 2) for step, name in columns if (rate := part.get(name))
    ]


def standing(e: Evidence) -> Standing | None:
    """Return where a run stands, None without a band or without a value within it."""
    expected = e.recipe.expected
    if expected is None:
        return None
    latest: Standing | None = None
    run: list[int] = []  # the steps of the present stretch outside
    side = 0
    for step, value, margin in measured(e, expected):
        band = expected.band_at(step)
        if band is None or (expected.of_scores and step == 0 and e.last_step):
            continue
        low, high = band
        now = -1 if value + margin < low else 1 if value - margin > high else 0
        run = [*run, step] if now and now == side else [step] if now else []
        side = now
        counts = len(run) >= (1 if expected.of_scores else _PATIENCE)
        latest = Standing(step, value, low, high, margin, run[0] if counts else None)
    return latest


def band_text(e: Evidence) -> str | None:
    """Return the band at the last step, as a piece of a line; None without one."""
    expected = e.recipe.expected
    if expected is None or expected.of_scores or (band := expected.band_at(e.last_step)) is None:
        return None
    return f"expected {band[0]:.2f} to {band[1]:.2f}"


def standing_line(e: Evidence) -> str | None:
    """Return one line: inside, at the edge of or outside the band, and by how much; None where nothing is known yet."""
    found, expected = standing(e), e.recipe.expected
    if found is None or expected is None:
        return None
    where = f"{expected.metric} {found.value:.3f} at step {found.step}, expected {found.low:.3f} to {found.high:.3f}"
    by = f", {found.outside_by:.3f} {'below' if found.value < found.low else 'above'}" if found.outside_by else ""
    place = {"inside": "inside", "at the edge": "at the edge of"}.get(found.place, "outside")
    sure = " (in too few steps in a row to count)" if found.place == "at the edge" else ""
    if found.margin:
        sure = f" (its own interval is ± {found.margin:.3f})"
    return f"{place} the band{by}: {where}{sure}; {expected.cited}"


def below_expected(e: Evidence) -> Finding | None:
    """The run is below the band of its recipe's `expected:`; the finding names the likeliest reason."""
    found = standing(e)
    if found is None or not found.below:
        return None
    assert e.recipe.expected is not None
    since = "" if e.recipe.expected.of_scores else f" since step {found.since}"
    start = (
        f"Below the band{since}: {e.recipe.expected.metric} is {found.value:.3f}, expected {found.low:.3f} to "
        f"{found.high:.3f} ({e.recipe.expected.cited})"
    )
    changes = list(changed_keys(e.recipe))
    if changes:
        shown = ", ".join(f"{key} is {ours} and not {theirs}" for key, ours, theirs in changes[:3])
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        key, _, theirs = changes[0]
        return Finding(
            "below_expected",
            f"{start}. The run differs from the recipe that the band is for: {shown}{more}.",
            f"{key}={theirs if isinstance(theirs, str) else json.dumps(theirs)}" if " " not in str(theirs) else None,
        )
    for find in _REASONS:
        if reason := find(e):
            sentence = reason.sentence.rstrip(".")
            return Finding("below_expected", f"{start}. The likeliest reason: {sentence}.", reason.override)
    return Finding(
        "below_expected",
        f"{start}. Nothing else is wrong in the metrics, so another seed may tell.",
        f"seed={e.recipe.seed + 1}",
    )


def changed_keys(recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys in which a run's recipe differs from the shipped one of its name: key, its value, the shipped one.

    Only keys that change what is learned; the learning rate first.
    """
    original = _original(recipe.name)
    if original is None or original.expected != recipe.expected:
        return
    ours, theirs = _learned_from(recipe), _learned_from(original)
    keys = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    for key in sorted(keys, key=lambda key: (key != "grpo.learning_rate", not key.startswith("grpo."))):
        yield key, ours.get(key), theirs.get(key)


def _original(name: str) -> Recipe | None:
    try:
        return load_recipe(name)
    except RecipeError:
        return None


def _learned_from(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe that change what is learned, by key."""
    flat = values_by_key(recipe.model_dump(mode="json", exclude=set(_ELSEWHERE)))
    return {key: value for key, value in flat.items() if key.rpartition(".")[2] not in _NO_MATTER}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e300
