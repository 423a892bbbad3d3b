"""Vanilla LoRA layers without PEFT's detours: one `addmm` instead of a clone, a scaling and an addition in full size.

PEFT 0.21's 4-bit layer clones the base's output, casts the input to the adapter's dtype (also under CPU autocast,
which casts it back) and scales and adds the update as separate tensors. Everything but the plain case, one active
LoRA adapter with no variant, dropout or bias, is left to PEFT, decided at each call, so that disabling, merging and
switching adapters work as always. In fp32 the result is PEFT's to rounding; in 16 bit it is rounded less often.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lite.engine import recompute
from grpo_lite.engine.first_order import first_order


def shorten_lora(model: nn.Module) -> int:
    """Replace the forward of the LoRA layers on linear layers by the short one; return how many were replaced."""
    count = 0
    for layer in lora_layers(model):
        if isinstance(layer.get_base_layer(), nn.Linear) and "forward" not in layer.__dict__:
            layer.forward = MethodType(_forward, layer)
            count += 1
    return count


def lora_layers(model: nn.Module) -> list[Any]:
    """Return the model's LoRA layers; none without PEFT."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return []
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not is_vanilla(layer):
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if x.dtype != down.dtype and not torch.is_autocast_enabled(x.device.type):
        result = type(layer).forward(layer, x)
        return result
    result = layer.base_layer(x)
    if recompute.is_recomputed(x):
        result = _Update.apply(result, x, down, up, layer.scaling[name])
        return result
    low = nn.functional.linear(x, down)
    transposed = up.t() if torch.is_grad_enabled() or x.device.type == "cpu" else _cast_once(up)
    updated = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), transposed, alpha=layer.scaling[name])
    return updated.to(result.dtype).view(result.shape)


class _Update(torch.autograd.Function):
    """`result + scaling * x @ down.T @ up.T`, for an `x` that is computed again: keeps what it is computed from."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            low = torch.mm(x.flatten(0, -2).to(dtype), down.to(dtype).t())
            updated = torch.addmm(result.flatten(0, -2).to(dtype), low, up.to(dtype).t(), alpha=scaling)
        ctx.computation, kept = recompute.read(x)
        ctx.save_for_backward(low, down, up, *kept)
        ctx.scaling = scaling
        return updated.to(result.dtype).view(result.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, down, up, *kept = ctx.saved_tensors
        x: Tensor = ctx.computation.again(kept)
        flat = grad.flatten(0, -2).to(low.dtype)
        low_grad = _scaled_mm(flat, up.to(low.dtype), ctx.scaling)
        down_grad = torch.mm(low_grad.t(), x.flatten(0, -2).to(low.dtype)).to(down.dtype)
        up_grad = _scaled_mm(flat.t(), low, ctx.scaling).to(up.dtype)
        x_grad = None
        if ctx.needs_input_grad[1]:
            x_grad = torch.mm(low_grad, down.to(low.dtype)).to(x.dtype).view(x.shape)
        return grad, x_grad, down_grad, up_grad, None


def _scaled_mm(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """Return `scale * one @ other` by one kernel."""
    return torch.addmm(one.new_zeros(1), one, other, beta=0, alpha=scale)


def _cast_once(weight: Tensor) -> Tensor:
    """Return the transpose of a weight, under autocast in its dtype; each CUDA autocast context casts it once.

    Autocast keeps its casts of weights, but not of views such as `weight.t()`. On CUDA it casts the operands of einsum
    (PyTorch 2.13; not on a CPU), and this einsum launches nothing. In training it would only cost time: there an
    autocast context uses each weight once, because checkpointing recomputes each layer in a context of its own.
    """
    return torch.einsum("or->ro", weight)


def is_off(layer: Any) -> bool:
    """Return whether a LoRA layer computes what its base layer does: its adapters are disabled, or merged into it."""
    return bool(layer.disable_adapters or layer.merged)


def is_vanilla(layer: Any) -> bool:
    """Return whether a LoRA layer has one active adapter without variant, dropout or bias, and not merged."""
    if is_off(layer) or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in getattr(layer, "lora_variant", {}):
        return False
    dropout = layer.lora_dropout[name]
    return (
        (isinstance(dropout, nn.Identity) or dropout.p == 0.0 or not layer.training)
        and layer.lora_B[name].bias is None
        and not layer.use_dora.get(name, False)
    )
