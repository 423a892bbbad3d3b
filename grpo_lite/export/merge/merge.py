"""Merge a LoRA adapter into its base in 16 bits, a block of rows at a time.

Each target weight becomes `W + scaling · B·A` in float32, rounded once to the base's dtype; all else is copied. Where
rounding to the nearest would undo the update, as it does for most small updates of reinforcement learning in bfloat16,
the rounding is stochastic (docs/measurements/merge.md). Names, shards and index stay the base's. The blocks stream from
the base through the change into the new file and are hashed on both sides, so memory stays at a few blocks however
large the model is. The finished folder appears under its name in one step, or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

import grpo_lite
from grpo_lite.errors import ExportError, NothingToMerge
from grpo_lite.export.folder import replacing_folder
from grpo_lite.export.merge.adapter import Adapter, LoraFactors, open_adapter
from grpo_lite.export.merge.names import TensorNames, tensor_names
from grpo_lite.export.merge.plan import Change, MergePlan, make_plan
from grpo_lite.export.merge.trained_base import TrainedBase
from grpo_lite.export.model_folder import copy_chat_template, copy_files, read_base_config
from grpo_lite.export.safetensors import (
    FLOATS,
    INDEX_NAME,
    SINGLE_NAME,
    Shard,
    build_head,
    open_checkpoint,
    row_blocks,
)
from grpo_lite.files.manifest import MANIFEST_NAME, read_manifest, sha256_of, write_manifest
from grpo_lite.models.adapter import WEIGHTS_NAME

Progress = Callable[[str, int, int], None]  # shard's name, bytes written, bytes in all

MERGE_RECORD = "merge.json"
# A tensor that loses more of its update is rounded stochastically. Measured on an adapter of 6 GRPO steps: nearest
# loses 79 % and leaves the merged model 1.7e-2 nats from base + adapter; rounded stochastically it is 8e-5 away.
MAX_NEAREST_LOSS = 0.1
_COPY_BYTES = 8 << 20
_FLOAT32_NOISE = 2e-7  # relative; an untrained DoRA's norms and magnitudes differ by about 5e-8
_MARGIN_BYTES = 64 << 20  # for tokenizer, config and manifest


@dataclass(frozen=True)
class MergeRecord:
    """What a merge did; saved as merge.json in the merged folder."""

    base: str | None  # as the adapter recorded it; None where it recorded a path of the training machine
    adapter_sha256: str
    onto: str  # "original": the checkpoint's weights; "trained": those that 4-bit training read
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
    other_towers: Mapping[str, int]  # tensors of a multimodal base beside its text tower, copied bit for bit, by part
    wall_s: float
    grpo_lite: str

    @property
    def copied_line(self) -> str | None:
        """One line for people on what lies beside the text tower; None: the base is no multimodal model."""
        if not self.other_towers:
            return None
        parts = ", ".join(f"{name} {count}" for name, count in self.other_towers.items())
        total = sum(self.other_towers.values())
        return f"{total} tensors beside the text tower are copied unchanged ({parts})"

    def to_json(self) -> dict[str, Any]:
        """Return plain data for merge.json."""
        return dataclasses.asdict(self)


def merge_adapter(
    base_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    trained: TrainedBase | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeRecord:
    """Merge an adapter onto its base and write a folder in the base's dtype that transformers loads.

    Args:
        base_dir: config.json and safetensors of the base, in float32, bfloat16 or float16.
        adapter_dir: what PEFT's save_pretrained wrote; checked against its manifest where it has one.
        trained: the base as 4-bit training read it, to merge onto; None: the weights of `base_dir`.
        out_dir: must not exist, unless `overwrite` and grpo_lite made it.
        progress: called with the shard's name, the bytes written and the bytes in all.

    Raises:
        ExportError: anything missing, corrupt, unsupported or at odds; nothing then lies under `out_dir`'s name that
            was not there before.
    """
    began = time.monotonic()
    base_dir, adapter_dir, out_dir = Path(base_dir), Path(adapter_dir), Path(out_dir)
    config, shards, adapter, names, plan = _planned(base_dir, adapter_dir, trained)
    adapter_sha256 = sha256_of(adapter_dir / WEIGHTS_NAME)
    _check_not_merged_before(base_dir, adapter_sha256)
    total = sum(len(shard.head) + sum(s.end - s.start for s in shard.tensors.values()) for shard in shards)
    total += sum(change.source.end - change.source.start for change in plan.added.values())
    with replacing_folder(out_dir, total + _MARGIN_BYTES, overwrite, [base_dir, adapter_dir]) as partial:
        writer = ShardWriter(partial, plan, adapter, _expected_digests(base_dir), progress, total)
        for shard in shards:
            writer.write(shard)
        copy_files(base_dir, partial)
        copy_chat_template(adapter_dir, partial)
        _write_config(base_dir, config, plan, partial)
        _write_index(base_dir, plan, shards, partial)
        onto = "trained" if trained else "original"
        record = _record(writer, shards, names, adapter_sha256, onto, total, time.monotonic() - began)
        (partial / MERGE_RECORD).write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")
        write_manifest(partial, writer.digests)
    return record


def check_fit(base_dir: Path, adapter_dir: Path, trained: TrainedBase) -> None:
    """Raise the ExportError that `merge_adapter` would raise before it writes anything, if there is one."""
    _planned(base_dir, adapter_dir, trained)


def _planned(
    base_dir: Path, adapter_dir: Path, trained: TrainedBase | None
) -> tuple[dict[str, Any], list[Shard], Adapter, TensorNames, MergePlan]:
    config = read_base_config(base_dir)
    shards = open_checkpoint(base_dir)
    adapter = open_adapter(adapter_dir)
    names = tensor_names(base_dir, (name for shard in shards for name in shard.tensors))
    return config, shards, adapter, names, make_plan(config, shards, adapter, names, trained)


@dataclass
class Tally:
    """Sums over the changed tensors, taken while they stream by."""

    base_squares: float = 0.0
    update_squares: float = 0.0
    error_squares: float = 0.0
    changed: int = 0
    elements: int = 0


class ShardWriter:
    """Writes shard after shard; `digests`, `tally`, `unchanged` and `dithered` then hold the outcome."""

    def __init__(
        self,
        folder: Path,
        plan: MergePlan,
        adapter: Adapter,
        expected: Mapping[str, str],
        progress: Progress | None,
        total: int,
    ) -> None:
        self.folder, self.plan, self.adapter, self.expected = folder, plan, adapter, expected
        self.progress, self.total, self.done = progress, total, 0
        self.digests: dict[str, str] = {}
        self.tally = Tally()
        self.unchanged: list[str] = []
        self.dithered = 0

    def write(self, shard: Shard) -> None:
        """Write one shard with its changes applied and its added tensors at the end."""
        name = shard.path.name
        own = {spec.name for spec in shard.tensors.values()}
        added = {key: change for key, change in self.plan.added.items() if change.source.name in own}
        specs = [(spec.name, spec.dtype, spec.shape) for spec in shard.tensors.values()]
        specs += [(key, change.source.dtype, change.source.shape) for key, change in added.items()]
        head = build_head(specs, shard.metadata) if added else shard.head
        read = hashlib.sha256(shard.head) if name in self.expected else None
        written = hashlib.sha256()
        with open(self.folder / name, "wb") as file:
            self._put(file, written, head, name)
            for spec in shard.tensors.values():
                change = self.plan.changes.get(spec.name)
                for source, block in self._blocks(shard, spec.name, change):
                    if read:
                        read.update(source)
                    self._put(file, written, block, name)
            for key, change in added.items():
                for _, block in self._blocks(shard, key, change):
                    self._put(file, written, block, name)
        if read and read.hexdigest() != self.expected[name]:
            raise ExportError(
                f"{shard.path}: is corrupted: its sha256 is {read.hexdigest()[:16]}…, recorded is "
                f"{self.expected[name][:16]}…. Nothing was merged: delete the file and fetch it again."
            )
        self.digests[name] = written.hexdigest()

    def _blocks(self, shard: Shard, name: str, change: Change | None) -> Iterator[tuple[Any, Any]]:
        """Yield (bytes read, bytes to write) of one tensor, in order."""
        if change is None:
            spec = shard.tensors[name]
            for start in range(spec.start, spec.end, _COPY_BYTES):
                data = shard.read_bytes(start, min(_COPY_BYTES, spec.end - start))
                yield data, data
            return
        before, generator = self.tally.changed, None
        trained = change.lora is not None or change.replacement is not None
        blocks = zip(row_blocks(change.source.shape), merged_blocks(change, self.adapter.shard), strict=True)
        for number, (rows, (base, merged)) in enumerate(blocks):
            rounded = merged.to(base.dtype)
            if trained:
                share = self._count(name, base, merged, rounded)
                if number == 0 and share > MAX_NEAREST_LOSS and base.dtype != torch.float32:
                    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                    self.dithered += 1
            if generator is not None:
                rounded = round_stochastically(merged, base.dtype, generator)
            if trained:
                self.tally.changed += int((rounded != base).sum())
            stored = base if change.weight is None else change.shard.read(change.source, *rows)
            yield _bytes_of(stored), _bytes_of(rounded)
        if self.tally.changed == before and trained:
            self.unchanged.append(name)

    def _count(self, name: str, base: torch.Tensor, merged: torch.Tensor, rounded: torch.Tensor) -> float:
        """Add a block to the tally; return the share of its update that rounding to the nearest loses."""
        base32 = base.float()
        error, squares, update = (
            float(torch.linalg.vector_norm(part)) ** 2 for part in (rounded.float() - merged, base32, merged - base32)
        )
        if not math.isfinite(error + squares):
            whose = "the base" if not math.isfinite(squares) else "the merged weight"
            raise ExportError(
                f"{name}: {whose} holds NaN or infinity (in {rounded.dtype}). Only finite weights are merged: fetch "
                "the base again, or merge an adapter trained with a lower learning rate."
            )
        self.tally.base_squares += squares
        self.tally.update_squares += update
        self.tally.error_squares += error
        self.tally.elements += base.numel()
        return math.sqrt(error / update) if update else 0.0

    def _put(self, file: BinaryIO, digest: Any, data: Any, name: str) -> None:
        file.write(data)
        digest.update(data)
        self.done += len(data)
        if self.progress:
            self.progress(name, min(self.done, self.total), self.total)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def merged_blocks(change: Change, adapter: Shard) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (base block in its own dtype, merged block in float32) for consecutive rows of the stored tensor."""
    base_rows = _reader(change)
    if change.replacement is not None:
        for start, end in row_blocks(change.source.shape):
            yield base_rows(start, end), adapter.read(change.replacement, start, end).float()
    elif change.lora is None:  # an untied head that stays what the embedding was, or a weight as training read it
        for start, end in row_blocks(change.source.shape):
            block = base_rows(start, end)
            yield block, block.float()
    else:
        yield from _lora_blocks(change, change.lora, adapter, base_rows)


