"""Merge a LoRA adapter into its 16-bit base, a block of rows at a time.

Each target weight becomes `W + scaling · B·A` in float32, rounded once to the base's dtype; all else is copied. Where
rounding to the nearest would undo the update, as it does for most of reinforcement learning's small ones in bfloat16,
the rounding is stochastic (docs/measurements/merge.md). Names, shards and index stay the base's. Memory stays at a few
blocks however large the model is, and the finished folder appears under its name in one step, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpo_lite
from grpo_lite.errors import ExportError
from grpo_lite.export_folder import copy_files, replacing_folder
from grpo_lite.lora_adapter import WEIGHTS_NAME, open_adapter
from grpo_lite.manifest import MANIFEST_NAME, read_manifest, sha256_of, write_manifest
from grpo_lite.merge_plan import MergePlan, make_plan, read_base_config
from grpo_lite.merge_write import Progress, ShardWriter
from grpo_lite.shards import INDEX_NAME, SINGLE_NAME, Shard, open_checkpoint

RECORD_NAME = "merge.json"
_FLOAT32_NOISE = 2e-7  # relative; an untrained DoRA's norms and magnitudes differ by about 5e-8
_MARGIN_BYTES = 64 << 20  # for tokenizer, config and manifest


@dataclass(frozen=True)
class MergeRecord:
    """What a merge did; saved as merge.json in the merged folder."""

    base: str | None  # as the adapter recorded it; None where it recorded a path of the training machine
    adapter_sha256: str
    dtype: str  # of the changed tensors
    tensors: int
    tensors_merged: int  # by LoRA
    tensors_replaced: int  # by modules_to_save
    untied: bool  # the output head got a tensor of its own
    shards: int
    size_bytes: int
    relative_update: float  # ‖ΔW‖ / ‖W‖ over the changed tensors
    nearest_loss: float  # ‖nearest(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖: what rounding to the nearest would take of the update
    tensors_dithered: int  # rounded stochastically, because their nearest_loss is above MAX_NEAREST_LOSS
    changed_share: float  # of the changed tensors' elements, those that differ from the base after rounding
    unchanged: tuple[str, ...]  # tensors whose whole update was lost to rounding, or was zero
    wall_s: float
    grpo_lite: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data for merge.json."""
        return dataclasses.asdict(self)


