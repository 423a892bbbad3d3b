"""Train two steps with made-up completions, in one process or several; run by test_parallel.py, not by pytest."""

from __future__ import annotations

import sys
from typing import Any

import torch

from grpo_lite.engine.options import EngineOptions
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import (
    alike_completions,
    fixed_completions,
    tiny_args,
    tiny_lora,
    tiny_model,
    tiny_prompts,
    tiny_tokenizer,
)

ROWS = 16  # of all processes together: four prompts, four completions each


class Fixed(PackedGRPOTrainer):
    """Gives each prompt completions that depend on it alone; those of every second one begin alike."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        made = []
        for i, ids in enumerate(prompt_ids):
            make = alike_completions if sum(ids) % 2 else fixed_completions
            made.append(make(4, 12, sum(ids))[i % 4])
        return made, None


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 5) + 0.1 * len(ids) for ids in completion_ids]


def overflow_at(trainer: Any, backwards: list[int]) -> None:
    """Let memory run out in these backward passes of this process (counted over attempts), halfway through."""
    real, count = trainer.accelerator.backward, 0

    def backward(loss: torch.Tensor, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        real(loss, **kwargs)
        if count in backwards:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    trainer.accelerator.backward = backward


def main(out: str, loss_type: str, *overflows: str) -> None:
    """Train; `overflows` are RANK:BACKWARD,BACKWARD… where memory is to run out."""
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
    lines: list[str] = []
    trainer.recovery.show = lines.append
    for rank, _, backwards in (text.partition(":") for text in overflows):
        if int(rank) == trainer.accelerator.process_index:
            overflow_at(trainer, [int(number) for number in backwards.split(",")])
    trainer.train()
    assert len(lines) == sum(
        len(backwards.split(","))
        for rank, _, backwards in (text.partition(":") for text in overflows)
        if int(rank) == trainer.accelerator.process_index
    ), lines
    if trainer.accelerator.is_main_process:
        trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        packed = set(trainer.support.decided.values()) == {True}
        logged = [record for record in trainer.state.log_history if "reward" in record]
        rewards = [record["reward"] for record in logged]
        kept = [{k: v for k, v in record.items() if "time" not in k and "memory" not in k} for record in logged]
        torch.save({"weights": trained, "start": start, "packed": packed, "reward": rewards, "logged": kept}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
