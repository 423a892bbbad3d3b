"""How many positions a model was made for, and what is said of a run that goes beyond them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A table of learned (or precomputed) positions: the next one is an index error, on a GPU a dead CUDA context.
TABLED = {"codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt"}


def read_positions(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence a config.json stands for, rope scaling counted; None where it says nothing.

    `max_position_embeddings` holds the scaled length for llama3, longrope and Gemma 3, and the original one, to be
    multiplied by the factor, for linear, dynamic and yarn.
    Source: vLLM, `_get_and_verify_max_len` (v0.8), which refuses longer ones.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
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
