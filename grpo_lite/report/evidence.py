"""Evidence: what the run doctor looks at, and Finding, what it says. Arithmetic on a run's own files, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_lite.files.records import read_json_lines
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir
from rewards.facts import Reward, named

FEWEST = 4  # logged steps before anything about a trend is said
FLAT = 0.03  # a mean reward that moved by less has not moved
LATEST_FILES = 8  # files of completions that are looked into


@dataclass(frozen=True)
class Finding:
    """One thing the doctor says: a sentence with its figures, and the override that may mend it."""

    key: str
    sentence: str
    override: str | None = None  # for ARGS="…" of the next run; None: nothing on the line can mend it

    def line(self) -> str:
        """Return the finding as one line for a screen."""
        return f"doctor: {self.sentence}" + (f' Try: ARGS="{self.override}"' if self.override else "")


@dataclass(frozen=True)
class Evidence:
    """A run as far as it has come.

    Args:
        recipe: of the run.
        steps: the records of metrics.jsonl that have a reward (None where nothing could be scored), oldest first.
        completions: rows of the latest steps, oldest first: `completion`, `rewards`, `reward`, and where known
            `truncated`, `answer`.
        scores: metrics.json; empty while it trains.
        device: run.json's `device`.
    """

    recipe: Recipe
    steps: Sequence[Mapping[str, Any]]
    completions: Sequence[Mapping[str, Any]] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> list[float]:
        """Return a metric's finite values, oldest first; empty where it was never logged."""
        values = [record.get(key) for record in self.steps]
        return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]

    @property
    def window(self) -> int:
        """Steps that count as "at first" and as "of late": a quarter of the run, 2 to 10."""
        return min(10, max(2, len(self.steps) // 4))

    @property
    def last_step(self) -> int:
        """The step that was logged last; 0 before there is one."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def early(self, key: str) -> float:
        """Return a metric's mean over the first window; NaN where there are too few steps to speak of a trend."""
        values = self.series(key)
        return _mean(values[: self.window]) if len(values) >= FEWEST else math.nan

    def late(self, key: str) -> float:
        """Return a metric's mean over the last window; NaN where there are too few steps to speak of a trend."""
        values = self.series(key)
        return _mean(values[-self.window :]) if len(values) >= FEWEST else math.nan

    @property
    def parts(self) -> list[str]:
        """Names of the rewards, as TRL logs them, in the recipe's order."""
        return self.recipe.reward_names

    def function(self, index: int) -> Reward | None:
        """Return the function of a reward of ours, by its place in the recipe; None for other code, never imported."""
        return named(self.recipe.rewards[index].function)

    @property
    def main(self) -> str:
        """The metric of the first reward: the one that says whether an answer is right."""
        return f"rewards/{self.parts[0]}/mean"

    def rise(self, key: str) -> float:
        """Return how much a metric rose from the first to the last window; NaN where that is not known."""
        return self.late(key) - self.early(key)

    def rises(self, key: str) -> bool | None:
        """Tell whether a mean reward rose by more than FLAT and twice its standard error; None where unknown.

        TRL logs the standard deviation over the batch beside each reward's mean.
        """
        rise = self.rise(key)
        if math.isnan(rise):
            return None
        spread = self.late("reward_std" if key == "reward" else key.removesuffix("/mean") + "/std")
        each = self.recipe.schedule.batch * self.window
        error = 0.0 if math.isnan(spread) else spread * math.sqrt(2 / each)
        return rise > max(FLAT, 2 * error)

    def rows(self) -> list[Mapping[str, Any]]:
        """Return the completions of the last window of steps that were kept."""
        kept = sorted({row["step"] for row in self.completions})[-self.window :]
        return [row for row in self.completions if row["step"] in kept]

    def grpo(self, key: str, default: float) -> float:
        """Return a number of the recipe's `grpo:` section."""
        value = self.recipe.grpo.get(key)
        return default if value is None else float(value)


def read_evidence(run: RunDir) -> Evidence:
    """Return what a run's folder holds for the doctor.

    Raises:
        RunDirError: the folder is not a run, or its metrics.json is damaged.
    """
    recipe = run.load_recipe()
    files = sorted((run.path / "completions").glob("step_*.jsonl"))[-LATEST_FILES:]
    rows = [row for file in files for row in read_json_lines(file)]
    return Evidence(recipe, read_steps(run), rows, run.read_scores(), run.read_run().get("device") or {})


def read_steps(run: RunDir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl that tell of a step, oldest first."""
    return [record for record in read_json_lines(run.metrics_file) if "reward" in record and "step" in record]


def mean_of(rows: Sequence[Mapping[str, Any]], part: str | None = None) -> float:
    """Return the rows' mean reward, or that of one part; NaN without any."""
    values = [row["reward"] if part is None else row["rewards"].get(part) for row in rows]
    return _mean([float(value) for value in values if value is not None])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # a line cut by a kill


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, a cut last line left out."""
    if not run.metrics_file.is_file():
        return []
    lines = run.metrics_file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if _step(line) is not None]
