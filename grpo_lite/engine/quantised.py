"""Keep 4-bit weights dequantised for the length of a rollout, where memory allows.

A decoding step multiplies few rows with every weight, so bitsandbytes' dequantisation is paid again for each token.
The shadow is what each call would dequantise to, so the numbers do not change; adapters stay separate (folding a small
LoRA delta into 16-bit weights rounds it away). It is rebuilt for every rollout and the base is never touched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

# The shadow may take this share of the free memory.
MEMORY_SHARE = 0.25


@contextmanager
def dequantized(model: nn.Module) -> Iterator[bool]:
    """Run `model`'s 4-bit layers from dequantised copies inside the context; yields whether it does.

    On CPU only: on CUDA bitsandbytes has fused kernels for few rows, and what is faster there is not yet measured.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_dequantizable(module)]
    needed = sum(2 * layer.in_features * layer.out_features for layer in layers)
    if not layers or needed > MEMORY_SHARE * psutil.virtual_memory().available:
        yield False
        return
    for layer in layers:
        layer.__dict__["forward"] = _shadow_forward(layer)
    try:
        yield True
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def keep_weights_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It does so on the first forward in eval mode, for good, and its kernel for that layout has no backward: an
    evaluation in the middle of training would cut the gradient without an error (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = cast(Any, False)


def keep_odd_widths_unpacked(model: nn.Module) -> None:
    """Stop that repacking where its layout has no place for a layer's width: an AssertionError on the first forward.

    It takes rows in blocks of 32 and whole quantisation blocks a row (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        shape = getattr(state, "shape", None)
        if hasattr(module, "support_avx512bf16_for_cpu") and shape is not None and len(shape) == 2:
            fits = shape[0] % 32 == 0 and shape[1] % getattr(state, "blocksize", 64) == 0
            module.support_avx512bf16_for_cpu = cast(Any, module.support_avx512bf16_for_cpu and fits)


def _is_dequantizable(layer: nn.Linear) -> bool:
    state = getattr(layer.weight, "quant_state", None)
    if state is None or layer.weight.device.type != "cpu" or len(state.shape) != 2:
        return False
    return not getattr(state, "packing_format_for_cpu", False)


def _shadow_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    import bitsandbytes.functional

    dtype = getattr(layer, "compute_dtype", None)
    state = cast(Any, layer.weight).quant_state
    weight: Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    weight = weight if dtype is None else weight.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    multiply = _multiplier(weight, bias)

    dtype = weight.dtype

    def forward(x: Tensor) -> Tensor:
        return multiply(x.to(dtype)).to(x.dtype)

    return forward


def _multiplier(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return `x -> x @ weight.T + bias`, from a weight laid out for oneDNN where that exists.

    In bf16 and with up to 32 rows it takes 0.5-0.7 of the time of `linear`, which lays out the weight at each call
    (PyTorch 2.13; the operators are those that torch.compile uses for constant weights).
    """
    try:
        if weight.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise RuntimeError("no bf16 kernels")
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.size(1)), packed, bias, "none", [], "")
    except (AttributeError, RuntimeError):
        return lambda x: nn.functional.linear(x, weight, bias)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
