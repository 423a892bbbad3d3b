"""The backend `unsloth`: the base loaded by FastLanguageModel, adapter included; needs CUDA and the extra `unsloth`.

Unsloth patches transformers, peft and trl when it is imported, so it has to come first: `prepare` runs before anything
imports them. What is passed to it is made by two pure functions, which
`tests/models/test_unsloth_contract.py` compares with the signatures in the installed wheel's source.
Read in unsloth 2026.10.9. Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from grpo_lite.commands import either, hint_run, hint_setup
from grpo_lite.errors import ModelError, first_line
from grpo_lite.files.cache import cache_dir
from grpo_lite.models.config import read_config
from grpo_lite.processes import this_process
from grpo_lite.recipe.recipe import ModelSection, Recipe

# FastLanguageModel's own default, and what peft's `all-linear` means for the models it knows.
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# TRL 1.14's and transformers' own, where Unsloth's patched GRPOConfig puts others if nothing is said
# (unsloth/models/rl.py 2026.10.9): a recipe means the same under both backends.
TRL_DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,  # 0.001
    "warmup_steps": 0,  # 0.1: a tenth of all steps
    "optim": "adamw_torch_fused",  # adamw_8bit
    "loss_type": "dapo",
    "mask_truncated_completions": False,  # True with loss_type dapo
}
LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save", "init_lora_weights")


def uses_unsloth(section: ModelSection) -> bool:
    """Return whether a recipe's model is loaded by Unsloth; an `auto` that is not settled yet is `hf`."""
    return section.backend == "unsloth"


def imported_before() -> list[str]:
    """Return what this process has imported that Unsloth would have to come before."""
    if "unsloth" in sys.modules:
        return []
    return [name for name in ("transformers", "trl", "peft") if name in sys.modules]


def lacks(recipe: Recipe) -> str | None:
    """Return what the recipe asks for and Unsloth's trainer lacks, if anything; what only saves time does not count."""
    if recipe.has_tools:
        return "unsloth's trainer calls tools without limits (tools, environment)"
    if recipe.reference == "start":
        return "unsloth's trainer measures KL against the base, not against the start (reference)"
    given = [f"sampling.{key}" for key in ("refill", "replay", "length_stages") if getattr(recipe.sampling, key)]
    return f"unsloth's trainer has no {' and no '.join(given)}" if given else None


def prepare(recipe: Recipe, begun: bool = False) -> None:
    """Import Unsloth where it is wanted, before transformers, trl and peft.

    Args:
        recipe: its `auto` settled.
        begun: whether it is the recipe of a run that resumes, and so cannot change its backend.

    Raises:
        ModelError: it is not installed or cannot be imported, there is no CUDA device (without one it imports a backend
            of other arguments), something has imported transformers already, there are several processes, or the
            recipe asks for what its trainer lacks.
    """
    if not uses_unsloth(recipe.model):
        return
    if begun:
        cause = "this run was started with unsloth"
        new_run = f"another {hint_run()}, and model.backend=hf"
        instead = f"resume it where unsloth is installed, or start a new run: {new_run}"
    else:
        cause, instead = "unsloth is given", "set model.backend=hf"
    if importlib.util.find_spec("unsloth") is None:
        raise ModelError(
            f"model.backend: {cause}, but unsloth is not installed. Run `{hint_setup('unsloth')}`, or {instead}."
        )
    import torch

    if not torch.cuda.is_available():
        raise ModelError(
            f"model.backend: {cause}, but there is no CUDA device here. It needs one; {instead}"
            + (", which trains on a CPU too." if not begun else ".")
        )
    if (world := this_process().world) > 1:
        raise ModelError(
            f"model.backend: {cause}, which trains in one process, not in {world}. "
            f"{either('Set GPUS=1', 'Start one process')}, or {instead}."
        )
    if missing := lacks(recipe):
        raise ModelError(f"model.backend: {cause}, but {missing}. Leave that out, or set model.backend=hf.")
    if early := imported_before():
        raise ModelError(
            f"model.backend: {cause}, and has to be imported before {', '.join(early)}, but this process has imported "
            f"them already (a notebook?). Restart it, or {instead}."
        )
    _compile_beside_our_cache()
    try:
        import unsloth  # noqa: F401
    except Exception as error:  # it looks at the machine and at what it patches, and raises whatever it finds
        raise ModelError(
            f"model.backend: {cause}, and cannot be imported: {first_line(error)}. Install "
            f"it anew ({hint_setup('unsloth')}), or {instead}."
        ) from error


