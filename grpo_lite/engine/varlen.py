"""One attention call a layer on a GPU: each completion's keys lie behind a copy of its prompt's, for a varlen kernel.

`attention.py` calls SDPA once for each prompt and completion, which on a GPU costs a launch and a concatenation each.
Here keys and values are gathered as `[prompt | completion]` once, and one kernel attends within each with causality
from the bottom right: the last query sees all keys, or those in its window, as a key's place is its position. Which
kernel serves a card is found by trying it, forward and backward, against the calls that it replaces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad, scaled_dot_product_attention

from grpo_lite.errors import first_line

logger = logging.getLogger(__name__)

# query (T, heads, D), key and value (K, key/value heads, D), index, scaling, window -> (T, heads, D)
Kernel = Callable[[Tensor, Tensor, Tensor, "VarlenIndex", float | None, int | None], Tensor]

BOTTOM_RIGHT = 2  # of `_efficient_attention_forward`'s custom_mask_type
# What a kernel is tried on: groups, and a window; the longer ones pass over whole blocks of a kernel.
_SHORT: list[tuple[int, tuple[int, ...]]] = [(9, (3, 5)), (4, (1, 6, 2))]
UNBOUNDED: tuple[tuple[list[tuple[int, tuple[int, ...]]], int | None], ...] = ((_SHORT, None),)
WINDOWED = ((_SHORT, 4), ([(300, (150, 7))], 65))


class VarlenIndex:
    """Where each prompt's and completion's queries and keys begin, and which token each gathered key is."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        """Lay out groups `(prompt length, completion lengths)`, in the order of the flat row."""
        queries, keys = [0], [0]
        gathered: list[Tensor] = []  # tokens, in the order of the keys
        first: list[Tensor] = []  # of every token, its first place among the keys
        copies: list[list[Tensor]] = []  # of every prompt, the places of its further copies
        prompts: list[Tensor] = []
        token = 0
        for prompt, completions in segments:
            own = torch.arange(token, token + prompt)
            prompts.append(own)
            copies.append([])
            gathered.append(own)
            first.append(torch.arange(keys[-1], keys[-1] + prompt))
            queries.append(queries[-1] + prompt)
            keys.append(keys[-1] + prompt)
            token += prompt
            for length in completions:
                gathered += [own, torch.arange(token, token + length)]
                copies[-1].append(torch.arange(keys[-1], keys[-1] + prompt))
                first.append(torch.arange(keys[-1] + prompt, keys[-1] + prompt + length))
                queries.append(queries[-1] + length)
                keys.append(keys[-1] + prompt + length)
                token += length
        self.query_starts = torch.tensor(queries, dtype=torch.int32).to(device)
        self.key_starts = torch.tensor(keys, dtype=torch.int32).to(device)
        self.bounds = list(zip(pairwise(queries), pairwise(keys), strict=True))
        self.longest_query = max(end - begin for (begin, end), _ in self.bounds)
        self.longest_key = max(end - begin for _, (begin, end) in self.bounds)
        self.tokens = torch.cat(gathered).to(device)
        self.first = torch.cat(first).to(device)
        self.prompts = torch.cat(prompts).to(device)
        most = max(map(len, copies))
        tables = [torch.stack(own, 1) if own else first[0].new_empty((0, 0)) for own in copies]
        self.is_ragged = len({len(own) for own in copies}) > 1
        # (prompt tokens, most completions of a group): the further copies of a prompt's token; behind the last key
        # where its group has fewer completions.
        self.copies: Tensor | None = None
        if most:
            wide = [
                pad(table.reshape(len(prompt), -1), (0, most - len(own)), value=keys[-1])
                for table, own, prompt in zip(tables, copies, prompts, strict=True)
            ]
            self.copies = torch.cat(wide).to(device)

    def gather(self, states: Tensor) -> Tensor:
        """Return the keys `(K, heads, D)` of tokens `(T, heads, D)`."""
        out: Tensor = _Gather.apply(states, self)
        return out


class _Gather(torch.autograd.Function):
    """`index_select` whose backward adds a prompt's copies in a fixed order, so that runs stay reproducible."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: VarlenIndex) -> Tensor:
        ctx.index = index
        return states.index_select(0, index.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        index: VarlenIndex = ctx.index
        out = grad.index_select(0, index.first)
        if index.copies is not None:
            if index.is_ragged:
                grad = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
            copies = grad.index_select(0, index.copies.flatten()).unflatten(0, index.copies.shape).sum(1)
            out.index_add_(0, index.prompts, copies)
        return out, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: VarlenIndex,
    scaling: float | None,
    kernel: Kernel,
    window: int | None = None,
) -> Tensor:
    """Attend within each prompt, and within each completion behind its prompt.

    Args:
        query: `(1, heads, T, D)`.
        key: `(1, key/value heads, T, D)`.
        value: as `key`.
        index: how T is cut.
        scaling: of the scores; None for `D ** -0.5`.
        kernel: from `choose_kernel`.
        window: how many tokens each sees, its own among them; None for all.

    Returns:
        `(1, T, heads, D)`.
    """
    flat, keys, values = (_as_autocast(states)[0].transpose(0, 1) for states in (query, key, value))
    return kernel(flat, index.gather(keys), index.gather(values), index, scaling, window).unsqueeze(0)


