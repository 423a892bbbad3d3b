"""The arithmetic of a merge: a base tensor and its change, in float32, a block of rows at a time; and its rounding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grpo_lite.lora_adapter import LoraFactors
from grpo_lite.merge_plan import Change
from grpo_lite.shards import Shard, row_blocks


def merged_blocks(change: Change, adapter: Shard) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (base block in its own dtype, merged block in float32) for consecutive rows of the stored tensor."""
    if change.replacement is not None:
        for start, end in row_blocks(change.source.shape):
            yield (
                change.shard.read(change.source, start, end),
                adapter.read(change.replacement, start, end).float(),
            )
    elif change.lora is None:  # an untied head that stays what the embedding was
        for start, end in row_blocks(change.source.shape):
            block = change.shard.read(change.source, start, end)
            yield block, block.float()
    else:
        yield from _lora_blocks(change, change.lora, adapter)


def _lora_blocks(change: Change, lora: LoraFactors, adapter: Shard) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    a, b = adapter.read(lora.a).float(), adapter.read(lora.b).float()  # (r, in), (out, r)
    left, right = (a.T, b.T) if change.transposed else (b, a)
    magnitude = adapter.read(lora.magnitude).float().reshape(-1) if lora.magnitude is not None else None  # (out,)
    factor = None
    if magnitude is not None and change.transposed:
        factor = magnitude / _column_norms(change, left, right, lora.scaling)
    for start, end in row_blocks(change.source.shape):
        base = change.shard.read(change.source, start, end)
        merged = base.float() + left[start:end] @ right * lora.scaling
        if factor is not None:
            merged *= factor
        elif magnitude is not None:
            merged *= (magnitude[start:end] / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
        yield base, merged


def _column_norms(change: Change, left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """DoRA's norm per output feature where the outputs are columns: it spans all blocks, so it needs its own pass."""
    squares = torch.zeros(right.shape[1], dtype=torch.float64)
    for start, end in row_blocks(change.source.shape):
        block = change.shard.read(change.source, start, end).float() + left[start:end] @ right * scaling
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
