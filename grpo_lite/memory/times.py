"""Times: how long the parts of a run take, measured by a probe of this very recipe or estimated. Torch-free.

Place in the line: beside the plan of memory, and beneath `budget`. The probe's figures are kept in the user's cache, by
the settings that a step's time depends on. How many steps and evaluated problems there are is counted from the recipe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from grpo_lite.commands import hint
from grpo_lite.files.cache import keep_record, kept_record
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.units import duration, now

# Reading, rounding, writing and twice verifying a merge, on a slow machine.
MERGE_BYTES_PER_S = 25e6
MERGE_SETUP_S = 30.0
START_S = 60.0  # reading weights, data and libraries, where it was not measured
MEASURED_RANGE = (0.8, 1.25)  # lengths change while a model learns
FIXED_RANGE = (0.5, 1.2)  # of start and merge, which are counted from above
# Rows of published test sets, so that a plan can count them without loading anything.
TEST_ROWS = {
    ("openai/gsm8k", "test"): 1319,
    ("HuggingFaceH4/MATH-500", "test"): 500,
    ("google-research-datasets/mbpp", "test"): 500,
    ("DigitalLearningGmbH/MATH-lighteval", "test"): 5000,
    ("HuggingFaceH4/aime_2024", "train"): 30,
}
_SLICE = re.compile(r"\w+\[(\d+):(\d+)\]")  # rows of a split, as datasets writes them

# What a step's time depends on; of `grpo` and `eval` without the keys that only say how often and how fast.
_TIMED = {"model", "lora", "data", "rewards", "grpo", "compute", "rollout", "memory", "sampling", "eval", "seed"}
_COUNTS = {
    "grpo": ("max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "save_steps"),
    "eval": ("enabled", "limit", "samples", "every", "every_limit", "also"),
}
_KEPT = (
    "step_s",
    "steps",
    "completion_s",
    "held_out",
    "token_s",
    "tokens_per_s",
    "truncated",
    "start_s",
)


@dataclass(frozen=True)
class Times:
    """Seconds of a run's parts."""

    step_s: float  # an optimizer step of GRPO: rollout, rewards, forward and backward
    completion_s: float  # an evaluated completion, generated among many
    merge_s: float
    source: str  # how they are known, for people
    is_estimate: bool
    range: tuple[float, float]  # factors from training and evaluation to the shortest and longest that is expected
    warmup_s: float = 0.0
    start_s: float = START_S
    truncated: tuple[tuple[int, float], ...] = ()  # share of completions that reach a length

    def fixed_s(self, recipe: Recipe) -> float:
        """Return what no number of steps changes: the start, the warm-up and the merge."""
        return self.start_s + self.warmup_s + self.merge_s * recipe.most_merges

    def evaluation_s(self, recipe: Recipe, rows: int) -> float:
        """Return the seconds of scoring base, warm, trained and merged models on so many held-out rows, at most."""
        merged = rows * recipe.most_merges if recipe.eval.enabled else 0
        return self.completion_s * (recipe.evaluated_completions(rows) + merged)

    def training_s(self, recipe: Recipe, steps: int, rows: int) -> float:
        """Return the seconds of so many steps, held-out scores between them included."""
        scores = steps // recipe.eval.every if recipe.eval.every else 0
        return steps * self.step_s + scores * min(rows, recipe.eval.every_limit) * self.completion_s

    def run_s(self, recipe: Recipe, steps: int, rows: int) -> float:
        """Return the seconds of a whole run."""
        return self.fixed_s(recipe) + self.training_s(recipe, steps, rows) + self.evaluation_s(recipe, rows)

    def bounds(self, recipe: Recipe, run_s: float) -> tuple[float, float]:
        """Return the shortest and the longest time that is expected of a run that likely takes `run_s`."""
        fixed_s = self.fixed_s(recipe)
        low, high = (
            fixed_s * fixed + (run_s - fixed_s) * rest for fixed, rest in zip(FIXED_RANGE, self.range, strict=True)
        )
        return low, high


