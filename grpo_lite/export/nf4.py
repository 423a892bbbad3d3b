"""Quantise a merged folder to 4-bit NF4 with bitsandbytes, ready to load, and measure what that costs."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_lite.errors import ExportError
from grpo_lite.export.folder import replacing_folder
from grpo_lite.export.merge.names import tensor_names
from grpo_lite.export.model_folder import copy_files, load_saved_tokenizer, load_whole, read_base_config
from grpo_lite.export.proof import Agreement, agreement, last_logits, positions_kept, tokenize
from grpo_lite.export.safetensors import open_checkpoint
from grpo_lite.files.manifest import MANIFEST_NAME, sha256_of, verify_manifest, write_manifest
from grpo_lite.models.base import weights_bytes

NF4_RECORD = "nf4.json"


@dataclass(frozen=True)
class Nf4Record:
    """What the quantisation cost; saved as nf4.json in the exported folder."""

    size_bytes: int  # of the weights
    merged_bytes: int
    prompts: int
    positions: int
    agreement: Agreement  # reference: the merged model
    left_out: int  # tensors of heads for more tokens (mtp), which the class that quantises does not have
    merged_sha256: str | None  # of the merged folder's manifest, if it has one

    def to_json(self) -> dict[str, Any]:
        """Return plain data for nf4.json."""
        return dataclasses.asdict(self)


def export_nf4(
    merged_dir: Path,
    out_dir: Path,
    prompts: Sequence[str],
    *,
    device: str = "cpu",
    overwrite: bool = False,
) -> Nf4Record:
    """Quantise a merged folder to NF4 (double-quantised), save it, reload it and measure what was lost.

    Args:
        prompts: held-out prompts as rendered text; the loss is measured on their last positions.
        device: where to quantise and measure, "cpu" or "cuda".

    Raises:
        ExportError: bitsandbytes is missing, the folder is not a merged 16-bit model, or writing fails.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ExportError("export_nf4: bitsandbytes is not installed. Install it: pip install bitsandbytes.")
    read_base_config(merged_dir)  # refuses quantised ones
    if (merged_dir / MANIFEST_NAME).is_file():
        verify_manifest(merged_dir)
    shards = open_checkpoint(merged_dir)
    merged_bytes = sum(shard.path.stat().st_size for shard in shards)
    sequences = tokenize(load_saved_tokenizer(merged_dir), prompts)

    model = load_whole(merged_dir, None, device)
    keep = positions_kept(model.config.get_text_config().vocab_size, len(sequences), 0)
    reference = [last_logits(model, ids, keep) for ids in sequences]
    dtype = model.dtype
    del model
    gc.collect()

    with replacing_folder(out_dir, merged_bytes // 2, overwrite, [merged_dir]) as partial:
        _quantise(merged_dir, partial, dtype, device)
        copy_files(merged_dir, partial)
        model = load_whole(partial, dtype, device)
        quantised = [last_logits(model, ids, keep) for ids in sequences]
        del model
        gc.collect()
        record = Nf4Record(
            size_bytes=weights_bytes(partial),
            merged_bytes=merged_bytes,
            prompts=len(sequences),
            positions=sum(len(logits) for logits in reference),
            agreement=agreement(reference, quantised),
            left_out=sum(name.startswith("mtp.") for shard in shards for name in shard.tensors)
            - sum(name.startswith("mtp.") for shard in open_checkpoint(partial) for name in shard.tensors),
            merged_sha256=sha256_of(manifest) if (manifest := merged_dir / MANIFEST_NAME).is_file() else None,
        )
        (partial / NF4_RECORD).write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")
        write_manifest(partial)
    return record


def _quantise(merged_dir: Path, out_dir: Path, dtype: torch.dtype, device: str) -> None:
    """Write a folder in NF4; of a multimodal model the text tower is in it, and the other towers stay in 16 bits."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    tensors = (name for shard in open_checkpoint(merged_dir) for name in shard.tensors)
    beside = tensor_names(merged_dir, tensors).other_towers
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # its name for 4 bits too; "model." as the whole class calls them
        llm_int8_skip_modules=["lm_head", *(f"model.{part}" for part in beside)] if beside else None,
    )
    model_class = AutoModelForImageTextToText if beside else AutoModelForCausalLM
    model = model_class.from_pretrained(
        merged_dir, quantization_config=quantization, dtype=dtype, device_map={"": device}
    )
    # Before any forward: on CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weights on the first one.
    model.save_pretrained(out_dir)
    for path in out_dir.glob("*.safetensors"):  # which the library makes readable to the owner only
        path.chmod((out_dir / "config.json").stat().st_mode)
