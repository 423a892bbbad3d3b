"""Faults in the second of two processes only, a kind a step; run by test_parallel.py, not by pytest."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Any

import torch

from grpo_lite.engine.options import EngineOptions
from grpo_lite.recipe.recipe import LimitsSection
from grpo_lite.task.guard import GuardedReward
from grpo_lite.task.rewards import _wrap
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import fixed_completions, tiny_args, tiny_lora, tiny_model, tiny_prompts, tiny_tokenizer

SECOND = os.environ["RANK"] == "1"
GRADIENT, LOSS, RAISES, NAN, HANGS = range(1, 6)  # steps; 0 and 6 are undisturbed


class Faulty(PackedGRPOTrainer):
    """Gives each prompt completions of its own; loss or gradient of the second process turn NaN or infinite."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return [fixed_completions(4, 12, sum(ids))[i % 4] for i, ids in enumerate(prompt_ids)], None

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        if SECOND and self.state.global_step == GRADIENT:
            parameter = next(p for p in self.model.parameters() if p.requires_grad)
            return loss + (parameter * torch.nan).sum().nan_to_num()  # a finite loss whose gradient is not
        return loss * torch.inf if SECOND and self.state.global_step == LOSS else loss


def reward(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
    step = trainer_state.global_step
    if SECOND and step == RAISES:
        raise ValueError("in the second process only")
    if SECOND and step == HANGS:
        time.sleep(60)
    paid = [float(ids[0] % 5) + 0.1 * len(ids) for ids in completion_ids]
    return [math.nan] * len(paid) if SECOND and step == NAN else paid


def main(out: str) -> None:
    torch.manual_seed(0)
    args = tiny_args(
        out + ".run", max_steps=7, per_device_train_batch_size=8, num_generations=4, optim="sgd", learning_rate=0.5
    )
    section: Any = type("Section", (), {"function": "reward", "kwargs": {}})()
    limits = LimitsSection(reward_timeout_s=1.0, reward_failures=9)  # type: ignore[call-arg]
    guarded = GuardedReward(_wrap(reward, section, "reward", {}), 4, limits, lambda line: None)
    trainer = Faulty(
        model=tiny_lora(tiny_model()), args=args, reward_funcs=[guarded], train_dataset=tiny_prompts(8),
        processing_class=tiny_tokenizer(), options=EngineOptions(),
    )  # fmt: skip
    trail: list[torch.Tensor] = []
    step_end = trainer.callback_handler.on_step_end

    def watched(*args: Any, **kwargs: Any) -> Any:
        trail.append(torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters() if p.requires_grad]).clone())
        return step_end(*args, **kwargs)

    trainer.callback_handler.on_step_end = watched  # type: ignore[method-assign]
    trainer.train()
    torch.save({"trail": trail, "faults": dict(trainer.faults.counts)}, f"{out}.{os.environ['RANK']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