def held_out_rows(recipe: Recipe) -> int | None:
    """Return how many held-out rows the recipe evaluates on, as far as it says so itself; None: not known."""
    if not recipe.eval.enabled:
        return 0
    source, holdout = recipe.data.eval, recipe.data.holdout
    if source is None:
        rows = int(holdout) if holdout >= 1 else None
    else:
        part = _SLICE.fullmatch(source.split)
        counted = int(part[2]) - int(part[1]) if part else TEST_ROWS.get((source.hub or "", source.split))
        rows = source.limit or counted or source.kwargs.get("size")
    limit = recipe.eval.limit
    return limit if rows is None else min(int(rows), limit or int(rows))


def merge_seconds(base_bytes: float) -> float:
    """Return what a merge into a 16-bit base of this size takes, from above."""
    return MERGE_SETUP_S + base_bytes / MERGE_BYTES_PER_S


def keep_times(recipe: Recipe, device: str, probe: dict[str, Any]) -> None:
    """Keep a probe's figures for `plan` and `--budget`; a cache that cannot be written costs nothing."""
    record = {**{key: probe[key] for key in _KEPT if key in probe}, "device": device, "measured_at": now()}
    keep_record("probes", _settings(recipe), record)


def kept_times(recipe: Recipe) -> dict[str, Any]:
    """Return the figures of the last probe of this recipe, whatever its number of steps; empty if there is none."""
    return kept_record("probes", _settings(recipe))


def measured_times(
    recipe: Recipe, device: str | None, base_bytes: float, warmup_tokens: int | None = None, train_rows: int = 0
) -> Times | None:
    """Return the times that a probe measured; None where there was none, or on another device.

    Args:
        recipe: the recipe.
        device: its name; None: any.
        base_bytes: of the 16-bit base, for the merge.
        warmup_tokens: that the warm-up trains on; None: as far as the recipe says so.
        train_rows: training prompts, which a warm-up samples from; 0: as far as the recipe says so.
    """
    record = kept_times(recipe)
    try:
        if device is not None and record["device"] != device:
            return None
        return Times(
            step_s=float(record["step_s"]),
            completion_s=float(record["completion_s"]),
            merge_s=merge_seconds(base_bytes),
            source=f"measured by the probe on {record['device']}, {record['measured_at']}",
            is_estimate=False,
            range=MEASURED_RANGE,
            warmup_s=_warmup_seconds(recipe, record, warmup_tokens, train_rows),
            start_s=float(record.get("start_s") or START_S),
            truncated=tuple((int(length), float(share)) for length, share in record["truncated"].items()),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def warmup_tokens_trained(recipe: Recipe) -> int:
    """Return the tokens that the warm-up trains on; by `epochs` they follow from its rows, and 0 is returned."""
    return recipe.warmup.steps * recipe.warmup.tokens_per_step if recipe.warmup and recipe.warmup.steps else 0


def _warmup_seconds(recipe: Recipe, record: dict[str, Any], tokens: int | None, train_rows: int) -> float:
    sampled = 0
    if recipe.warmup and recipe.warmup.source == "self":
        sampled = (recipe.warmup.prompts or train_rows) * recipe.warmup.samples
    trained = warmup_tokens_trained(recipe) if tokens is None else tokens
    return trained * float(record["token_s"]) + sampled * float(record["completion_s"])


def time_line(recipe: Recipe) -> str:
    """Return how long a step and the run take by the last probe of this recipe, or how to find out."""
    try:
        record = kept_times(recipe)
        steps = recipe.schedule.max_steps if recipe.schedule.max_steps > 0 else int(record["steps"])
        evaluation_s = float(record["completion_s"]) * recipe.evaluated_completions(int(record["held_out"]))
        return (
            f"time: a step about {record['step_s']:.3g} s, {steps} steps about {duration(steps * record['step_s'])}, "
            f"evaluation about {duration(evaluation_s)}; probed on {record['device']} {record['measured_at']}"
        )
    except (ValueError, KeyError, TypeError):
        return f"time: not probed yet; on the machine that will train: {hint('probe', recipe=recipe.name)} (minutes)"


def _settings(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.model_dump(mode="json", include=_TIMED)
    for section, keys in _COUNTS.items():
        settings[section] = {key: value for key, value in settings[section].items() if key not in keys}
    return settings
