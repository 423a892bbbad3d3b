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
    low = nn.functional.linear(x, down)
    transposed = up.t() if torch.is_grad_enabled() or x.device.type == "cpu" else _cast_once(up)
    updated = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), transposed, alpha=layer.scaling[name])
    return updated.to(result.dtype).view(result.shape)


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
