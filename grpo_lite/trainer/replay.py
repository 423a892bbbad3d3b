"""`Replay`: groups of the last steps, kept to take the place of groups whose rewards are all equal.

Such a group has no advantage and teaches nothing; `refill.py` generates further ones, here an earlier one is trained on
once more. Its tokens keep their advantages and the log-probabilities noted when they were sampled, so the loss weighs
and clips them by their importance ratio, as it does from the second of several iterations on (`num_iterations`).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo_lite.trainer.prompts import KNOWN_KEYS, groups_without_signal, refill_batch, require_group_advantages

logger = logging.getLogger(__name__)
STATE_FILE = "replay.safetensors"


@dataclass(frozen=True)
class Kept:
    """A group with a signal."""

    step: int  # the optimizer step before which it was sampled
    rows: dict[str, Tensor]  # (G, …) each, on the CPU


class Replay:
    """The kept groups of one training.

    Raises:
        ValueError: advantages depend on more than the group.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.kept: list[Kept] = []  # oldest first
        self._has_warned = False
        if trainer.options.replay:
            require_group_advantages("replay", trainer.scale_rewards, trainer.multi_objective_aggregation)

    def fill(self, output: dict[str, Any]) -> dict[str, Any]:
        """Replace groups without a signal in a scored round by kept ones, the newest first, each at most once.

        Args:
            output: of TRL's `_generate_and_score_completions`; `sampled_logps` `(B, C)` is taken out of it.
        """
        trainer, noted = self.trainer, output.pop("sampled_logps", None)
        if not trainer.options.replay or not trainer.model.training:
            return output
        logps = output.get("old_per_token_logps", noted)
        if logps is None or not output.keys() <= KNOWN_KEYS:
            if not self._has_warned:
                logger.warning("Replay is off: this rollout does not note the tokens' log-probabilities.")
                self._has_warned = True
            return output
        step, size = trainer.state.global_step, trainer.num_generations
        usable = [group for group in self.kept if step - group.step <= trainer.options.replay]
        dead = groups_without_signal(output["advantages"], size)
        alive = sorted(set(range(len(output["advantages"]) // size)) - set(dead))
        scored = {**output, "old_per_token_logps": logps}
        fresh = [Kept(step, _cut(scored, group, size)) for group in alive]
        chosen = usable[::-1][: len(dead)]
        for group, kept in zip(dead, chosen, strict=False):
            into, device = range(group * size, (group + 1) * size), logps.device
            rows = {key: value.to(device) for key, value in kept.rows.items()}
            scored = refill_batch(scored, into, rows, range(size), int(trainer._tokenizer.pad_token_id))
        self.kept = usable[: len(usable) - len(chosen)] + fresh
        metrics = trainer._metrics["train"]
        metrics["replay/groups"].append(float(len(chosen)))
        if chosen:
            metrics["replay/age"].append(sum(step - kept.step for kept in chosen) / len(chosen))
        return scored if chosen else output

    # Checkpoints

    def save(self, folder: Path) -> None:
        """Write the kept groups into a checkpoint."""
        if not self.trainer.options.replay or not self.trainer.args.should_save:
            return
        tensors = {f"{i}.{key}": value for i, kept in enumerate(self.kept) for key, value in kept.rows.items()}
        save_file(tensors, folder / STATE_FILE, {"steps": json.dumps([kept.step for kept in self.kept])})

    def load(self, folder: Path) -> None:
        """Continue with the groups of a checkpoint; one without them (`replay` was off) leaves none."""
        if not self.trainer.options.replay or not (folder / STATE_FILE).is_file():
            return
        with safe_open(folder / STATE_FILE, "pt") as file:
            steps = json.loads(file.metadata()["steps"])
            rows: list[dict[str, Tensor]] = [{} for _ in steps]
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                number, key = name.split(".", 1)
                rows[int(number)][key] = file.get_tensor(name)
        self.kept = [Kept(step, tensors) for step, tensors in zip(steps, rows, strict=True)]


def _cut(scored: dict[str, Any], group: int, size: int) -> dict[str, Tensor]:
    """Return one group's rows of each tensor, on the CPU and apart from the batch."""
    rows = slice(group * size, (group + 1) * size)
    return {key: value[rows].detach().cpu().clone() for key, value in scored.items() if key != "num_items_in_batch"}
