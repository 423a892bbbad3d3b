"""Train two steps of a warm-up, in one process or several; run by test_warmup_parallel.py, not by pytest."""

from __future__ import annotations

import os
import sys

import torch
from trl import SFTConfig

from grpo_lite.engine.options import EngineOptions
from grpo_lite.trainer.warmup import StepRows, WarmupTrainer, as_dataset, order_rows
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer, traces
from tests.trainer.parallel_step import overflow_at

STEPS = 3


def main(out: str, tokens_per_step: str, *overflows: str) -> None:
    """Train; `overflows` are RANK:BACKWARD,BACKWARD… where memory is to run out."""
    torch.manual_seed(0)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    rows, held = traces(30), traces(5, seed=9)
    # In one process as many rows a step as the processes need at least.
    order = order_rows([len(row) for row in rows], int(tokens_per_step), STEPS, None, 0, least=2)
    args = SFTConfig(
        output_dir=out + ".run", max_steps=STEPS, learning_rate=0.5, per_device_train_batch_size=1, report_to="none",
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=True, bf16=False, logging_steps=1,
        remove_unused_columns=False, disable_tqdm=True, save_strategy="no", optim="sgd", gradient_checkpointing=True,
    )  # fmt: skip
    lines: list[str] = []
    trainer = WarmupTrainer(
        model=tiny_lora(tiny_model()), args=args, processing_class=tiny_tokenizer(),
        train_dataset=as_dataset(order, rows, world), data_collator=StepRows(rows, 0), held=held,
        options=EngineOptions(warmup_tokens=60), show=lines.append,
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    for own, _, backwards in (text.partition(":") for text in overflows):
        if int(own) == rank:
            overflow_at(trainer, [int(number) for number in backwards.split(",")])
            expected = len(backwards.split(","))
    trainer.train()
    assert len(lines) == (expected if any(text.startswith(f"{rank}:") for text in overflows) else 0), lines
    trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    logged = [
        {k: v for k, v in record.items() if "time" not in k and "memory" not in k}
        for record in trainer.state.log_history
        if "loss" in record
    ]
    torch.save({"weights": trained, "start": start, "logged": logged}, f"{out}.{rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
