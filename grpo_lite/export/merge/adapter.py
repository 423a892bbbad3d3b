"""A saved LoRA adapter: its config checked, its tensors paired by module, nothing held in memory.

The files of PEFT 0.21 are read here as PEFT reads them. What cannot be expressed as a change of weights, or was trained
against other weights than the base's, is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo_lite.errors import ExportError, NothingToMerge
from grpo_lite.export.safetensors import FLOATS, Shard, TensorSpec, open_shard, row_blocks
from grpo_lite.files.manifest import MANIFEST_NAME, verify_manifest
from grpo_lite.models.adapter import BASE_CHANGING, CONFIG_NAME, WEIGHTS_NAME

_PREFIX = "base_model.model."
_ROLES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
# Keys of LoraConfig (peft 0.18 to 0.21) that do not change the meaning of the saved tensors, or are handled here.
_HARMLESS = """
peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version r lora_alpha
lora_dropout target_modules exclude_modules fan_in_fan_out bias use_rslora use_dora modules_to_save
init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core eva_config
loftq_config qalora_group_size runtime_config ensure_weight_tying
"""


@dataclass(frozen=True)
class LoraFactors:
    """The tensors that change one module's weight by `scaling · B·A` (DoRA: and its magnitude)."""

    module: str  # name in the model, such as model.layers.0.self_attn.q_proj
    a: TensorSpec
    b: TensorSpec
    magnitude: TensorSpec | None
    scaling: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk."""

    folder: Path
    config: Mapping[str, Any]
    shard: Shard
    lora: Mapping[str, LoraFactors] = field(default_factory=dict)  # by module
    full: Mapping[str, TensorSpec] = field(default_factory=dict)  # by tensor name in the model: modules_to_save
    copies: Mapping[str, TensorSpec] = field(default_factory=dict)  # base tensors that PEFT saved along

    def is_module_to_save(self, tensor: str) -> bool:
        """Whether PEFT trains a copy of this tensor's module, rather than the (perhaps tied) original."""
        module = tensor.rpartition(".")[0]
        return any(
            module.endswith(name) or f".{name}." in f".{tensor}" for name in self.config["modules_to_save"] or ()
        )


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter folder and check everything that can be checked without the base.

    Raises:
        ExportError: missing, corrupt or truncated files, an unsupported kind of adapter, unpaired tensors, NaN or
            infinity.
        NothingToMerge: every scaling · B·A is zero, as before the first gradient.
    """
    config = _read_config(folder)
    _check_supported(folder / CONFIG_NAME, config)
    if (folder / MANIFEST_NAME).is_file():
        verify_manifest(folder)
    if not (folder / WEIGHTS_NAME).is_file():
        raise ExportError(_no_weights(folder))
    shard = open_shard(folder / WEIGHTS_NAME)
    adapter = _pair_tensors(folder, config, shard)
    nonzero = {spec.name for spec in shard.tensors.values() if _check_finite(shard, spec)}
    _check_not_zero(adapter, nonzero)
    return adapter


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        inside = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" There is one in {', '.join(inside)}: give that folder." if inside else ""
        raise ExportError(f"{folder}: no adapter there ({CONFIG_NAME} is missing).{hint or ' Check the path.'}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: is not valid JSON: {error}. Save the adapter again.") from None
    return {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "target_modules": None} | config


def _check_supported(path: Path, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", "")).rpartition(".")[2]
    if kind != "LORA":
        raise ExportError(f"{path}: peft_type is {kind or 'missing'}. Only LORA (rsLoRA, DoRA too) can be merged.")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        key = "lora_bias" if config.get("lora_bias") else "bias"
        raise ExportError(f"{path}: {key} is {config[key]!r}. Only `bias: none` can be merged: train without biases.")
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(BASE_CHANGING):
        raise ExportError(
            f"{path}: init_lora_weights is {initial!r}, which trains against a changed base. Allowed: true, gaussian, "
            "eva, orthogonal, mica. Save it with PEFT's `path_initial_model_for_weight_conversion` and merge it."
        )
    unknown = sorted(key for key, value in config.items() if key not in _HARMLESS.split() and value)
    if unknown:
        raise ExportError(
            f"{path}: uses {', '.join(f'{key} = {config[key]!r}' for key in unknown)}, which cannot be merged. "
            "Allowed: LoRA, rsLoRA and DoRA with target_modules and modules_to_save. Remove it and train again, or "
            "publish the adapter unmerged."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config[key] or {}
        if not isinstance(patterns, dict) or not all(isinstance(value, int | float) for value in patterns.values()):
            raise ExportError(f"{path}: {key} is {config[key]!r}. It must map module names to numbers.")
    if not isinstance(config["modules_to_save"] or [], list):
        raise ExportError(f"{path}: modules_to_save is {config['modules_to_save']!r}. It must be a list or null.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] < 0 or (key == "r" and config[key] < 1):
            raise ExportError(f"{path}: {key} is {config.get(key)!r}. It must be a positive number.")


def _pair_tensors(folder: Path, config: Mapping[str, Any], shard: Shard) -> Adapter:
    modules: dict[str, dict[str, TensorSpec]] = {}
    full: dict[str, TensorSpec] = {}
    copies: dict[str, TensorSpec] = {}
    for spec in shard.tensors.values():
        if not spec.name.startswith(_PREFIX) or spec.dtype not in FLOATS:
            raise ExportError(
                f"{shard.path}: tensor {spec.name!r} ({spec.dtype}) is not one that PEFT saves for LoRA. Expected: "
                f"names that start with {_PREFIX!r}, in 16 or 32 bits. Save the adapter with PEFT's save_pretrained."
            )
        name = spec.name.removeprefix(_PREFIX)
        role = next((suffix for suffix in _ROLES if name.endswith(f".{suffix}")), None)
        if role:
            modules.setdefault(name[: -len(role) - 1], {})[_ROLES[role]] = spec
        elif ".lora_" in name:
            raise ExportError(f"{shard.path}: tensor {spec.name!r} is of a LoRA variant that cannot be merged here.")
        elif name.endswith(".base_layer.weight"):
            copies[name.replace(".base_layer.", ".")] = spec
        else:
            full[name.replace(".modules_to_save.", ".")] = spec
    if not modules and not full:
        raise ExportError(f"{shard.path}: holds no tensors. Save the adapter again.")
    lora = {module: _factors(shard.path, config, module, parts) for module, parts in modules.items()}
    return Adapter(folder, config, shard, lora, full, copies)


def _factors(path: Path, config: Mapping[str, Any], module: str, parts: Mapping[str, TensorSpec]) -> LoraFactors:
    embedding = any(role.startswith("embedding") for role in parts)
    a, b = (parts.get(f"embedding_{role}" if embedding else role) for role in "ab")
    magnitude = parts.get("magnitude")
    if a is None or b is None or bool(config.get("use_dora")) != (magnitude is not None):
        missing = "lora_A" if a is None else "lora_B" if b is None else "lora_magnitude_vector (or use_dora)"
        raise ExportError(f"{path}: {module} has no {missing}. The adapter is incomplete or corrupt: save it again.")
    rank, alpha = (
        patterns.get(_pattern_key(path, patterns, module), config[default])
        for patterns, default in ((config["rank_pattern"] or {}, "r"), (config["alpha_pattern"] or {}, "lora_alpha"))
    )
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ExportError(
            f"{path}: {module} has factors of shape {list(a.shape)} and {list(b.shape)}, but {CONFIG_NAME} gives "
            f"rank {rank}. Config and weights are of different adapters (or it is a convolution): save it again."
        )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraFactors(module, a, b, magnitude, scaling, embedding)


def _pattern_key(path: Path, patterns: Mapping[str, Any], module: str) -> str:
    """Return the first pattern that matches. Source: peft.utils.other.get_pattern_key, peft 0.21.2."""
    try:
        return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
    except re.error as error:
        raise ExportError(f"{path}: rank_pattern/alpha_pattern is not a valid expression: {error}.") from None


def _check_finite(shard: Shard, spec: TensorSpec) -> bool:
    """Refuse NaN and infinity; return whether any value is not zero."""
    nonzero = False
    for start, end in row_blocks(spec.shape):
        block = shard.read(spec, start, end)
        if not torch.isfinite(block).all():
            raise ExportError(
                f"{shard.path}: tensor {spec.name!r} holds NaN or infinity. Training diverged or the file is corrupt: "
                "merge an earlier checkpoint, or train again with a lower learning rate."
            )
        nonzero = nonzero or bool(block.any())
    return nonzero


def _check_not_zero(adapter: Adapter, nonzero: set[str]) -> None:
    changes = (
        factors.magnitude or (factors.scaling and factors.a.name in nonzero and factors.b.name in nonzero)
        for factors in adapter.lora.values()
    )
    if not adapter.full and not any(changes):
        raise NothingToMerge(
            "the adapter is zero, it still equals the base: no gradient ever flowed. Every group's rewards were equal "
            "in every step (see what earns a reward with `grpo-lite check`), or the learning rate was 0 (warm-up)"
        )


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_model.bin").is_file():
        return (
            f"{folder}: the adapter is pickled (adapter_model.bin). Allowed: {WEIGHTS_NAME}. Convert it with PEFT: "
            "PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
        )
    return f"{folder}: {WEIGHTS_NAME} is missing. The adapter was not saved to the end: save it again."
