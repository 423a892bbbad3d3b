"""What pydantic alone cannot check: upstream's keys and values in `lora` and `grpo`, and values that must fit together.

`schema_text` writes the JSON Schema of recipes (recipes/schema.json), for editors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

from grpo_lite.recipe.recipe import ENVIRONMENT_REWARD, LORA_OWN, Recipe
from grpo_lite.recipe.upstream import config_fields, installed_versions

DEAD_KEYS = {
    "max_prompt_length": "removed from TRL; use data.max_prompt_tokens (longer prompts are dropped and counted)",
    "warmup_ratio": "removed from transformers; use warmup_steps (a value below 1 is a share of all steps)",
    "torch_dtype": "renamed; use model.dtype",
    "evaluation_strategy": "renamed to eval_strategy; held-out scores are the recipe's `eval:` section",
    "no_cuda": "renamed to use_cpu; here the device is found by itself",
    "per_gpu_train_batch_size": "renamed to per_device_train_batch_size",
    "max_new_tokens": "TRL's name is max_completion_length",
    "num_generation": "TRL's name is num_generations",
    "kl_coef": "TRL's name is beta",
    "group_size": "TRL's name is num_generations",
    "cliprange": "TRL's name is epsilon",
    "use_liger_loss": "removed from TRL; its own chunked log-probabilities replaced it",
    "rank": "peft's name is r",
    "alpha": "peft's name is lora_alpha",
    "dropout": "peft's name is lora_dropout",
}
OWNED_KEYS = {
    "output_dir": "the run directory decides it; use RUN=… or --run",
    "reward_weights": "give each reward its weight under rewards[i].weight",
    "bf16": "chosen from the device; to force one use model.dtype",
    "fp16": "chosen from the device; to force one use model.dtype",
    "model_init_kwargs": "use the model: section",
    "trust_remote_code": "use model.trust_remote_code",
    "seed": "use the recipe's own seed key",
    "resume_from_checkpoint": "an interrupted run resumes by itself; run `train` again",
    "hub_token": "a secret has no place in a recipe; log in with `hf auth login` or set HF_TOKEN",
    "push_to_hub": "checkpoints: push_checkpoints=user/name; the result: `grpo-lite push`",
    "hub_model_id": "checkpoints: push_checkpoints=user/name; the result: `grpo-lite push`",
    "logging_dir": "everything of a run lies in its run directory",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed",
    "ignore_data_skip": "a resumed run continues in the data where it stopped",
    "restore_callback_states_from_checkpoint": "a resumed run restores what it needs",
    "auto_find_batch_size": "TRL refuses it for GRPO: halving the batch would break up groups",
    "remove_unused_columns": "columns always reach the rewards here",
    "do_train": "`train` always trains",
    "eval_strategy": "held-out scores are the recipe's eval: section",
    "task_type": "always CAUSAL_LM here",
    "peft_type": "always LORA here",
    "base_model_name_or_path": "use model.id",
    "inference_mode": "always false while training",
}


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest known word, or nothing."""
    matches = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def upstream_section(section: Literal["lora", "grpo"] | str, raw: Any) -> tuple[dict[str, Any], list[str]]:
    """Coerce one upstream section by upstream's annotations.

    Returns:
        The coerced mapping, and one fault (`grpo.beta: …`) for each wrong key.
    """
    owner = {"lora": "peft.LoraConfig", "grpo": "trl.GRPOConfig"}[section]
    if not isinstance(raw, dict):
        return {}, [f"{section}: {raw!r} is given; allowed is a mapping of {owner} keys."]
    fields = dict(config_fields(section))
    if section == "lora":
        fields |= dict.fromkeys(LORA_OWN, str | None)
    values: dict[str, Any] = {}
    faults = []
    for key, value in raw.items():
        if section == "lora" and key in LORA_OWN and value is None:
            continue  # as if it were not there, so that a run resumes either way
        if key in DEAD_KEYS and key not in fields:
            faults.append(f"{section}.{key}: {DEAD_KEYS[key]}.")
        elif key in OWNED_KEYS:
            faults.append(f"{section}.{key}: not set here: {OWNED_KEYS[key]}.")
        elif key not in fields:
            hint = nearest(str(key), fields)
            faults.append(f"{section}.{key}: unknown key, {owner} has none of this name{hint}.")
        else:
            try:
                values[key] = _coerce(fields[key], value)
            except ValidationError as error:
                faults.append(f"{section}.{key}: {value!r} is given; {_allowed(fields[key], value, error)}.")
    return values, faults


def _coerce(annotation: Any, value: Any) -> Any:
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return value  # upstream tells `logging_steps: 1` (a count) from 1.0
    return TypeAdapter(annotation).validate_python(value)


