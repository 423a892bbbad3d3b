"""The tensors of a GGUF: planned from safetensors headers, then streamed a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_lite.errors import ExportError
from grpo_lite.gguf_arch import interleave_halves, rope_frequency_factors, rotary_heads, tensor_names
from grpo_lite.shards import FLOATS, Shard, TensorSpec, open_checkpoint

_BLOCK_BYTES = 64 << 20  # of float32 rows in memory at once
_Q8_BLOCK = 32  # values that share a scale
Progress = Callable[[str, int, int], None]  # tensor, bytes written, bytes in all


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the GGUF: where it comes from and how it is stored."""

    name: str
    shard: Shard
    spec: TensorSpec
    kind: Any  # gguf.GGMLQuantizationType
    heads: int | None  # whose rotary rows are reordered
    size_bytes: int


def plan_tensors(folder: Path, config: Mapping[str, Any], arch: str, kind: str) -> list[TensorPlan]:
    """Return every tensor with its llama.cpp name and storage, in file order.

    Args:
        kind: f16, bf16 or q8_0, for the matrices.

    Raises:
        ExportError: a tensor that the architecture has no place for, or embeddings at odds with the config.
    """
    names = tensor_names(arch, int(config["num_hidden_layers"]))
    plans: dict[str, TensorPlan] = {}
    for shard in open_checkpoint(folder):
        for spec in shard.tensors.values():
            if spec.name.endswith("rotary_emb.inv_freq"):  # old checkpoints carry it; it is computed
                continue
            name = names.get_name(spec.name, try_suffixes=(".weight", ".bias"))
            if name == "output.weight" and config.get("tie_word_embeddings"):
                continue
            if name is None or spec.dtype not in FLOATS or len(spec.shape) not in (1, 2):
                raise ExportError(
                    f"{shard.path}: tensor {spec.name} ({spec.dtype}, {list(spec.shape)}) has no place in a GGUF of "
                    f"architecture {arch}. Merge again, or convert with llama.cpp's own converter."
                )
            stored = _storage(spec, kind)
            heads = rotary_heads(arch, spec.name, config)
            plans[name] = TensorPlan(name, shard, spec, stored, heads, _stored_bytes(spec, stored))
    rows = plans["token_embd.weight"].spec.shape[0] if "token_embd.weight" in plans else None
    if rows != config["vocab_size"]:
        raise ExportError(
            f"{folder}: the embedding has {rows} rows, config.json says vocab_size {config['vocab_size']}. Merge again."
        )
    if not config.get("tie_word_embeddings") and "output.weight" not in plans:
        raise ExportError(f"{folder}: there is no lm_head.weight, and config.json does not tie it. Merge again.")
    return list(plans.values())


def _storage(spec: TensorSpec, kind: str) -> Any:
    from gguf import GGMLQuantizationType as Type

    if len(spec.shape) == 1:
        return Type.F32  # llama.cpp computes norms and biases in it
    if kind == "q8_0":
        return Type.Q8_0 if spec.shape[1] % _Q8_BLOCK == 0 else Type.F16  # as llama.cpp does for odd widths
    return {"f16": Type.F16, "bf16": Type.BF16}[kind]


def _stored_bytes(spec: TensorSpec, stored: Any) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[stored]
    return math.prod(spec.shape) // block * size


def write_tensors(
    writer: Any, plans: Sequence[TensorPlan], config: Mapping[str, Any], progress: Progress | None
) -> int:
    """Write header, metadata, tensor list and tensors through a `gguf.GGUFWriter`, close it, return their number.

    Raises:
        ExportError: a weight is not finite, or beyond float16 where that was asked for.
    """
    factors = rope_frequency_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", list(factors.shape), np.dtype(np.float32), factors.nbytes)
    for plan in plans:
        writer.add_tensor_info(plan.name, list(plan.spec.shape), np.dtype(np.float32), plan.size_bytes, plan.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    expected = file.tell() + sum(
        writer.ggml_pad(info.nbytes, writer.data_alignment) for info in writer.tensors[0].values()
    )
    total, done = sum(plan.size_bytes for plan in plans), 0
    try:
        if factors is not None:
            file.write(factors.numpy().tobytes())
            writer.write_padding(file, factors.nbytes)
        for plan in plans:
            for block in _blocks(plan):
                file.write(block)
                done += len(block)
                if progress:
                    progress(plan.name, done, total)
            writer.write_padding(file, plan.size_bytes)
        if file.tell() != expected:
            raise ExportError(f"{file.name}: {file.tell()} bytes were written, {expected} announced. Report this.")
    finally:
        writer.close()
    return len(plans) + (factors is not None)


def _blocks(plan: TensorPlan) -> Iterator[bytes]:
    """Read a tensor a block of rows at a time, reorder and encode it."""
    spec = plan.spec
    rows = spec.shape[0]
    per_row = 4 * (spec.shape[1] if len(spec.shape) == 2 else 1)
    step = rows if plan.heads else max(1, _BLOCK_BYTES // per_row)
    for start in range(0, rows, step):
        block = plan.shard.read(spec, start, start + step)
        if plan.heads:
            block = interleave_halves(block, plan.heads)
        yield _encode(block, plan)


def _encode(block: torch.Tensor, plan: TensorPlan) -> bytes:
    from gguf import GGMLQuantizationType as Type
    from gguf import quants

    where = f"{plan.shard.path}: tensor {plan.spec.name}"
    if not bool(torch.isfinite(block).all()):
        raise ExportError(f"{where} holds NaN or infinity. Train or merge it again.")
    if plan.kind == Type.BF16 and block.dtype == torch.bfloat16:
        return block.view(torch.int16).numpy().tobytes()
    if plan.kind == Type.BF16:
        return block.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    if plan.kind == Type.F32:
        return block.to(torch.float32).numpy().tobytes()
    if plan.kind == Type.F16:
        half = block.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ExportError(
                f"{where} has values beyond float16's 65504. Allowed for it: --gguf bf16, q8_0 and the K-quants."
            )
        return half.numpy().tobytes()
    return quants.quantize(block.to(torch.float32).numpy(), plan.kind).tobytes()
