"""Several processes under `accelerate launch`: who this one is, and what only the first does. Torch-free.

Data parallel: every process trains the same adapter on its share of each round, and gradients are averaged. The first
one owns the run directory, the screen, the evaluation and the merge.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from grpo_lite.errors import GRPOLiteError
from grpo_lite.recipe import Recipe


@dataclass(frozen=True)
class Ranks:
    """This process among those of a launch."""

    rank: int = 0
    local: int = 0  # on this machine: the number of its card
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process owns the run directory."""
        return self.rank == 0


def this_process() -> Ranks:
    """Return who this process is, as the launcher says."""
    given = os.environ
    return Ranks(int(given.get("RANK", 0)), int(given.get("LOCAL_RANK", 0)), int(given.get("WORLD_SIZE", 1)))


def share_of_batch(recipe: Recipe, world: int) -> dict[str, int]:
    """Return GRPOConfig's batch keys for one of `world` processes, so that all together train the recipe's batch.

    Raises:
        GRPOLiteError: the recipe's batch cannot be divided into whole groups.
    """
    rows = int(recipe.grpo.get("per_device_train_batch_size", 8))
    accumulation = int(recipe.grpo.get("gradient_accumulation_steps", 1))
    if world == 1:
        return {}
    local = recipe.generation_batch // world
    whole = recipe.generation_batch % world == 0 and local % recipe.num_generations == 0
    keys = ("generation_batch_size", "steps_per_generation")
    if not whole or any(recipe.grpo.get(key) for key in keys):
        raise GRPOLiteError(
            f"GPUS={world}: a round of {recipe.generation_batch} completions (per_device_train_batch_size × "
            f"gradient_accumulation_steps) has to be whole groups of {recipe.num_generations} for each process, "
            f"without {' or '.join(keys)}. Set grpo.gradient_accumulation_steps to a multiple of {world}."
        )
    if accumulation % world == 0:
        return {"gradient_accumulation_steps": accumulation // world}
    if rows % world == 0:
        return {"per_device_train_batch_size": rows // world}
    raise GRPOLiteError(
        f"GPUS={world}: neither gradient_accumulation_steps={accumulation} nor per_device_train_batch_size={rows} is a "
        f"multiple of {world}, so the batch cannot be shared. Change one of them."
    )


def agree(value: Any, ranks: Ranks) -> Any:
    """Return the first process's value in all of them; also the point where they wait for each other."""
    if ranks.world == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState()
    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]
