"""Train a recipe whose 4-bit base is too large for one card: TRL's own GRPOTrainer, the base sharded (FSDP-QLoRA).

Usage: accelerate launch --config_file launch/fsdp_qlora.yaml launch/fsdp_qlora.py RECIPE OUT [KEY=VALUE …]

It uses the recipe's prompts, rewards and settings, with plain compute. OUT becomes a run: `make merge RUN=OUT`
merges it on a CPU. An interrupted run does not resume, and this has not yet run on a GPU (docs/scaling.md).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(recipe_name: str, out: str, *overrides: str) -> None:
    """Train and save OUT/adapter."""
    from grpo_lite.cli import set_environment

    set_environment()
    from datasets import Dataset
    from trl import GRPOTrainer

    from grpo_lite.models.base import Base
    from grpo_lite.models.load import load_tokenizer, lora_config
    from grpo_lite.processes import agree, this_process
    from grpo_lite.recipe.load import load_recipe
    from grpo_lite.runs.provenance import environment_record
    from grpo_lite.runs.run_dir import RunDir
    from grpo_lite.session.build import fill_a_round, grpo_config
    from grpo_lite.task.prompts import load_prompts
    from grpo_lite.task.rewards import load_rewards
    from grpo_lite.units import now

    recipe, run, first = load_recipe(recipe_name, overrides), RunDir(out), this_process().is_first
    agree(run.prepare(recipe) if first else None, this_process())
    base = Base.resolve(recipe.model)
    prompts = load_prompts(recipe, load_tokenizer(base))
    columns = prompts.columns
    rewards, weights = load_rewards(recipe, columns, prompts.lead_in)
    rows = [{"prompt": row["prompt"], **{key: row.get(key) for key in columns}} for row in prompts.train]
    args = grpo_config(recipe, run, base, weights)
    args.save_strategy = "no"
    trainer = GRPOTrainer(
        model=load_sharded(recipe, args),
        args=args,
        reward_funcs=rewards,
        train_dataset=Dataset.from_list(fill_a_round(rows, recipe, print)),
        processing_class=prompts.tokenizer,
        peft_config=lora_config(recipe),
    )
    if first:
        run.update_run(**environment_record(), recipe=recipe.name, seed=recipe.seed)
    trainer.train()
    trainer.save_model(str(run.adapter))  # by all processes: the shards are gathered
    if first:
        run.update_run(trained_at=now(), steps=trainer.state.global_step)
        print(f"adapter: {run.adapter}\nmerge it: make merge RUN={out}")


def load_sharded(recipe: Any, args: Any) -> Any:
    """Return the base, its 4-bit weights stored in the compute dtype, as FSDP can shard nothing else."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from grpo_lite.models.base import resolve_base

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    quantized: dict[str, Any] = {}
    if recipe.model.load_in == "4bit":
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(
        resolve_base(recipe.model.id, recipe.model.revision), dtype=dtype, **quantized
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
