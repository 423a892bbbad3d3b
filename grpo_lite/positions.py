"""How many positions a model was made for, by its config.json; what lies beyond them. Torch-free.

Place in the line: `memory_plan.py` never offers more, and a training whose prompts and completions go beyond says so
before it loads anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_lite.base_model import resolve_base
from grpo_lite.errors import ModelError
from grpo_lite.recipe import Recipe

# A table of learned (or precomputed) positions: the next one is an index error, on a GPU a dead CUDA context.
_TABLED = {"codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt"}


def read_positions(config: dict[str, Any]) -> int | None:
    """Return the longest sequence a config.json stands for, rope scaling counted; None where it says nothing.

    `max_position_embeddings` holds the scaled length for llama3, longrope and Gemma 3, and the original one, to be
    multiplied by the factor, for linear, dynamic and yarn.
    Source: vLLM, `_get_and_verify_max_len` (v0.8), which refuses longer ones.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    declared = _count(config.get("max_position_embeddings")) or _count(config.get("n_positions"))
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if declared is None or not isinstance(rope, dict) or str(config.get("model_type")).startswith("gemma3"):
        return declared
    if rope and all(isinstance(value, dict) for value in rope.values()):  # one for each kind of layer
        rope = rope.get("full_attention") or next(iter(rope.values()))
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or isinstance(factor, bool) or not isinstance(factor, int | float):
        return declared
    original = _count(rope.get("original_max_position_embeddings")) if kind == "yarn" else None
    return max(declared, int((original or declared) * factor))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def too_long(
    model_id: str, positions: int | None, prompt: int, completion: int, key: str = "grpo.max_completion_length"
) -> str | None:
    """Return what is wrong with a prompt and a completion of so many tokens, and what to do; None if nothing is."""
    if positions is None or prompt + completion <= positions:
        return None
    spare = positions - prompt
    change = f"{key}={spare}" if spare > 0 else f"data.max_prompt_tokens={positions // 2}"
    return (
        f"{model_id} was made for {positions} positions, and prompts of up to {prompt} tokens with completions of up "
        f"to {completion} need {prompt + completion}; paste: {change}"
    )


def positions_note(recipe: Recipe, prompt_tokens: int) -> str | None:
    """Return a line where training or evaluation goes beyond what the model was made for.

    Args:
        recipe: the recipe.
        prompt_tokens: the longest prompt.

    Raises:
        ModelError: the model has no positions beyond, so it would fail there.
    """
    config = _config(recipe)
    positions, model_id = read_positions(config), recipe.model.id
    fault = too_long(model_id, positions, prompt_tokens, recipe.max_completion_length)
    if fault is None and recipe.eval.enabled and recipe.eval.max_new_tokens:
        fault = too_long(model_id, positions, prompt_tokens, recipe.eval.max_new_tokens, "eval.max_new_tokens")
    if fault and config.get("model_type") in _TABLED:
        raise ModelError(f"model.id: {fault}. It cannot compute beyond them.")
    return f"model: {fault}. Beyond them it tends to write nonsense" if fault else None


def _config(recipe: Recipe) -> dict[str, Any]:
    folder: Path = resolve_base(recipe.model.id, recipe.model.revision, weights=False)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads it says what is wrong with it
        return {}
    return config if isinstance(config, dict) else {}
