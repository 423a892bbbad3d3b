"""Several processes under `accelerate launch`: who this one is, and what only the first does. Torch-free.

Data parallel: every process trains the same adapter on its share of each round, and gradients are averaged. The first
one owns the run directory, the screen, the evaluation and the merge.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ranks:
    """This process among those of a launch."""

    rank: int = 0
    local: int = 0  # on this machine: the number of its card
    world: int = 1
    here: int = 1  # of them, those on this machine

    @property
    def is_first(self) -> bool:
        """Whether this process owns the run directory."""
        return self.rank == 0

    @property
    def is_on_one_machine(self) -> bool:
        """Whether all processes run on this machine."""
        return self.here == self.world

    def shown(self, show: Callable[[str], None]) -> Callable[[str], None]:
        """Return what this process shows: all of it in the first one, else only what that one cannot know."""

        def only_faults(line: str) -> None:
            if line.startswith("reward "):  # a reward failed here
                show(f"process {self.rank + 1}: {line}")

        return show if self.is_first else only_faults


def this_process() -> Ranks:
    """Return who this process is, as the launcher says."""
    rank, local, world, here = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    return Ranks(rank, local, world, here)


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
