"""What costs little to compute again is not kept for backward: norms, and the product in a gated MLP.

A norm keeps its input in float32 and its output, a gated MLP its gate's activation and the product: half of what a
layer keeps, and all of it follows from tensors that are kept anyway. Here such a tensor is computed by the model's own
code, and again in backward, a chunk of tokens at a time. `lora.py`, which needs its layers' inputs in backward, keeps
what they are computed from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lite.engine.first_order import first_order

Compute = Callable[..., Tensor]  # of tensors of one shape but for the last axis, along which alone it mixes numbers

# Layers that give a gated MLP's gate and what it lets through (or both, in this order), and the one that takes their
# product, as families name them. Whether a module of these names computes it this way is tried.
GATED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("input_linear",), "output_linear"),
)
# Numbers that are computed at once: on a CPU they stay in its cache, and a GPU is filled.
CHUNK_ELEMENTS_CPU = 1 << 19
CHUNK_ELEMENTS_GPU = 1 << 22


def keep_less(model: nn.Module) -> int:
    """Let the model's norms and gated MLPs be computed again in backward; return how many are."""
    count = 0
    for module in model.modules():
        forward = _forward_of(module)
        if forward is not None and "forward" not in module.__dict__:
            module.forward = MethodType(forward, module)
            count += 1
    return count


def recomputed(compute: Compute, *inputs: Tensor) -> Tensor:
    """Return `compute(*inputs)`, of which backward keeps the inputs only."""
    if not torch.is_grad_enabled() or not any(each.requires_grad for each in inputs):
        return compute(*inputs)
    computation = Computation(compute, inputs[0].device.type)
    out: Tensor = _Recomputed.apply(computation, *inputs)
    out.computed_from = computation, inputs  # type: ignore[attr-defined]
    return out


def is_recomputed(tensor: Tensor) -> bool:
    """Return whether a tensor is computed again in backward."""
    return hasattr(tensor, "computed_from")


def read(tensor: Tensor) -> tuple[Computation, Sequence[Tensor]]:
    """Return what a reader of such a tensor keeps for its backward: its computation, and what that takes."""
    computation: Computation
    computation, inputs = tensor.computed_from  # type: ignore[attr-defined]
    computation.readers += 1
    return computation, inputs


class Computation:
    """How to compute a tensor again."""

    def __init__(self, compute: Compute, device_type: str) -> None:
        self.compute = compute
        self.readers = 0  # layers that were given the tensor
        self._left = 0
        self._made: Tensor | None = None
        enabled = torch.is_autocast_enabled(device_type)
        self._autocast = partial(torch.autocast, device_type, torch.get_autocast_dtype(device_type), enabled)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that the tensor was computed in."""
        return self._autocast()

    def again(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the tensor to one of its readers; it is gone when the last one has asked."""
        if self._made is None:
            with torch.no_grad(), self.autocast():
                self._made, self._left = _in_chunks(self.compute, inputs), self.readers
        made, self._left = self._made, self._left - 1
        if self._left == 0:
            self._made = None
        return made


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, computation: Computation, *inputs: Tensor) -> Tensor:
        ctx.computation = computation
        ctx.save_for_backward(*inputs)
        return _in_chunks(computation.compute, inputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        grads = [torch.empty_like(each) if need else None for each, need in zip(inputs, needed, strict=True)]
        for part in _parts(inputs):
            with torch.enable_grad(), ctx.computation.autocast():
                own = [each[part].detach().requires_grad_(need) for each, need in zip(inputs, needed, strict=True)]
                out = ctx.computation.compute(*own)
            of_part = iter(torch.autograd.grad(out, [each for each in own if each.requires_grad], grad[part]))
            for each in grads:
                if each is not None:
                    each[part] = next(of_part)
        return None, *grads


def _in_chunks(compute: Compute, inputs: Sequence[Tensor]) -> Tensor:
    parts = list(_parts(inputs))
    if len(parts) == 1:
        return compute(*inputs)
    out: Tensor | None = None
    for part in parts:
        chunk = compute(*(each[part] for each in inputs))
        if out is None:
            out = chunk.new_empty((*inputs[0].shape[:-1], chunk.size(-1)))
        out[part] = chunk
    assert out is not None
    return out


def _parts(inputs: Sequence[Tensor]) -> Iterator[tuple[slice, ...]]:
    """Return the slices that cut the inputs along their longest axis but the last."""
    first = inputs[0]
    if first.dim() < 2 or first.numel() == 0:
        yield (slice(None),)
        return
    axis = max(range(first.dim() - 1), key=first.size)
    most = CHUNK_ELEMENTS_CPU if first.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    size = max(1, most * first.size(axis) // first.numel())
    for start in range(0, first.size(axis), size):
        yield (*(slice(None) for _ in range(axis)), slice(start, start + size))


def _forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """Return the forward that keeps less, or None for modules whose own must stay."""
    if type(module).__name__.endswith("RMSNorm"):
        return _norm
    for first, last in GATED:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in (*first, last)):
            forward = partial(_mlp, first, last)
            return forward if _is_equal(module, first, last, forward) else None
    return None


def _norm(norm: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    compute = MethodType(type(norm).forward, norm)
    if kwargs or len(args) != 1 or any(each.requires_grad for each in norm.parameters()):
        out: Tensor = compute(*args, **kwargs)
        return out
    return recomputed(compute, args[0])


def _mlp(first: Sequence[str], last: str, mlp: Any, x: Tensor) -> Tensor:
    gate_and_up = [getattr(mlp, name)(x) for name in first]
    out: Tensor = getattr(mlp, last)(recomputed(partial(_product, _activation(mlp)), *gate_and_up))
    return out


def _product(activation: Compute, gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return activation(gate) * up


def _activation(mlp: nn.Module) -> Compute:
    names = ("act_fn", "activation_fn", "activation")
    activation: Compute = next((getattr(mlp, name) for name in names if hasattr(mlp, name)), nn.functional.silu)
    return activation


def _is_equal(mlp: nn.Module, first: Sequence[str], last: str, forward: Callable[..., Tensor]) -> bool:
    """Return whether `forward` computes what an MLP's own does, tried with tiny layers in the place of its own.

    In training mode, where there may be dropout, and on large numbers, too, which some MLPs limit.
    """
    twin = copy.copy(mlp)
    twin._modules = {name: copy.copy(child) for name, child in mlp._modules.items()}
    twin._modules |= {**{name: _Tiny(4, 12 // len(first)) for name in first}, last: _Tiny(6, 4)}
    for each in (twin, *twin.children()):
        each.training = True
    x = torch.linspace(-2.0, 3.0, 12, dtype=torch.float64).view(1, 3, 4)
    x = torch.cat([x, 1000.0 * x])
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        try:
            return torch.equal(type(mlp).forward(twin, x), forward(twin, x))
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
            return False


class _Tiny(nn.Module):
    """A linear layer with fixed weights: making it draws no random number."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.table = torch.linspace(1.0, 9.0, inputs * outputs, dtype=torch.float64).sin().view(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table
