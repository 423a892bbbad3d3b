"""A model's folder: what is copied beside the weights, and how such a folder is loaded again."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from grpo_lite.engine.quantised import keep_odd_widths_unpacked
from grpo_lite.errors import ExportError
from grpo_lite.export.safetensors import open_checkpoint

logger = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20  # for two sets of logits in float32


def dtype_here(base_dir: Path, merged_dir: Path, device: str) -> torch.dtype | None:
    """Return float32 where the model fits the free memory in it, else None; too little for its own dtype is refused."""
    tensors = [spec for shard in open_checkpoint(base_dir) for spec in shard.tensors.values()]
    parameters = sum(math.prod(spec.shape) for spec in tensors)
    stored = sum(spec.end - spec.start for spec in tensors)
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    if stored + KEPT_BYTES > free:  # better said than killed by the system in the middle
        raise ExportError(
            f"{merged_dir}: is merged but not verified: that takes one of the two models in memory at a time, "
            f"{(stored + KEPT_BYTES) / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}. Close other "
            "programs, or copy the run to a larger machine, and merge again there. Until then it cannot be pushed."
        )
    return torch.float32 if 4 * parameters * 1.3 + (1 << 30) < free else None


def load_saved_tokenizer(folder: Path) -> Any:
    """Load an exported folder's own tokenizer; one that does not load is an ExportError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder}: its tokenizer does not load ({str(error).splitlines()[0]}). Merge again with `tokenizer_dir`."
        ) from None


def load_whole(folder: Path, dtype: torch.dtype | None, device: str) -> Any:
    """Load a model folder in eval mode; weights that are missing or of another shape are an ExportError."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"{folder}: does not load ({str(error).splitlines()[0]}). Fetch or merge it again.") from None
    wrong = sorted([*info["missing_keys"], *info["mismatched_keys"]], key=str)
    if wrong:
        raise ExportError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, for example {wrong[0]}. The config and "
            "the weights are of different models: fetch or merge it again."
        )
    keep_odd_widths_unpacked(model)
    return model.to(device).eval()


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


def copy_files(model_dir: Path, tokenizer_dir: Path, out_dir: Path) -> None:
    """Copy generation config, custom code and licences from one folder, tokenizer and chat template from another.

    Raises:
        ExportError: `tokenizer_dir` was given apart from `model_dir` and holds no tokenizer.
    """
    for pattern in _MODEL_FILES:
        _copy_matching(model_dir, pattern, out_dir)
    copied = [name for pattern in _TOKENIZER_FILES for name in _copy_matching(tokenizer_dir, pattern, out_dir)]
    if not copied and tokenizer_dir != model_dir:
        raise ExportError(
            f"{tokenizer_dir}: holds no tokenizer (tokenizer.json, tokenizer_config.json, …). Give the folder that the "
            "tokenizer was saved to, or leave it out to take the base's."
        )
    if not copied:
        logger.warning("%s has no tokenizer, so the export has none: add one before using it.", model_dir)


def _copy_matching(folder: Path, pattern: str, out_dir: Path) -> list[str]:
    names = []
    for path in sorted(folder.glob(pattern)):
        if path.is_file():  # through links: the Hub's cache is made of them
            name = path.relative_to(folder)
            (out_dir / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out_dir / name)
            names.append(name.as_posix())
    return names


def read_base_config(base_dir: Path) -> dict[str, Any]:
    """Return the base's config.json; a missing, broken or quantised one is an ExportError."""
    path = base_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path}: cannot be read ({error}). The folder of the base has to hold its config.json: fetch it again."
        ) from None
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if quantization := section.get("quantization_config"):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise ExportError(
                f"{path}: the base is quantised (quantization_config, method {method}). Merging into quantised weights "
                "loses most of what was learnt: only a 16-bit base is merged onto. Give the original model's folder or "
                "id (the name without -bnb-4bit, -GPTQ, -AWQ, -FP8)."
            )
    return config
