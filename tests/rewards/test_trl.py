"""Plain TRL: a GRPOTrainer step with the rewards, alone and gated, on a tiny random Llama."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rewards import accuracy_reward, format_reward, gated, memoised, soft_overlong_punishment

TOKENIZER = Path(__file__).resolve().parents[3] / "shared" / "tokenizers" / "smollm2"


def step(tmp_path: Path, prompts: list[Any], reward_funcs: list[Any], golds: str = "answer") -> dict[str, float]:
    """Run one optimizer step of plain GRPOTrainer and return its metrics."""
    if not TOKENIZER.is_dir():
        pytest.skip("shared/tokenizers/smollm2 is not here")
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=reward_funcs,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=8,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts, golds: ["4", "5"]}),
        processing_class=tokenizer,
    )
    trainer.train()
    return {key: value for log in trainer.state.log_history for key, value in log.items()}


def test_text_prompts_train_with_accuracy_and_format(tmp_path: Path) -> None:
    metrics = step(tmp_path, ["2+2=", "2+3="], [accuracy_reward, format_reward])
    assert metrics["rewards/accuracy_reward/mean"] == 0.0
    assert metrics["rewards/format_reward/mean"] == 0.0
    assert metrics["accuracy_reward/no_answer"] == 1.0  # a random model commits to nothing
    assert metrics["accuracy_reward/unusable_gold"] == 0.0


def test_golds_may_be_called_solution_as_in_trl_s_datasets(tmp_path: Path) -> None:
    metrics = step(tmp_path, ["2+2=", "2+3="], [accuracy_reward], golds="solution")
    assert metrics["rewards/accuracy_reward/mean"] == 0.0
    assert metrics["accuracy_reward/no_answer"] == 1.0
    assert metrics["accuracy_reward/unusable_gold"] == 0.0


def test_chat_prompts_train_with_gated_rewards_and_bound_options(tmp_path: Path) -> None:
    accuracy = memoised(partial(accuracy_reward, extract=["first_line"]))
    overlong = partial(soft_overlong_punishment, max_completion_length=8, cache_length=4)
    prompts = [[{"role": "user", "content": "2+2?"}], [{"role": "user", "content": "2+3?"}]]
    metrics = step(tmp_path, prompts, [accuracy, gated(format_reward, by=accuracy), gated(overlong, by=accuracy)])
    assert metrics["rewards/soft_overlong_punishment/mean"] == 0.0
    assert metrics["rewards/accuracy_reward/mean"] == 0.0
    assert metrics["rewards/format_reward/mean"] == 0.0