def merge_adapter(
    base_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    tokenizer_dir: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeRecord:
    """Merge an adapter onto its 16-bit base and write a folder that transformers loads.

    Args:
        base_dir: config.json and safetensors of the base, in float32, bfloat16 or float16.
        adapter_dir: what PEFT's save_pretrained wrote; checked against its manifest where it has one.
        out_dir: must not exist, unless `overwrite` and grpo_lite made it.
        tokenizer_dir: where tokenizer and chat template come from; the base by default.
        progress: called with the shard's name, the bytes written and the bytes in all.

    Raises:
        ExportError: anything missing, corrupt, unsupported or at odds; nothing then lies under `out_dir`'s name that
            was not there before.
    """
    began = time.monotonic()
    base_dir, adapter_dir, out_dir = Path(base_dir), Path(adapter_dir), Path(out_dir)
    config = read_base_config(base_dir)
    shards = open_checkpoint(base_dir)
    adapter = open_adapter(adapter_dir)
    plan = make_plan(config, shards, adapter)
    adapter_sha256 = sha256_of(adapter_dir / WEIGHTS_NAME)
    _check_not_merged_before(base_dir, adapter_sha256)
    total = sum(len(shard.head) + sum(s.end - s.start for s in shard.tensors.values()) for shard in shards)
    total += sum(change.source.end - change.source.start for change in plan.added.values())
    protected = [base_dir, adapter_dir, *([tokenizer_dir] if tokenizer_dir else [])]
    with replacing_folder(out_dir, total + _MARGIN_BYTES, overwrite, protected) as partial:
        writer = ShardWriter(partial, plan, adapter, _expected_digests(base_dir), progress, total)
        for shard in shards:
            writer.write(shard)
        copy_files(base_dir, tokenizer_dir or base_dir, partial)
        _write_config(base_dir, config, plan, partial)
        _write_index(base_dir, plan, shards, partial)
        record = _record(writer, shards, adapter_sha256, total, time.monotonic() - began)
        (partial / RECORD_NAME).write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")
        write_manifest(partial, writer.digests)
    return record


def _record(
    writer: ShardWriter, shards: list[Shard], adapter_sha256: str, size_bytes: int, wall_s: float
) -> MergeRecord:
    """Return the record, or refuse a merge that changed nothing."""
    plan, adapter = writer.plan, writer.adapter
    tally, changes = writer.tally, {**plan.changes, **plan.added}
    made = [change for change in changes.values() if change.lora or change.replacement]
    dtypes = sorted({change.source.dtype for change in made})
    relative_update = math.sqrt(tally.update_squares / tally.base_squares) if tally.base_squares else 1.0
    if not tally.changed or relative_update < _FLOAT32_NOISE:
        raise ExportError(
            f"{adapter.folder}: the merged weights equal the base's to rounding: the update's relative size is "
            f"{relative_update:.1e}, below what float32 tells apart. Expected: a trained adapter. Train for more steps "
            "or with a higher learning rate."
        )
    recorded = adapter.config.get("base_model_name_or_path")
    return MergeRecord(
        base=recorded if recorded and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", recorded) else None,
        adapter_sha256=adapter_sha256,
        dtype="/".join(dtypes),
        tensors=sum(len(shard.tensors) for shard in shards) + len(plan.added),
        tensors_merged=sum(change.lora is not None for change in made),
        tensors_replaced=sum(change.replacement is not None for change in made),
        untied=plan.untied,
        shards=len(shards),
        size_bytes=size_bytes,
        relative_update=relative_update,
        nearest_loss=math.sqrt(tally.error_squares / tally.update_squares),
        tensors_dithered=writer.dithered,
        changed_share=tally.changed / tally.elements,
        unchanged=tuple(writer.unchanged),
        wall_s=round(wall_s, 2),
        grpo_lite=grpo_lite.__version__,
    )


def _check_not_merged_before(base_dir: Path, adapter_sha256: str) -> None:
    path = base_dir / RECORD_NAME
    if path.is_file() and adapter_sha256 in path.read_text(encoding="utf-8", errors="replace"):
        raise ExportError(
            f"{base_dir}: already is this adapter merged onto its base ({RECORD_NAME}). Again would be twice: "
            "give the folder or id of the original base."
        )


def _expected_digests(base_dir: Path) -> dict[str, str]:
    """Return sha256 sums known for the base's files: its manifest's, or the Hub cache's blob names."""
    if (base_dir / MANIFEST_NAME).is_file():
        return {name: entry.sha256 for name, entry in read_manifest(base_dir).items()}
    blobs = {path.name: path.resolve().name for path in base_dir.glob("*.safetensors") if path.is_symlink()}
    return {name: blob for name, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", blob)}


def _write_config(base_dir: Path, config: Mapping[str, Any], plan: MergePlan, folder: Path) -> None:
    changed = {key: value for key, value in config.items() if key != "_pre_quantization_dtype"}
    if plan.untied:
        changed["tie_word_embeddings"] = False
    if changed == config:
        shutil.copyfile(base_dir / "config.json", folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_index(base_dir: Path, plan: MergePlan, shards: list[Shard], folder: Path) -> None:
    if (base_dir / SINGLE_NAME).is_file():
        return
    index = json.loads((base_dir / INDEX_NAME).read_text(encoding="utf-8"))
    homes = {spec.name: shard.path.name for shard in shards for spec in shard.tensors.values()}
    for name, change in plan.added.items():
        index["weight_map"][name] = homes[change.source.name]
        metadata = index.get("metadata") or {}
        for key, more in (
            ("total_size", change.source.end - change.source.start),
            ("total_parameters", math.prod(change.source.shape)),
        ):
            if isinstance(metadata.get(key), int):
                metadata[key] += more
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
