"""Train two steps with made-up completions, in one process or several; run by test_parallel.py, not by pytest."""

from __future__ import annotations

import sys
from typing import Any

import torch
from tiny import fixed_completions, tiny_args, tiny_lora, tiny_model, tiny_prompts, tiny_tokenizer

from grpo_lite.engine_options import EngineOptions
from grpo_lite.trainer_memory import FittingGRPOTrainer

ROWS = 16  # of all processes together: four prompts, four completions each


class Fixed(FittingGRPOTrainer):
    """Gives each prompt completions that depend on it alone."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        made = []
        for i, ids in enumerate(prompt_ids):
            made.append(fixed_completions(4, 12, sum(ids))[i % 4])
        return made, None


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 5) + 0.1 * len(ids) for ids in completion_ids]


def main(out: str, loss_type: str) -> None:
    torch.manual_seed(0)
    world = int(__import__("os").environ.get("WORLD_SIZE", "1"))
    model = tiny_lora(tiny_model())
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    args = tiny_args(
        out + ".run", loss_type=loss_type, max_steps=2, per_device_train_batch_size=ROWS // world // 2,
        gradient_accumulation_steps=2, num_generations=4, optim="sgd", learning_rate=0.5,
    )  # fmt: skip
    trainer = Fixed(
        model=model, args=args, reward_funcs=reward, train_dataset=tiny_prompts(8), processing_class=tiny_tokenizer(),
        # The processes cut their shares into different numbers of micro-batches.
        options=EngineOptions(tokens_per_microbatch=70),
    )  # fmt: skip
    trainer.train()
    if trainer.accelerator.is_main_process:
        trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        packed = set(trainer._supported.values()) == {True}
        rewards = [record["reward"] for record in trainer.state.log_history if "reward" in record]
        torch.save({"weights": trained, "start": start, "packed": packed, "reward": rewards}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
