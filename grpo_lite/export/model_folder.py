"""A model's folder: its config, the files copied beside its weights, and how it is loaded to be compared."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from grpo_lite.engine.out_of_memory import is_out_of_memory
from grpo_lite.engine.quantised import keep_odd_widths_unpacked
from grpo_lite.errors import ExportError, first_line
from grpo_lite.export.safetensors import open_checkpoint
from grpo_lite.models.chat_template import FILE_NAME
from grpo_lite.models.text_tower import load_causal

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*",
)
# Custom code travels because auto_map needs it, licences because they demand it. The base's README would be wrong.
_MODEL_FILES = (
    "generation_config.json",
    "*.py",
    "*processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "*POLICY*",
)


def free_main_memory_bytes() -> int:
    """Return the free main memory."""
    import psutil

    return int(psutil.virtual_memory().available)


def stored_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's tensors in their own dtypes."""
    return sum(spec.end - spec.start for shard in open_checkpoint(folder) for spec in shard.tensors.values())


def bytes_to_compute(folder: Path, dtype: torch.dtype) -> int:
    """Return what a model takes that is loaded in a dtype and computes on one sequence, with a margin."""
    parameters = sum(math.prod(spec.shape) for shard in open_checkpoint(folder) for spec in shard.tensors.values())
    return int(dtype.itemsize * parameters * 1.3) + (1 << 30)


def dtype_that_fits(folder: Path) -> torch.dtype | None:
    """Return float32 where the model fits the CPU's free memory in it; None: load it in its own dtype.

    In float32 a comparison shows the rounding of the weights alone, and not that of the arithmetic.
    """
    return torch.float32 if bytes_to_compute(folder, torch.float32) < free_main_memory_bytes() else None


def load_saved_tokenizer(folder: Path) -> Any:
    """Load an exported folder's own tokenizer; one that does not load is an ExportError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder}: its tokenizer does not load ({first_line(error)}). Merge onto a base that has one."
        ) from None


def load_whole(folder: Path, dtype: torch.dtype | None, device: str = "cpu") -> Any:
    """Load a model folder in eval mode, of a multimodal one the text tower.

    Raises:
        ExportError: it does not load, or weights are missing or of another shape.
    """
    place = {"device_map": {"": 0}} if device.startswith("cuda") else {}  # straight there, not through main memory
    try:
        model, info = load_causal(folder, dtype=dtype or "auto", output_loading_info=True, **place)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise ExportError(f"{folder}: does not load ({first_line(error)}). Fetch or merge it again.") from None
    wrong = sorted([*info["missing_keys"], *info["mismatched_keys"]], key=str)
    if wrong:
        raise ExportError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, for example {wrong[0]}. The config and "
            "the weights are of different models: fetch or merge it again."
        )
    keep_odd_widths_unpacked(model)
    return model.to(device).eval()


def copy_files(model_dir: Path, out_dir: Path) -> None:
    """Copy what belongs to a model beside its weights: generation config, tokenizer, custom code and licences."""
    for pattern in _MODEL_FILES:
        _copy_matching(model_dir, pattern, out_dir)
    if not [name for pattern in _TOKENIZER_FILES for name in _copy_matching(model_dir, pattern, out_dir)]:
        logger.warning("%s has no tokenizer, so the export has none: add one before using it.", model_dir)


def copy_chat_template(adapter_dir: Path, out_dir: Path) -> None:
    """Copy the chat template that an adapter was saved with: it was trained on that one, the base's may be another."""
    _copy_matching(adapter_dir, FILE_NAME, out_dir)


def _copy_matching(folder: Path, pattern: str, out_dir: Path) -> list[str]:
    names = []
    for path in sorted(folder.glob(pattern)):
        if path.is_file():  # through links: the Hub's cache is made of them
            name = path.relative_to(folder)
            (out_dir / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out_dir / name)
            names.append(name.as_posix())
    return names


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json; a missing or broken one is an ExportError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path}: cannot be read ({error}). A model's folder has to hold its config.json: fetch or merge it again."
        ) from None
    return config


def read_base_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model in 16 or 32 bits; a quantised one is an ExportError."""
    config = read_config(folder)
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if quantization := section.get("quantization_config"):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise ExportError(
                f"{folder / 'config.json'}: the base is quantised (quantization_config, method {method}). Merging into "
                "quantised weights loses most of what was learnt: only a 16-bit base is merged onto. Give the original "
                "model's folder or id (the name without -bnb-4bit, -GPTQ, -AWQ, -FP8)."
            )
    return config
