"""Tiny models on the simulated device: 4-bit or 16-bit, with a LoRA adapter in float32. Import after `device`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from bench.random_model import declare_quantized, four_bit
from grpo_lite.engine import attention
from grpo_lite.engine.lora import shorten_lora
from grpo_lite.engine.quantised import keep_weights_unpacked
from grpo_lite.models.load import lora_to_float32
from tests.fake_cuda import device
from tests.tiny import tiny_lora, tiny_model


def quantized(model: Any, dtype: torch.dtype) -> Any:
    """Turn the linear layers, but for the head, into bitsandbytes' 4-bit ones, as transformers does."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = four_bit(module.weight.data, module.bias, dtype)
        setattr(parent, name.rpartition(".")[2], layer.to("cpu"))
    declare_quantized(model, dtype, "cpu")
    keep_weights_unpacked(model)
    return model


def base_on_cuda(kind: str, dtype: torch.dtype, load_in: str = "4bit", **overrides: Any) -> Any:
    """Return a base model without adapter, made before `device.install`."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = tiny_model(kind, dtype=dtype, **(sizes | overrides))
    if load_in == "4bit":
        model = quantized(model, dtype)
        model.hf_device_map = {"": 0}
    return model


def policy_on_cuda(kind: str, dtype: torch.dtype, load_in: str = "4bit", **overrides: Any) -> Any:
    """Install the device where it is not, and return a base with its adapter on it, ready to decode."""
    with device.off() if device.is_installed() else nullcontext():
        wrapped = tiny_lora(base_on_cuda(kind, dtype, load_in, **overrides))
        lora_to_float32(wrapped)
    if not device.is_installed():
        device.install((7, 5) if dtype == torch.float16 else (8, 6))
    device.move(wrapped)
    attention.install(wrapped.get_base_model())
    shorten_lora(wrapped)
    return wrapped.eval()
