"""Evidence, which the run doctor looks at, and Finding, which it reports: arithmetic on a run's files, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_lite.commands import hint_overrides
from grpo_lite.files.records import read_json_lines
from grpo_lite.recipe.recipe import Recipe, RewardSection
from grpo_lite.rewards.facts import Reward, named
from grpo_lite.runs.run_dir import RunDir

FEWEST = 4  # logged steps before the doctor judges a trend
FLAT = 0.03  # a mean reward that moved by less has not moved
LATEST_FILES = 8  # files of completions that are read
_MEAN = re.compile("rewards/[^/]+/mean")
WARMUP, GRPO = "warmup", "grpo"  # `stage` of a record; those of older runs have none and are GRPO's


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor reports: a sentence with its figures, and the override that may fix it."""

    key: str
    sentence: str
    override: str | None = None  # `key=value` for the next run; None: no override can fix it

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Finding:
        """Return the finding of a line of findings.jsonl."""
        return cls(record["key"], record["sentence"], record.get("override"))

    def line(self) -> str:
        """Return the finding as one line for a screen."""
        return f"doctor: {self.sentence}" + (f" Try: {hint_overrides(self.override)}" if self.override else "")


@dataclass(frozen=True)
class Evidence:
    """A run so far.

    Args:
        recipe: of the run.
        steps: the records of metrics.jsonl that have a reward (None where nothing could be scored), oldest first.
        completions: rows of the latest steps, oldest first: `completion`, `rewards`, `reward`, and where known
            `truncated`, `answer`.
        scores: metrics.json; empty while it trains.
        device: run.json's `device`.
        warmup_steps: the records of metrics.jsonl from the warm-up, oldest first.
        warmup: run.json's `warmup`; empty without one.
    """

    recipe: Recipe
    steps: Sequence[Mapping[str, Any]]
    completions: Sequence[Mapping[str, Any]] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    warmup_steps: Sequence[Mapping[str, Any]] = ()
    warmup: Mapping[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> list[float]:
        """Return a metric's finite values, oldest first; empty where it was never logged."""
        return _finite(self.steps, key)

    def warmup_series(self, key: str) -> list[float]:
        """Return the finite values of one of the warm-up's metrics, oldest first."""
        return _finite(self.warmup_steps, key)

    @property
    def warmup_step(self) -> int:
        """The last logged step of the warm-up; 0 without any."""
        return int(self.warmup_steps[-1]["step"]) if self.warmup_steps else 0

    @property
    def warmup_total(self) -> int:
        """How many steps the warm-up takes; while that is not known, the last logged step."""
        return int(self.warmup.get("max_steps") or self.warmup_step)

    @property
    def window(self) -> int:
        """How many steps count as early and as late: a quarter of the run, 2 to 10."""
        return min(10, max(2, len(self.steps) // 4))

    @property
    def last_step(self) -> int:
        """The last logged step; 0 before there is one."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def early(self, key: str) -> float:
        """Return a metric's mean over the first window; NaN if there are too few steps for a trend."""
        values = self.series(key)
        return mean(values[: self.window]) if len(values) >= FEWEST else math.nan

    def late(self, key: str) -> float:
        """Return a metric's mean over the last window; NaN if there are too few steps for a trend."""
        values = self.series(key)
        return mean(values[-self.window :]) if len(values) >= FEWEST else math.nan

    @property
    def parts(self) -> list[str]:
        """Names of the rewards, as TRL logs them, in the recipe's order; then what environments pay themselves."""
        own = self.recipe.reward_names
        if self.recipe.environment is None:
            return own
        logged = dict.fromkeys(key.split("/")[1] for step in self.steps for key in step if _MEAN.fullmatch(key))
        more = [name for name in logged if name not in own]
        return [*own, *more] or ["get_reward"]  # before the first step

    def function(self, index: int) -> Reward | None:
        """Return the function of one of our rewards, by its index in the recipe; None for other code."""
        section = self.section(index)
        return None if section is None else named(section.function)

    def section(self, index: int) -> RewardSection | None:
        """Return the recipe's section of a part; None where an environment pays it."""
        return self.recipe.rewards[index] if index < len(self.recipe.rewards) else None

    @property
    def main(self) -> str:
        """The metric of the first reward: the one that says whether an answer is right."""
        return f"rewards/{self.parts[0]}/mean"

    def rise(self, key: str) -> float:
        """Return how much a metric rose from the first to the last window; NaN if unknown."""
        return self.late(key) - self.early(key)

    def rises(self, key: str) -> bool | None:
        """Return whether a mean reward rose by more than FLAT and twice its standard error; None if unknown.

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
        """Return the saved completions of the last window of steps."""
        kept = sorted({row["step"] for row in self.completions})[-self.window :]
        return [row for row in self.completions if row["step"] in kept]

    def grpo(self, key: str, default: float) -> float:
        """Return a number of the recipe's `grpo:` section."""
        value = self.recipe.grpo.get(key)
        return default if value is None else float(value)


def read_evidence(run: RunDir) -> Evidence:
    """Read a run's evidence from its folder.

    Raises:
        RunDirError: the folder is not a run, or its metrics.json is damaged.
    """
    recipe = run.load_recipe()
    files = sorted((run.path / "completions").glob("step_*.jsonl"))[-LATEST_FILES:]
    rows = [row for file in files for row in read_json_lines(file)]
    record, warm = run.read_run(), read_warmup_steps(run)
    device, warmup = record.get("device") or {}, record.get("warmup") or {}
    return Evidence(recipe, read_steps(run), rows, run.read_scores(), device, warm, warmup)


def read_steps(run: RunDir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl that describe a step of GRPO, oldest first."""
    return [record for record in read_metrics(run) if "reward" in record and record.get("stage") != WARMUP]


def read_warmup_steps(run: RunDir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl that describe a step of the warm-up, oldest first; empty without one."""
    return [record for record in read_metrics(run) if record.get("stage") == WARMUP and "loss" in record]


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Return all records of metrics.jsonl, oldest first, without a last line that a kill cut off."""
    return [record for record in read_json_lines(run.metrics_file) if "step" in record]


def mean_of(rows: Sequence[Mapping[str, Any]], part: str | None = None) -> float:
    """Return the rows' mean reward, or that of one part; NaN without any."""
    values = [row["reward"] if part is None else row["rewards"].get(part) for row in rows]
    return mean([float(value) for value in values if value is not None])


def mean(values: Sequence[float]) -> float:
    """Return the values' mean; NaN without any."""
    return sum(values) / len(values) if values else math.nan


def _finite(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    values = [record.get(key) for record in records]
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