def _allowed(annotation: Any, value: Any, error: ValidationError) -> str:
    choices = [choice for choice in getattr(annotation, "__args__", ()) if isinstance(choice, str)]
    if choices and str(annotation).startswith("typing.Literal"):
        return f"allowed: {', '.join(choices)}{nearest(str(value), choices)}"
    kinds = sorted({str(item["type"]).split("_")[0] for item in error.errors()} - {"none"})
    if type(None) in getattr(annotation, "__args__", ()):
        kinds.append("null")
    return f"allowed: {' or '.join(kinds)}"


def cross_faults(recipe: Recipe) -> list[str]:
    """Return what does not fit together in a recipe whose single values are all right."""
    missing = [key for key in ("num_generations", "max_completion_length") if recipe.grpo.get(key, 0) is None]
    if missing:
        return [
            f"grpo.{key}: null is given; a whole number is needed. Remove the key for TRL's own." for key in missing
        ]
    faults = [*_batch_faults(recipe), *_range_faults(recipe), *_episode_faults(recipe), *_sampling_faults(recipe)]
    if recipe.lora.get("lora_dropout"):
        faults.append(
            f"lora.lora_dropout: {recipe.lora['lora_dropout']} is given; only 0 is allowed: TRL generates in train "
            "mode, so dropout would make the sampled policy another one than the trained one. Remove the key."
        )
    if recipe.init_from is not None and not recipe.init_from.strip():
        faults.append(
            "lora.init_from: an empty address is given; allowed is a run directory, a folder with a saved adapter, or "
            "user/repo on the Hub. Remove the key to start from a fresh adapter."
        )
    if recipe.reference == "start" and not recipe.grpo.get("beta"):
        faults.append(
            "reference: start is given, but grpo.beta is 0, so there is no KL to measure. Set grpo.beta=0.02, or "
            "remove the key."
        )
    targets = recipe.lora.get("target_modules")
    if "lm_head" in ([targets] if isinstance(targets, str) else targets or []):
        faults.append("lora.target_modules: lm_head is given; TRL multiplies by its weight directly, so an adapter")
        faults[-1] += " on it would never be trained. Remove it (all-linear leaves it out)."
    if recipe.eval.enabled and recipe.data.eval is None and recipe.data.holdout == 0:
        faults.append(
            "data.holdout: 0 rows are held out and data.eval is not given, but eval.enabled is true. "
            "Set data.holdout=100, or data.eval.path=…, or eval.enabled=false."
        )
    return faults


def _episode_faults(recipe: Recipe) -> list[str]:
    """Return what does not go together with tools and environments."""
    faults = []
    scores = {"eval.lenient": recipe.eval.lenient, **{f"eval.strict[{i}]": s for i, s in enumerate(recipe.eval.strict)}}
    for where, score in scores.items():
        if score is not None and score.function == ENVIRONMENT_REWARD and recipe.environment is None:
            faults.append(
                f"{where}.function: {ENVIRONMENT_REWARD} is given, and there is no environment that pays it. Name a "
                "reward function, or an environment."
            )
    if recipe.warmup is not None and recipe.warmup.source == "gold" and recipe.environment is None:
        faults.append(
            "warmup.source: gold is given, and there is no environment whose gold policy could be played. Name one "
            "under `environment`, or give rows with completions (warmup.source=data and warmup.data)."
        )
    if not recipe.has_tools:
        return faults
    key = "tools" if recipe.tools else "environment"
    if recipe.data.format != "chat":
        faults.append(
            f"data.format: {recipe.data.format} is given with {key}; only chat is allowed, because the chat template "
            "writes the calls and their results. Set data.format=chat."
        )
    if recipe.model.backend == "unsloth":
        faults.append(f"model.backend: unsloth is given with {key}; allowed is hf. Set model.backend=hf.")
    if recipe.grpo.get("use_vllm"):
        faults.append(f"grpo.use_vllm: true is given with {key}; only false is allowed. Remove the key.")
    return faults


def _sampling_faults(recipe: Recipe) -> list[str]:
    """Return what does not go together with replay and with stages of length."""
    elsewhere = [
        *(["grpo.use_vllm: true"] if recipe.grpo.get("use_vllm") else []),
        *(["tools" if recipe.tools else "environment"] if recipe.has_tools else []),
    ]
    faults = []
    for other in [*elsewhere, *(["rollout: generate"] if recipe.rollout == "generate" else [])]:
        if recipe.sampling.replay:
            faults.append(
                f"sampling.replay: {recipe.sampling.replay} is given with {other}; replayed tokens are weighed by the "
                f"log-probabilities that our decoder notes. Remove one of the two."
            )
    stages = sorted(recipe.sampling.length_stages.items())
    faults += [f"sampling.length_stages is given with {other}; remove one of the two." for other in elsewhere if stages]
    lengths = [*(tokens for _, tokens in stages), recipe.max_completion_length]
    if lengths != sorted(set(lengths)) or any(until < 1 for until, _ in stages):
        faults.append(
            f"sampling.length_stages: {dict(stages)} is given with grpo.max_completion_length: "
            f"{recipe.max_completion_length}; steps from 1 on with growing lengths are allowed, all of them below "
            f"grpo.max_completion_length, such as {{50: {max(1, recipe.max_completion_length // 2)}}}."
        )
    return faults