Reader = Callable[[int, int], torch.Tensor]  # rows from, to


def _reader(change: Change) -> Reader:
    """Return what reads rows of the base's tensor in the dtype and layout in which it is stored."""
    if change.weight is None:
        return partial(change.shard.read, change.source)
    weight = change.weight().to(FLOATS[change.source.dtype])
    stored = weight.T if change.transposed else weight
    return lambda start, end: stored[start:end]


def _lora_blocks(
    change: Change, lora: LoraFactors, adapter: Shard, base_rows: Reader
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    a, b = adapter.read(lora.a).float(), adapter.read(lora.b).float()  # (r, in), (out, r)
    left, right = (a.T, b.T) if change.transposed else (b, a)
    magnitude = adapter.read(lora.magnitude).float().reshape(-1) if lora.magnitude is not None else None  # (out,)
    factor = None
    if magnitude is not None and change.transposed:
        factor = magnitude / _column_norms(change, base_rows, left, right, lora.scaling)
    for start, end in row_blocks(change.source.shape):
        base = base_rows(start, end)
        merged = base.float() + left[start:end] @ right * lora.scaling
        if factor is not None:
            merged *= factor
        elif magnitude is not None:
            merged *= (magnitude[start:end] / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
        yield base, merged


def _column_norms(
    change: Change, base_rows: Reader, left: torch.Tensor, right: torch.Tensor, scaling: float
) -> torch.Tensor:
    """DoRA's norm per output feature where the outputs are columns: it spans all blocks, so it needs its own pass."""
    squares = torch.zeros(right.shape[1], dtype=torch.float64)
    for start, end in row_blocks(change.source.shape):
        block = base_rows(start, end).float() + left[start:end] @ right * scaling
        squares += block.double().square().sum(dim=0)
    return squares.sqrt().float()


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round float32 values to one of their two neighbours in a 16-bit dtype, the nearer one more often.

    The chance of each neighbour makes the expected value exact, so an update smaller than the spacing of the dtype
    survives in sum where rounding to the nearest would undo it element by element. Values that the dtype holds stay.
    """
    dropped_bits = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    noise = torch.randint(0, 1 << dropped_bits, values.shape, dtype=torch.int32, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) & -(1 << dropped_bits)
    rounded = bits.view(torch.float32).to(dtype)
    if dtype == torch.float16:  # its subnormals drop more bits; nearest is close enough there
        return torch.where(values.abs() < 2.0**-14, values.to(dtype), rounded)
    return rounded


def _record(
    writer: ShardWriter,
    shards: list[Shard],
    names: TensorNames,
    adapter_sha256: str,
    onto: str,
    size_bytes: int,
    wall_s: float,
) -> MergeRecord:
    """Return the record, or refuse a merge that changed nothing."""
    plan, adapter = writer.plan, writer.adapter
    tally, changes = writer.tally, {**plan.changes, **plan.added}
    applied = [change for change in changes.values() if change.lora or change.replacement]
    dtypes = sorted({change.source.dtype for change in applied})
    relative_update = math.sqrt(tally.update_squares / tally.base_squares) if tally.base_squares else 1.0
    if not tally.changed or relative_update < _FLOAT32_NOISE:
        raise NothingToMerge(
            f"the merged weights equal the base's to rounding: the update's relative size is {relative_update:.1e}, "
            "below what float32 tells apart. Train for more steps or with a higher learning rate"
        )
    recorded = adapter.config.get("base_model_name_or_path")
    return MergeRecord(
        base=recorded if recorded and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", recorded) else None,
        adapter_sha256=adapter_sha256,
        onto=onto,
        dtype="/".join(dtypes),
        tensors=sum(len(shard.tensors) for shard in shards) + len(plan.added),
        tensors_merged=sum(change.lora is not None for change in applied),
        tensors_replaced=sum(change.replacement is not None for change in applied),
        untied=plan.untied,
        shards=len(shards),
        size_bytes=size_bytes,
        relative_update=relative_update,
        nearest_loss=math.sqrt(tally.error_squares / tally.update_squares),
        tensors_dithered=writer.dithered,
        changed_share=tally.changed / tally.elements,
        unchanged=tuple(writer.unchanged),
        other_towers=dict(names.other_towers),
        wall_s=round(wall_s, 2),
        grpo_lite=grpo_lite.__version__,
    )


def _check_not_merged_before(base_dir: Path, adapter_sha256: str) -> None:
    path = base_dir / MERGE_RECORD
    if path.is_file() and adapter_sha256 in path.read_text(encoding="utf-8", errors="replace"):
        raise ExportError(
            f"{base_dir}: this adapter is merged into it already ({MERGE_RECORD}), and must not be merged twice. Give "
            "the folder or id of the original base."
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
        if isinstance(text := config.get("text_config"), dict):
            changed["text_config"] = text | {"tie_word_embeddings": False}
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