def _compile_beside_our_cache() -> None:
    """Let Unsloth write its modules into the user's cache, unless UNSLOTH_COMPILE_LOCATION is set.

    Left alone it makes `unsloth_compiled_cache` in the working directory, puts that first on Python's path and imports
    what lies there (unsloth_zoo 2026.10.9).
    """
    with contextlib.suppress(OSError, ModelError):
        folder = cache_dir()
        if folder.stat().st_uid == os.getuid():  # code of ours, not of whoever made a folder in /tmp first
            os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(folder / "unsloth_compiled_cache"))


def load_arguments(recipe: Recipe, base: Path | str, max_seq_length: int, dtype: Any) -> dict[str, Any]:
    """Return what FastLanguageModel.from_pretrained gets."""
    section = recipe.model
    return {
        "model_name": str(base),
        "max_seq_length": max_seq_length,
        "dtype": dtype,
        "load_in_4bit": section.load_in == "4bit",
        "load_in_8bit": section.load_in == "8bit",
        "load_in_16bit": section.load_in == "16bit",
        "trust_remote_code": section.trust_remote_code,
        "use_gradient_checkpointing": _checkpointing(recipe),
        "use_exact_model_name": True,  # else it may load another repository than the one that is merged onto
        "fast_inference": False,  # its vLLM path is fragile on a T4
        "max_lora_rank": int(recipe.lora.get("r", 8)),
        "random_state": recipe.seed,
        **({"text_only": True} if read_config(Path(base)).get("vision_config") else {}),
    }


def adapter_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return what FastLanguageModel.get_peft_model gets.

    Raises:
        ModelError: a LoRA key that it has no argument for.
    """
    lora = recipe.lora_arguments
    targets = lora.pop("target_modules", "all-linear")
    unknown = [key for key in lora if key not in LORA_KEYS]
    if unknown:
        raise ModelError(
            f"lora.{unknown[0]}: the backend unsloth has no such argument. Allowed: target_modules, "
            f"{', '.join(LORA_KEYS)}. Remove it, or set model.backend=hf."
        )
    return {
        **lora,
        "target_modules": ALL_LINEAR if targets == "all-linear" else targets,
        "use_gradient_checkpointing": _checkpointing(recipe),
        "random_state": recipe.seed,
    }


def with_trl_defaults(grpo: dict[str, Any]) -> dict[str, Any]:
    """Return GRPOConfig's arguments with everything said that Unsloth's patched one would decide otherwise."""
    arguments = {**TRL_DEFAULTS, **grpo}
    if arguments.get("epsilon_high") is None:  # 0.28 with dapo, 5.0 with cispo; TRL's own is epsilon
        arguments["epsilon_high"] = arguments.get("epsilon", 0.2)
    if str(arguments["loss_type"]).lower() == "dr_grpo" and arguments.get("scale_rewards", "group") in (True, "group"):
        arguments["scale_rewards"] = None  # read as "scale them"; anything else it switches off
    return arguments


def _checkpointing(recipe: Recipe) -> str | bool:
    return "unsloth" if recipe.grpo.get("gradient_checkpointing", True) else False


def load_with_unsloth(recipe: Recipe, base: Path, max_seq_length: int, dtype: Any) -> Any:
    """Return the base with a fresh adapter on it.

    Raises:
        ModelError: Unsloth cannot load it.
    """
    from unsloth import FastLanguageModel

    try:
        model, _ = FastLanguageModel.from_pretrained(**load_arguments(recipe, base, max_seq_length, dtype))
        if model.config.get_text_config() is not model.config:
            raise ValueError(f"it gives the whole multimodal {type(model).__name__}, where text alone is trained")
        return FastLanguageModel.get_peft_model(model, **adapter_arguments(recipe))
    except (OSError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"model: {recipe.model.id} cannot be loaded by unsloth: {first_line(error)}. Set model.backend=hf."
        ) from error
