"""Held-out scores while training: every `eval.every` steps, greedily, without touching the training's randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from grpo_lite.errors import RewardError
from grpo_lite.evaluation.evaluate import greedy_only, score_model
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.episodes import make_player
from grpo_lite.task.prompts import Prompts


class HeldOutScore(TrainerCallback):
    """Score held-out prompts every few steps, and log `heldout/lenient` and `heldout/strict` with the step's metrics.

    Args:
        trainer: whose model is scored; set it before training.
        prompts: the first `eval.every_limit` held-out rows are used, the same ones each time.
        show: gets a line when a reward fails or hangs on them: that score is missing then, and training continues.
    """

    def __init__(self, recipe: Recipe, prompts: Prompts, trainer: Any, show: Callable[[str], None]) -> None:
        self.recipe = greedy_only(recipe)
        self.tokenizer, self.trainer, self.show = prompts.tokenizer, trainer, show
        self.rows = prompts.eval[: recipe.eval.every_limit]
        self.player = make_player(prompts, recipe, show)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = state.global_step % self.recipe.eval.every == 0 or state.global_step == state.max_steps
        if not due:
            return
        try:
            with self.trainer.journal.spending("heldout"):
                records = score_model(
                    self.trainer.model, self.tokenizer, self.recipe, self.rows, lambda line: None, "trained",
                    self.player,
                )  # fmt: skip
                if self.player is not None:
                    self.player.release()
        except RewardError as error:
            self.trainer.faults.counts["unscored_heldout"] += 1
            self.show(f"held-out score of step {state.global_step} left out: {error}")
            return
        usable = [record for record in records if record["lenient"] is not None]
        for kind in ("lenient", "strict") if usable else ():
            rate = sum(bool(record[kind]) for record in usable) / len(usable)
            self.trainer.journal.log_with_step(f"heldout/{kind}", rate)
