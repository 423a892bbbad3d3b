"""Attention on a CPU by matrix products over blocks of queries; backward needs queries, keys and values, no more.

PyTorch's kernel takes one prompt or completion a call, its keys concatenated behind the prompt's and spread over the
query heads, and autograd saves all of that. Here each block of queries is multiplied with the keys that it sees, key/
value heads shared, and backward computes the block's scores again. It is faster all the same: in bfloat16 the kernel
(PyTorch 2.13) reaches a fifth of what oneDNN's products reach on a CPU with AVX512-BF16. Scores are float32 always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_lite.engine.first_order import first_order

# Scores of a block: 2 MiB in float32, so that what is done to them stays in a CPU's cache.
BLOCK_SCORES = 1 << 19
LEAST_QUERIES = 32  # of a block, however many keys they see

Segments = Sequence[tuple[int, Sequence[int]]]


class _Part(NamedTuple):
    """A prompt, or a completion behind its prompt: tokens of the flat row."""

    prompt: slice  # empty for a prompt itself
    own: slice


def serves(query: Tensor) -> bool:
    """Return whether these states are on a CPU; on a GPU a kernel of its own is faster (`varlen.py`)."""
    return query.device.type == "cpu"


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """Attend within each prompt, and within each completion behind its prompt.

    Args:
        query: `(1, heads, T, D)`.
        key: `(1, key/value heads, T, D)`.
        value: `(1, key/value heads, T, D')`.
        segments: groups `(prompt length, completion lengths)`, in the order of the flat row T.
        scaling: of the scores; None for `D ** -0.5`.
        window: how many tokens each sees, its own among them; None for all.

    Returns:
        `(1, T, heads, D')`.
    """
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled("cpu"):  # which casts for SDPA
        query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
    out: Tensor = _Blockwise.apply(query, key, value, _parts(segments), scaling, window)
    return out


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        parts: list[_Part],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = parts, scaling, window
        work = _Work(query, key, value, parts, scaling, window)
        out = query.new_empty(query.size(2), query.size(1), value.size(3))
        with _products_of(query.dtype):
            for part in parts:
                keys, values = work.seen(part)
                for block in work.blocks(part):
                    weight = work.weight(block, keys)
                    work.put(out, block, torch.bmm(weight, values[:, block.keys]))
        return out.unsqueeze(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        parts, scaling, window = ctx.rest
        work = _Work(query, key, value, parts, scaling, window)
        upper = work.by_head(grad[0].transpose(0, 1))
        query_grad = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        key_grad, value_grad = torch.zeros_like(work.key), torch.zeros_like(work.value)
        with _products_of(query.dtype):
            for part in parts:
                keys, values = work.seen(part)
                keys_grad, values_grad = torch.zeros_like(keys), torch.zeros_like(values)
                for block in work.blocks(part):
                    weight = work.weight(block, keys)
                    above = work.rows(upper, block)
                    values_grad[:, block.keys] += torch.bmm(weight.transpose(1, 2), above)
                    slope = work.product(1, above, values[:, block.keys]).mul_(weight)
                    slope.addcmul_(weight, slope.sum(-1, keepdim=True), value=-1.0).mul_(scaling)
                    work.put(query_grad, block, torch.bmm(slope, keys[:, block.keys]))
                    keys_grad[:, block.keys] += torch.bmm(slope.transpose(1, 2), work.rows(work.query, block))
                before = part.prompt.stop - part.prompt.start
                for total, own in ((key_grad, keys_grad), (value_grad, values_grad)):
                    total[:, part.prompt] += own[:, :before]
                    total[:, part.own] += own[:, before:]
        grads = query_grad.transpose(0, 1), key_grad.to(key.dtype), value_grad.to(value.dtype)
        return (*(each.unsqueeze(0) for each in grads), None, None, None)


class _Block(NamedTuple):
    """Queries that are computed at once: tokens of the flat row, and what they see of their part's keys."""

    tokens: slice
    keys: slice
    outside: int  # how many lie outside the last query's window


