"""Safetensors files read and written a slice at a time, so that no shard is ever held in memory.

Not the `safetensors` library: it maps whole files when reading and needs every tensor of a file at once when writing.
The format is a length, a JSON header and the bytes in order. So a shard's header is parsed and checked against the
file, and rows are read by offset and written in file order. Source: safetensors' README, "Format", version 0.8.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_lite.errors import ExportError

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
BLOCK_ELEMENTS = 1 << 19  # of a tensor in memory at once

_ITEM_BYTES = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"], 1),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 2),
    **dict.fromkeys(["U32", "I32", "F32"], 4),
    **dict.fromkeys(["U64", "I64", "F64"], 8),
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's name, safetensors dtype, shape and absolute byte range in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the first dimension); a vector counts as one column."""
        return (self.end - self.start) // self.shape[0] if self.shape and self.shape[0] else self.end - self.start


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header has been read and found consistent with the file's size."""

    path: Path
    head: bytes  # length and JSON header exactly as in the file
    metadata: dict[str, str]
    tensors: dict[str, TensorSpec]  # in file order

    def read(self, spec: TensorSpec, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Return rows `start:end` of a float tensor in its own dtype."""
        rows = spec.shape[0] if spec.shape else 1
        end = rows if end is None else min(end, rows)
        first = spec.start + start * spec.row_bytes
        data = self.read_bytes(first, (end - start) * spec.row_bytes)
        shape = (end - start, *spec.shape[1:]) if spec.shape else ()
        if not data:
            return torch.empty(shape, dtype=FLOATS[spec.dtype])
        return torch.frombuffer(data, dtype=FLOATS[spec.dtype]).reshape(shape)

    def read_bytes(self, first: int, count: int) -> bytearray:
        """Return `count` bytes from offset `first`; a file that became shorter is an ExportError."""
        data = bytearray(count)
        view = memoryview(data)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(first)
            done = 0
            while done < count:
                got = file.readinto(view[done:])
                if not got:
                    raise ExportError(f"{self.path}: ends at byte {first + done} while being read. Fetch it again.")
                done += got
        view.release()
        return data


def open_checkpoint(folder: Path) -> list[Shard]:
    """Read the headers of a folder's safetensors checkpoint, in the index's order of files.

    Raises:
        ExportError: no safetensors there, a shard missing, corrupt, truncated or at odds with the index.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():  # transformers, too, prefers it to an index
        return [open_shard(single)]
    if index.is_file():
        return _open_indexed(index)
    raise ExportError(_no_weights(folder))


def open_shard(path: Path) -> Shard:
    """Read and check one file's header: every byte of the file must belong to exactly one tensor."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = file.read(8)
            header_bytes = int.from_bytes(length, "little")
            if len(length) < 8 or header_bytes > min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"its header should end at byte {header_bytes + 8}, the file has {size}")
            header = file.read(header_bytes)
        specs = _parse_header(header, 8 + header_bytes)
        metadata = specs.pop("__metadata__", {})
        tensors = {spec.name: spec for spec in sorted(specs.values(), key=lambda spec: (spec.start, spec.end))}
        _check_coverage(tensors, 8 + header_bytes, size)
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"{path}: is not a whole safetensors file: {error}. It is truncated or corrupt: fetch or save it again."
        ) from None
    return Shard(path, length + header, metadata, tensors)


def build_head(specs: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Return length and header of a file that holds tensors (name, dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape in specs:
        end = offset + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the library aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that cover a tensor, each of at most BLOCK_ELEMENTS elements but at least one row."""
    if not shape:
        yield 0, 1
        return
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _parse_header(header: bytes, data_start: int) -> dict[str, Any]:
    parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    if not isinstance(parsed, dict):
        raise ValueError("its header is not a mapping")
    specs: dict[str, Any] = {}
    for name, entry in parsed.items():
        if name == "__metadata__":
            specs[name] = entry
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = [*shape, start, end]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets") from None
        if not isinstance(dtype, str):
            raise ValueError(f"tensor {name!r} has the dtype {dtype!r}")
        if any(not isinstance(number, int) or number < 0 for number in numbers) or start > end:
            raise ValueError(f"tensor {name!r} has an impossible shape or place: {shape}, {start}–{end}")
        if dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != end - start:
            raise ValueError(f"tensor {name!r} ({dtype}, {shape}) does not fill its {end - start} bytes")
        specs[name] = TensorSpec(name, dtype, shape, data_start + start, data_start + end)
    return specs


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("its header names a tensor twice")
    return mapping


def _check_coverage(tensors: dict[str, TensorSpec], data_start: int, size: int) -> None:
    place = data_start
    for spec in tensors.values():
        if spec.start != place:
            raise ValueError(f"tensor {spec.name!r} starts at byte {spec.start}, not {place}")
        place = spec.end
    if place != size:
        raise ValueError(f"its tensors end at byte {place}, the file has {size}")


def _open_indexed(index: Path) -> list[Shard]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if any(name != os.path.basename(name) or name in ("", ".", "..") for name in names):
            raise ValueError("a shard's name is a path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{index}: is not a usable index (`weight_map`): {error}. Fetch or save it again.") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ExportError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}. "
            "The index names them; fetch the model again (an interrupted download?)."
        )
    shards = [open_shard(index.parent / name) for name in names]
    for shard in shards:
        listed = {tensor for tensor, name in weight_map.items() if name == shard.path.name}
        if listed != set(shard.tensors):
            odd = sorted(listed ^ set(shard.tensors))
            raise ExportError(
                f"{shard.path}: holds other tensors than {index.name} says, for example {odd[0]!r}. "
                "The shards and the index are of different models: fetch them again."
            )
    return shards


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder. Give the folder of the 16-bit base (config.json and *.safetensors)."
    names = sorted(path.name for path in folder.iterdir())
    gguf = [name for name in names if name.endswith(".gguf")]
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth")) and "training_args" not in name]
    allowed = f"A merge needs {SINGLE_NAME}, or shards with {INDEX_NAME}, in 16 or 32 bits."
    if gguf:
        return (
            f"{folder}: only a GGUF is there ({gguf[0]}). {allowed} Convert it once with "
            "AutoModelForCausalLM.from_pretrained(folder, gguf_file=…), or give the Hub id of the 16-bit original."
        )
    if pickled:
        return (
            f"{folder}: only pickled weights are there ({pickled[0]}). {allowed} Convert them once: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    found = ", ".join(names[:5]) or "nothing"
    return (
        f"{folder}: no safetensors weights there (found: {found}). {allowed} Check the path or fetch the model again."
    )
