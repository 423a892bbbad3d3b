"""`expected:` in a recipe: the curve or score that somebody has measured with it, as a band."""

from __future__ import annotations

import itertools
import math
import re

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_METRIC = re.compile(r"reward|rewards/[\w.-]+/mean|heldout/(lenient|strict)|score/(lenient|strict)")


class Expected(BaseModel):
    """A result to stand beside, and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1, description="Who measured it, and in which table, log or figure.")
    published: str | None = Field(None, description="The published figure, such as `54.3 % of GSM8K's test`.")
    measured: str | None = Field(None, description="What this recipe gave here; null: it has not been run yet.")
    link: str | None = Field(None, description="Address of the source.")
    model: str = Field(min_length=1, description="The model of the source.")
    hardware: str = Field(min_length=1, description="The hardware of the source.")
    metric: str = Field(
        "reward",
        description="What the points are: a metric of training (`reward`, a reward's mean, `heldout/lenient`), or "
        "`score/lenient` or `score/strict`, the score on held-out prompts before (step 0) and after training.",
    )
    points: list[tuple[int, float, float]] = Field(
        min_length=1, description="`[step, low, high]`, steps growing; the band between them is straight."
    )
    deviations: list[str] = Field(default_factory=list, description="Where the recipe differs from its source.")

    @field_validator("link")
    @classmethod
    def _an_address(cls, link: str | None) -> str | None:
        if link is not None and not link.startswith("https://"):
            raise ValueError(f"{link!r} is given; write an address that begins with https://")
        return link

    @field_validator("metric")
    @classmethod
    def _a_known_metric(cls, metric: str) -> str:
        if not _METRIC.fullmatch(metric):
            raise ValueError(
                f"{metric!r} is given; allowed are reward, rewards/NAME/mean, heldout/lenient, heldout/strict, "
                "score/lenient and score/strict"
            )
        return metric

    @model_validator(mode="after")
    def _points_in_order(self) -> Expected:
        for step, low, high in self.points:
            if step < 0 or not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"points: [{step}, {low}, {high}] is given; write [step, low, high] with low <= high")
        steps = [step for step, _, _ in self.points]
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"points: the steps are {steps}; each must be larger than the one before")
        return self

    @property
    def cited(self) -> str:
        """The source and its figure, for a line of text."""
        return f"{self.source}: {self.published}" if self.published else self.source

    @property
    def of_scores(self) -> bool:
        """Whether the points are held-out scores, before and after training, and no curve."""
        return self.metric.startswith("score/")

    def band_at(self, step: int) -> tuple[float, float] | None:
        """Return the band at a step; None outside its points, except that a final score's band holds later too."""
        before = [point for point in self.points if point[0] <= step]
        after = [point for point in self.points if point[0] >= step]
        if not before:
            return None
        if not after:
            return before[-1][1:] if self.of_scores else None
        (a, low_a, high_a), (b, low_b, high_b) = before[-1], after[0]
        share = (step - a) / (b - a) if b > a else 0.0
        return low_a + share * (low_b - low_a), high_a + share * (high_b - high_a)