class _Work:
    """The states of one call in the dtype of the scores, key/value heads first, and room for a block's scores."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, parts: list[_Part], scaling: float, window: int | None
    ) -> None:
        self.heads, self.shared = key.size(1), query.size(1) // key.size(1)
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query = self.by_head(query[0])
        self.key, self.value = key[0].to(self.dtype), value[0].to(self.dtype)  # (key/value heads, T, D)
        self.scaling, self.window = scaling, window
        most = max((self._scores(block) for part in parts for block in self.blocks(part)), default=0)
        self.room = [query.new_empty(most, dtype=self.dtype) for _ in range(3)]

    def by_head(self, states: Tensor) -> Tensor:
        """Return states `(heads, T, D)` as `(key/value heads, heads that share one, T, D)`."""
        return states.to(self.dtype).unflatten(0, (self.heads, self.shared))

    def seen(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Return a part's keys and values behind those of its prompt, `(key/value heads, keys, D)`."""
        whole = [torch.cat([each[:, part.prompt], each[:, part.own]], dim=1) for each in (self.key, self.value)]
        return whole[0], whole[1]

    def blocks(self, part: _Part) -> Iterator[_Block]:
        """Cut a part's queries into blocks."""
        before, first, last = part.prompt.stop - part.prompt.start, part.own.start, part.own.stop
        seen = before + last - first if self.window is None else min(before + last - first, self.window)
        size = max(LEAST_QUERIES, BLOCK_SCORES // (self.heads * self.shared * max(seen, 1)))
        for start in range(first, last, size):
            end = min(start + size, last)
            oldest = 0 if self.window is None else max(0, before + start - first - self.window + 1)
            newest = before + end - first
            outside = 0 if self.window is None else max(0, newest - self.window - oldest)
            yield _Block(slice(start, end), slice(oldest, newest), outside)

    def rows(self, states: Tensor, block: _Block) -> Tensor:
        """Return a block's queries, `(key/value heads, rows, D)`."""
        return states[:, :, block.tokens].flatten(1, 2)

    def weight(self, block: _Block, keys: Tensor) -> Tensor:
        """Return the softmax of a block's scores, `(key/value heads, rows, keys)`; the next block overwrites it."""
        scores = self.product(0, self.rows(self.query, block), keys[:, block.keys]).mul_(self.scaling)
        each = scores.unflatten(1, (self.shared, -1))
        size = each.size(2)
        each[..., -size:] += scores.new_full((size, size), float("-inf")).triu_(1)
        if block.outside:
            each[..., : block.outside] += scores.new_full((size, block.outside), float("-inf")).tril_(
                block.outside - size
            )
        return torch.softmax(scores, -1, out=self._view(2, scores.shape))

    def product(self, room: int, rows: Tensor, states: Tensor) -> Tensor:
        """Return `rows` times the transpose of `states`, in one of the places for scores."""
        out = self._view(room, torch.Size((rows.size(0), rows.size(1), states.size(1))))
        return torch.bmm(rows, states.transpose(1, 2), out=out)

    def put(self, out: Tensor, block: _Block, rows: Tensor) -> None:
        """Write a block's rows into `out`, `(T, heads, D)`."""
        each = rows.unflatten(1, (self.shared, -1)).permute(2, 0, 1, 3)
        out.unflatten(1, (self.heads, self.shared))[block.tokens] = each.to(out.dtype)

    def _scores(self, block: _Block) -> int:
        rows, keys = (each.stop - each.start for each in (block.tokens, block.keys))
        return self.heads * self.shared * rows * keys

    def _view(self, room: int, shape: torch.Size) -> Tensor:
        return self.room[room][: shape.numel()].view(shape)


def _parts(segments: Segments) -> list[_Part]:
    """Return the prompts and completions in the order of the flat row."""
    parts, token = [], 0
    for prompt, completions in segments:
        first = slice(token, token + prompt)
        parts.append(_Part(slice(token, token), first))
        token += prompt
        for length in completions:
            parts.append(_Part(first, slice(token, token + length)))
            token += length
    return [part for part in parts if part.own.stop > part.own.start]


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 tensors as such, those that hold bfloat16 numbers by bfloat16 instructions where a CPU has them.

    The products are exact and added in float32; what is computed between two products is rounded to bfloat16, as
    PyTorch's kernel rounds it.
    """
    precision = getattr(torch.backends.mkldnn, "matmul", None)  # since PyTorch 2.9
    with torch.autocast("cpu", enabled=False):
        if dtype != torch.bfloat16 or precision is None:
            yield
            return
        before = precision.fp32_precision
        precision.fp32_precision = "bf16"
        try:
            yield
        finally:
            precision.fp32_precision = before
