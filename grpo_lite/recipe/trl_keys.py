"""Where a key of a `trl grpo` YAML stands in a recipe, or why it has no place there.

Source: trl 1.16, `scripts/grpo.py` (GRPOScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig). GRPOConfig's
keys keep their names and are read from the installed version; listed here are the others. `load` answers unknown keys
with this table, and `convert` rewrites whole files by it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from grpo_lite.recipe.checks import DEAD_KEYS, OWNED_KEYS, nearest
from grpo_lite.recipe.upstream import config_fields

RENAMED = {
    "model_name_or_path": "model.id",
    "model_revision": "model.revision",
    "dtype": "model.load_in and model.dtype",
    "torch_dtype": "model.load_in and model.dtype",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "model_init_kwargs": "model",
    "load_in_4bit": "model.load_in",
    "load_in_8bit": "model.load_in",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_parameters": "lora.target_parameters",
    "lora_modules_to_save": "lora.modules_to_save",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "dataset_name": "data.train.hub",
    "dataset_config": "data.train.config",
    "dataset_train_split": "data.train.split",
    "dataset_test_split": "data.eval.split",
    "datasets": "data.train",
    "test_split_size": "data.holdout",
    "max_prompt_length": "data.max_prompt_tokens",
    "system_prompt": "data.system",
    "reward_funcs": "rewards",
    "reward_weights": "rewards[0].weight",
    "warmup_ratio": "grpo.warmup_steps",
    "eval_strategy": "data.eval",
    "evaluation_strategy": "data.eval",
    "eval_steps": "eval.every",
    "per_device_eval_batch_size": "eval.batch_size",
    "hub_model_id": "push_checkpoints",
}
_LAUNCHER = "the launcher's; on several GPUs: `make train GPUS=2`, or accelerate launch as in launch/"
_ONE_COPY = "every GPU holds the whole model here, so nothing is sharded"
_QUANTIZATION = "4bit is always NF4 with double quantization"
_HUB = OWNED_KEYS["push_to_hub"]
_SCORES = "held-out scores are measured by the recipe's eval: section"
LEFT_OUT = {
    "use_peft": "every recipe trains a LoRA; delete the key",
    "lora_task_type": OWNED_KEYS["task_type"],
    "bnb_4bit_quant_type": _QUANTIZATION,
    "use_bnb_nested_quant": _QUANTIZATION,
    "bnb_4bit_quant_storage": "only sharding needs another storage type",
    "reward_model_name_or_path": "a reward is a function; load the model in one of your own",
    "dataset_streaming": "rows are read whole; data.train.limit takes the first ones",
    "streaming": "rows are read whole; data.train.limit takes the first ones",
    "ignore_bias_buffers": "not needed with the models that are supported",
    "env": "set variables in front of the command: NAME=value grpo-lite train …",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _ONE_COPY),
    **dict.fromkeys(
        ("accelerate_config", "config_file", "num_processes", "num_machines", "machine_rank", "main_process_ip"),
        _LAUNCHER,
    ),
    **dict.fromkeys(("main_process_port", "mixed_precision", "dynamo_backend", "gpu_ids", "local_rank"), _LAUNCHER),
    **dict.fromkeys(("use_deepspeed", "use_fsdp", "deepspeed_config_file", "zero_stage"), _ONE_COPY),
    **dict.fromkeys(("hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"), _HUB),
    **dict.fromkeys(("do_eval", "do_predict", "eval_delay", "eval_accumulation_steps", "batch_eval_metrics"), _SCORES),
    **dict.fromkeys(("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object"), _SCORES),
    **dict.fromkeys(("prediction_loss_only", "include_for_metrics", "bf16_full_eval", "fp16_full_eval"), _SCORES),
    "num_generations_eval": "eval.samples says how many completions of a held-out prompt are sampled",
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        "the last step's adapter is the result; any checkpoint can be scored and merged",
    ),
}


def place_of(key: str) -> str | None:
    """Return the recipe key that says what a key of TRL or peft says; None if there is none."""
    if key in RENAMED:
        return RENAMED[key]
    if key in LEFT_OUT or key in OWNED_KEYS or key in DEAD_KEYS:
        return None
    return next((f"{section}.{key}" for section in ("grpo", "lora") if key in config_fields(section)), None)


def why_left_out(key: str) -> str | None:
    """Return why a key of TRL or peft has no place in a recipe; None for any other key."""
    return LEFT_OUT.get(key) or OWNED_KEYS.get(key) or DEAD_KEYS.get(key)


def is_trl_key(key: str) -> bool:
    """Return whether a key at a file's top level is one of TRL's, transformers' or peft's."""
    return place_of(key) is not None or why_left_out(key) is not None


def top_level_advice(key: str, allowed: Iterable[str]) -> str:
    """Return what follows `KEY: unknown key` for a key at a recipe's top level.

    Args:
        key: as it was written.
        allowed: the recipe's own keys.
    """
    if place := place_of(key):
        return f" (did you mean {place}?)."
    if reason := why_left_out(key):
        return f": {reason}."
    allowed = list(allowed)
    hint = nearest(key, allowed)
    if not hint and (near := nearest_trl_key(key)):
        return f" (did you mean {near}?)."
    return f"{hint}. Allowed: {', '.join(sorted(allowed))}."


def nearest_trl_key(key: str) -> str | None:
    """Return the place of TRL's key that is spelled most like `key`, if any is."""
    known = {**{name: f"grpo.{name}" for name in config_fields("grpo") if name not in OWNED_KEYS}, **RENAMED}
    matches = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.6)
    return known[matches[0]] if matches else None
