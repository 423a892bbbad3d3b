"""Schedule: what a recipe means in completions, micro-steps and optimizer steps. Torch-free.

Counted as TRL 1.14-1.16 and transformers count them. `Recipe.schedule` is the one place where the batch keys of `grpo`
are read and multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_lite.errors import GRPOLiteError


@dataclass(frozen=True)
class Schedule:
    """The batch keys of one training, resolved."""

    group: int  # completions of one prompt: num_generations
    rows: int  # completions in one micro-step of one process: per_device_train_batch_size
    accumulation: int  # micro-steps in an optimizer step: gradient_accumulation_steps
    batch: int  # completions generated in a round
    iterations: int  # optimizer passes over a round: num_iterations
    max_steps: int  # optimizer steps; 0 or less: counted from the epochs
    epochs: float

    @classmethod
    def of(cls, grpo: Mapping[str, Any]) -> Schedule:
        """Return the schedule of a recipe's `grpo` section, its defaults filled in."""
        rows, accumulation = int(grpo["per_device_train_batch_size"]), int(grpo["gradient_accumulation_steps"])
        generation_steps = int(grpo.get("steps_per_generation") or accumulation)
        return cls(
            group=int(grpo["num_generations"]),
            rows=rows,
            accumulation=accumulation,
            batch=int(grpo.get("generation_batch_size") or rows * generation_steps),
            iterations=int(grpo.get("num_iterations") or 1),
            max_steps=int(grpo.get("max_steps") or -1),
            epochs=float(grpo.get("num_train_epochs", 3)),
        )

    @property
    def prompts_per_round(self) -> int:
        """Groups in a round of generation."""
        return self.batch // self.group

    @property
    def trained_per_step(self) -> int:
        """Completions that go through forward and backward in an optimizer step."""
        return self.rows * self.accumulation

    @property
    def sampled_per_step(self) -> float:
        """Completions generated for an optimizer step: a round that is trained on several times costs less."""
        return self.trained_per_step / self.iterations

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps that train on one round, the last one possibly in part."""
        return max(1, math.ceil(self.batch // max(1, self.rows) * self.iterations / max(1, self.accumulation)))

    def steps(self, prompts: int) -> int:
        """Return how many optimizer steps the training takes over so many training prompts."""
        if self.max_steps > 0:
            return self.max_steps
        rounds = max(1, prompts // max(1, self.prompts_per_round))
        micro_steps = rounds * self.iterations * max(1, self.batch // self.rows)
        return math.ceil(self.epochs * max(1, math.ceil(micro_steps / self.accumulation)))


def share_of_batch(grpo: Mapping[str, Any], world: int) -> dict[str, int]:
    """Return GRPOConfig's batch keys for one of `world` processes, so that all together train the recipe's batch.

    Raises:
        GRPOLiteError: the batch cannot be divided into whole groups.
    """
    if world == 1:
        return {}
    whole = Schedule.of(grpo)
    divisible = whole.batch % world == 0 and whole.batch // world % whole.group == 0
    keys = ("generation_batch_size", "steps_per_generation")
    if not divisible or any(grpo.get(key) for key in keys):
        raise GRPOLiteError(
            f"GPUS={world}: a round of {whole.batch} completions (per_device_train_batch_size × "
            f"gradient_accumulation_steps) must be whole groups of {whole.group} for each process, without "
            f"{' or '.join(keys)}. Set grpo.gradient_accumulation_steps to a multiple of {world}."
        )
    if whole.accumulation % world == 0:
        return {"gradient_accumulation_steps": whole.accumulation // world}
    if whole.rows % world == 0:
        return {"per_device_train_batch_size": whole.rows // world}
    raise GRPOLiteError(
        f"GPUS={world}: neither gradient_accumulation_steps={whole.accumulation} nor "
        f"per_device_train_batch_size={whole.rows} is a multiple of {world}, so the batch cannot be shared. Change one "
        "of them."
    )
