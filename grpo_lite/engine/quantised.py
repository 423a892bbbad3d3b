"""4-bit weights of bitsandbytes on a CPU: dequantised, and kept from being repacked."""

from typing import Any, cast

from torch import Tensor, nn


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


def is_dequantizable(layer: nn.Module) -> bool:
    """Return whether a layer is a 4-bit one on a CPU whose weight is in bitsandbytes' usual layout."""
    weight = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    if weight is None or state is None or weight.device.type != "cpu" or len(state.shape) != 2:
        return False
    return not getattr(state, "packing_format_for_cpu", False)


def dequantize(layer: nn.Linear) -> Tensor:
    """Return the weight `(out, in)` of such a layer: what each call of it would dequantise."""
    import bitsandbytes.functional

    weight: Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, cast(Any, layer.weight).quant_state)
    return weight