def _as_autocast(states: Tensor) -> Tensor:
    """Cast as autocast does for SDPA; it does not know the kernels."""
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


def flash(
    query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scaling: float | None, window: int | None
) -> Tensor:
    """FlashAttention with key/value heads shared: compute capability 8.0 and up, torch with `varlen_attn`."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        index.query_starts,
        index.key_starts,
        index.longest_query,
        index.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    return cast(Tensor, out)


def efficient(
    query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scaling: float | None, window: int | None
) -> Tensor:
    """The memory-efficient kernel, which older cards have too (T4)."""
    repeat = query.size(1) // key.size(1)
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    out: Tensor = torch.ops.aten._efficient_attention_forward(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        None,
        index.query_starts,
        index.key_starts,
        index.longest_query,
        index.longest_key,
        0.0,
        BOTTOM_RIGHT,
        query.requires_grad or key.requires_grad,
        scale=query.size(-1) ** -0.5 if scaling is None else scaling,
        **({} if window is None else {"window_size": window}),
    )[0]
    return out.squeeze(0)


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scaling: float | None, window: int | None
) -> Tensor:
    """SDPA for one prompt or completion after the other: what the kernels are compared with."""
    repeat = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    outs = []
    for (begin, end), (first, last) in index.bounds:
        parts = (query[begin:end], key[first:last], value[first:last])
        mask = torch.ones((end - begin, last - first), dtype=torch.bool, device=query.device)
        before = last - first - (end - begin)
        mask = mask.tril_(before) if window is None else mask.tril_(before).triu_(before - window + 1)
        q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in parts)
        outs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)[0].transpose(0, 1))
    return torch.cat(outs)


def choose_kernel(query: Tensor, key: Tensor, scaling: float | None, has_window: bool = False) -> Kernel | None:
    """Return the kernel for states of this device, dtype and shape, or None where there is none."""
    if query.device.type != "cuda":
        return None
    return _tried(query.device, query.dtype, query.size(1), key.size(1), query.size(3), scaling, has_window)


@lru_cache(maxsize=16)
def _tried(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    scaling: float | None,
    has_window: bool = False,
) -> Kernel | None:
    reasons = []
    cases = WINDOWED if has_window else UNBOUNDED
    for kernel in (flash, efficient):
        try:
            # Hooks of its own: the caller may be a checkpointed layer, which counts every tensor that is saved in it.
            with (
                torch.inference_mode(False),
                saved_tensors_hooks(_unchanged, _unchanged),
                torch.autocast(device.type, enabled=False),
            ):
                difference = max(
                    _difference(kernel, VarlenIndex(segments, device), (dtype, heads, kv_heads, size), scaling, window)
                    for segments, window in cases
                )
        except (RuntimeError, ImportError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
            reasons.append(f"{kernel.__name__}: {type(error).__name__}: {first_line(error)[:120]}")
            continue
        if difference <= (1e-4 if dtype == torch.float32 else 0.03):
            logger.debug("packed attention by %s, difference %.2g", kernel.__name__, difference)
            return kernel
        reasons.append(f"{kernel.__name__}: differs by {difference:.2g}")
    what = " in layers with a window" if has_window else ""
    logger.info("Packed attention calls SDPA once for each completion%s (%s).", what, "; ".join(reasons))
    return None


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _difference(
    kernel: Kernel,
    index: VarlenIndex,
    states: tuple[torch.dtype, int, int, int],
    scaling: float | None,
    window: int | None,
) -> float:
    """Return by how much output and gradients differ from `one_by_one`'s, relative to the largest of each.

    Args:
        kernel: the one to try.
        index: the layout to try it on.
        states: their dtype, heads, key/value heads, and size of a head.
        scaling: of the scores.
        window: how many tokens each sees; None for all.
    """
    dtype, heads, kv_heads, size = states
    device, tokens = index.tokens.device, index.bounds[-1][0][1]
    generator = torch.Generator().manual_seed(0)  # of its own: nothing is drawn from the run's random state
    shapes = [(1, heads, tokens, size), *[(1, kv_heads, tokens, size)] * 2, (1, tokens, heads, size)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    results = []
    for way in (kernel, one_by_one):
        with torch.enable_grad():
            query, key, value = (tensor.detach().requires_grad_() for tensor in drawn[:3])
            out = attend(query, key, value, index, scaling, way, window)
        gradients = torch.autograd.grad(out, (query, key, value), drawn[3])
        results.append([out.detach(), *gradients])
    pairs = zip(*results, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
