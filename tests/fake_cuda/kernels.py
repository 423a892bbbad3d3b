"""Which operators launch a kernel on CUDA; and those that the CPU build of torch lacks, in float32 on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BOTTOM_RIGHT = 2
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "set_",
    "resize_",
}


def launches_kernel(func: Any) -> bool:
    """Return whether an operator computes something: it is no view, and no mere allocation."""
    is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    return not is_view and func._schema.name.split("::")[1] not in NO_KERNEL


def _parts(query: Tensor, key: Tensor, starts: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield each segment's queries, keys and mask, causal from the bottom right."""
    bounds = [values.tolist() for values in starts]
    for begin, end, first, last in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        mask = torch.ones((end - begin, last - first), dtype=torch.bool).tril_(last - first - (end - begin))
        yield slice(begin, end), slice(first, last), mask
    assert bounds[0][-1] == query.size(0)
    assert bounds[1][-1] == key.size(0)


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)


def _forward(query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Attention `(T, heads, D)` of queries `(T, heads, D)` and keys `(K, heads, D)`."""
    out = torch.empty_like(query)
    for rows, columns, mask in _parts(query, key, starts):
        p = _probabilities(query[rows], key[columns], mask, scale)
        out[rows] = torch.einsum("hqk,khd->qhd", p, value[columns].float()).to(out.dtype)
    return out


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for rows, columns, mask in _parts(query, key, starts):
        q, k, v, g = query[rows].float(), key[columns].float(), value[columns].float(), grad[rows].float()
        p = _probabilities(q, k, mask, scale)
        gradients[2][columns] = torch.einsum("hqk,qhd->khd", p, g).to(value.dtype)
        dp = torch.einsum("qhd,khd->hqk", g, v)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        gradients[0][rows] = torch.einsum("hqk,khd->qhd", ds, k).to(query.dtype)
        gradients[1][columns] = torch.einsum("hqk,qhd->khd", ds, q).to(key.dtype)
    return gradients


def _efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    mask_type: int,
    wants_weights: bool = False,
    *,
    scale: float,
    **_: Any,
) -> tuple[Any, ...]:
    assert mask_type == BOTTOM_RIGHT
    assert query.size(2) == key.size(2) == value.size(2), "the kernel has no shared key/value heads"
    assert query_starts.dtype == key_starts.dtype == torch.int32
    out = _forward(query[0], key[0], value[0], (query_starts, key_starts), scale).unsqueeze(0)
    nothing = torch.zeros(1)
    return out, nothing, nothing, nothing.clone(), longest_query, longest_key


def _efficient_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    out: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *_: Any,
    scale: float,
    **__: Any,
) -> tuple[Tensor, ...]:
    parts = _backward(grad[0], query[0], key[0], value[0], (query_starts, key_starts), scale)
    return (*(part.unsqueeze(0) for part in parts), torch.zeros(0))


def _spread(query: Tensor, states: Tensor) -> Tensor:
    return states.repeat_interleave(query.size(1) // states.size(1), dim=1)


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    is_causal: bool = False,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    assert is_causal
    assert query.dtype in (torch.float16, torch.bfloat16)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    out = _forward(query, _spread(query, key), _spread(query, value), (query_starts, key_starts), scale)
    return out, torch.zeros(1), torch.zeros(2)


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    weights: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    is_causal: bool,
    random_state: Tensor,
    scale: float | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = query.size(-1) ** -0.5 if scale is None else scale
    keys, values = _spread(query, key), _spread(query, value)
    dq, dk, dv = _backward(grad, query, keys, values, (query_starts, key_starts), scale)
    shape = (key.size(0), key.size(1), -1, key.size(2))
    return dq, dk.view(shape).sum(2), dv.view(shape).sum(2)


KERNELS: dict[str, Callable[..., Any]] = {
    "aten::_efficient_attention_forward": _efficient_forward,
    "aten::_efficient_attention_backward": _efficient_backward,
    "torch_attn::_varlen_attn": _flash_forward,
    "torch_attn::_varlen_attn_backward": _flash_backward,
}