def damage_faults(recipe: Recipe) -> list[str]:
    """Return the rollout engines of TRL that would silently damage what is trained.

    Source: trl 1.16, `GRPOTrainer._generate_single_turn` and `VLLMGeneration.sync_weights`. Measured in NF4: after one
    sync the base is 2.2 % away from what it was, after ten 20 %.
    """
    faults = []
    load_in = recipe.model.load_in
    if recipe.grpo.get("use_vllm") and load_in in ("4bit", "8bit"):
        faults.append(
            f"grpo.use_vllm: true is given with model.load_in={load_in}; allowed with 16bit or 32bit. At each sync TRL "
            "merges the adapter into the quantized weights and takes it out again, and each time the base drifts "
            "(by 2.2 % in NF4, by 20 % after ten syncs). Set model.load_in=16bit, or leave grpo.use_vllm out: "
            "rollout=shared needs no vLLM."
        )
    for key in ("use_transformers_continuous_batching", "use_transformers_paged"):
        if recipe.grpo.get(key):
            faults.append(
                f"grpo.{key}: true is given; only false is allowed. TRL then casts the adapter to 16 bit at each "
                "rollout: float16 training stops in GradScaler, bfloat16 training loses small updates without a word. "
                "Remove the key: rollout=shared is the engine for this."
            )
    return faults


def _batch_faults(recipe: Recipe) -> list[str]:
    schedule = recipe.schedule
    group, batch, per_device = schedule.group, schedule.batch, schedule.rows
    if group < 2:
        return [f"grpo.num_generations: {group} is given; a group needs at least 2 to have a spread. Try 8."]
    if batch < 1 or batch % group == 0:
        return []
    fitting = [n for n in range(2, min(batch, 64) + 1) if batch % n == 0]
    up = -(-batch // group) * group
    steps = up // per_device if up % per_device == 0 else group
    return [
        f"grpo.num_generations: a round generates {batch} completions (per_device_train_batch_size × "
        f"gradient_accumulation_steps), which is not a multiple of num_generations = {group}. "
        f"With this batch num_generations may be {', '.join(map(str, fitting)) or 'none'}; with this group set "
        f"grpo.gradient_accumulation_steps={steps} (a round of {per_device * steps})."
    ]


def _range_faults(recipe: Recipe) -> list[str]:
    positive = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "generation_batch_size",
        "steps_per_generation",
        "max_completion_length",
        "temperature",
        "learning_rate",
        "num_iterations",
        "epsilon",
        "epsilon_high",
        "delta",
        "sapo_temperature_pos",
        "sapo_temperature_neg",
    )
    faults = [
        f"grpo.{key}: {recipe.grpo[key]} is given; it must be above 0."
        for key in positive
        if recipe.grpo.get(key) is not None and not recipe.grpo[key] > 0
    ]
    if int(recipe.lora.get("r", 8)) < 1:
        faults.append(f"lora.r: {recipe.lora['r']} is given; the rank is at least 1.")
    if recipe.grpo.get("beta") is not None and not recipe.grpo["beta"] >= 0:
        faults.append(f"grpo.beta: {recipe.grpo['beta']} is given; the KL weight is 0 or more.")
    if not 0 <= (share := recipe.grpo.get("top_entropy_quantile", 1.0)) <= 1:
        faults.append(
            f"grpo.top_entropy_quantile: {share} is given; allowed: 0 to 1, the share of tokens that are trained on."
        )
    return faults


def schema_text() -> str:
    """Return the JSON Schema, with upstream's keys as of the versions installed here."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    schema["$comment"] = f"Made by `grpo-lite schema recipes/schema.json` with {versions}; do not edit."
    schema["required"] = [key for key in schema["required"] if key != "name"]  # by default the file's name
    for section in ("lora", "grpo"):
        schema["properties"][section] |= {
            "properties": {
                key: _field_schema(annotation)
                for key, annotation in sorted(config_fields(section).items())
                if key not in OWNED_KEYS
            },
            "additionalProperties": False,
        }
    for key, meaning in LORA_OWN.items():
        schema["properties"]["lora"]["properties"][key] = {**_field_schema(str | None), "description": meaning}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _field_schema(annotation: Any) -> dict[str, Any]:
    try:
        schema = TypeAdapter(annotation).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}
    if "anyOf" in schema:  # `typing` caches unions, so their order depends on what was imported before (Python 3.11)
        schema["anyOf"].sort(key=lambda kind: (kind == {"type": "null"}, json.dumps(kind)))
    return schema
