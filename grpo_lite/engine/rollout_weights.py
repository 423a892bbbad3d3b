"""Copies of a model's weights on a CPU for the length of a rollout: dequantised, joined, and laid out for few rows.

A decoding step multiplies few rows with every weight, so what is done to a weight at each call is paid again for each
token: bitsandbytes' dequantisation, oneDNN's layout, casts of the adapter. The copies are rebuilt for every rollout and
the base is never touched. Linear layers that are given the same tensor (queries, keys and values; gate and up) share
one product, LoRA's A matrices in it; B is applied to the small result. Adapters stay separate, because a small LoRA
delta folded into 16-bit weights is rounded away.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_lite.engine.cache import GroupCache
from grpo_lite.engine.decode import hidden_states, next_logits
from grpo_lite.engine.decoding_layers import Forward, forwards_replaced, given_together, sharing
from grpo_lite.engine.lora import is_off, is_vanilla, lora_layers
from grpo_lite.engine.quantised import dequantize, is_dequantizable

# The copies may take this share of the free memory.
MEMORY_SHARE = 0.25


@contextmanager
def rollout_weights(model: PreTrainedModel, autocast: Callable[[], AbstractContextManager[Any]]) -> Iterator[bool]:
    """Run `model`'s linear layers from copies inside the context; yields whether it does.

    On CPU only: on CUDA bitsandbytes has fused kernels for few rows, and `decoding_layers.py` does the rest.

    Args:
        model: made ready by `attention.install`.
        autocast: makes the context that the rollout runs in.
    """
    room = MEMORY_SHARE * psutil.virtual_memory().available
    layers = _layers(model)
    for chosen in (layers, [layer for layer in layers if layer.is_quantized]):
        if chosen and sum(layer.copied_bytes for layer in chosen) <= room:
            break
    else:
        yield False
        return
    with torch.no_grad():
        forwards = {
            layer.module: forward
            for group in _joined(model, chosen, autocast)
            for layer, forward in zip(group, _product(group), strict=True)
        }
    with forwards_replaced(forwards):
        yield True


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer whose weight is copied."""

    module: nn.Module  # what the model calls: the layer, or the LoRA layer around it
    linear: nn.Linear
    adapter: Any  # the LoRA layer, if it is on

    @property
    def is_quantized(self) -> bool:
        return is_dequantizable(self.linear)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.linear.weight.dtype
        return (getattr(self.linear, "compute_dtype", None) or torch.float32) if self.is_quantized else dtype

    @property
    def copied_bytes(self) -> int:
        return self.dtype.itemsize * self.linear.in_features * self.linear.out_features


def _layers(model: nn.Module) -> list[_Layer]:
    """Return the layers that gain by a copy: 4-bit ones, and those that oneDNN would lay out at each call."""
    around = {adapter.get_base_layer(): adapter for adapter in lora_layers(model)}
    parts = {part for adapter in around.values() for own in (adapter.lora_A, adapter.lora_B) for part in own.values()}
    layers = []
    for linear in model.modules():
        if not isinstance(linear, nn.Linear) or linear in parts:
            continue
        if not is_dequantizable(linear) and not (type(linear) is nn.Linear and _has_layout(linear.weight)):
            continue
        adapter = around.get(linear)
        if adapter is None or not (is_off(adapter) or is_vanilla(adapter)):
            layers.append(_Layer(linear, linear, None))  # what PEFT does around it stays
        else:
            layers.append(_Layer(adapter, linear, None if is_off(adapter) else adapter))
    return layers


# By model: the modules with copies, and which of them are given the same tensor.
_GROUPS: WeakKeyDictionary[PreTrainedModel, tuple[set[nn.Module], list[list[nn.Module]]]] = WeakKeyDictionary()


def _joined(
    model: PreTrainedModel, layers: list[_Layer], autocast: Callable[[], AbstractContextManager[Any]]
) -> list[list[_Layer]]:
    """Return the layers in groups that are given the same tensor, found by watching one run of the model."""
    by_module = {layer.module: layer for layer in layers}
    if model not in _GROUPS or _GROUPS[model][0] != set(by_module):
        _GROUPS[model] = set(by_module), _watch(model, layers, autocast)
    groups = [[by_module[module] for module in group] for group in _GROUPS[model][1]]
    grouped = {layer for group in groups for layer in group}
    # A layer that was not called may be called by other tokens (an expert); at 16 bit it may also be an unused head.
    return [*groups, *([layer] for layer in layers if layer not in grouped and layer.is_quantized)]


def _watch(
    model: PreTrainedModel, layers: list[_Layer], autocast: Callable[[], AbstractContextManager[Any]]
) -> list[list[nn.Module]]:
    """Run the model on two tokens, zeros in place of what these layers compute; group them by what they are given."""
    calls: list[tuple[_Layer, Tensor]] = []

    def watched(layer: _Layer) -> Forward:
        def forward(x: Tensor) -> Tensor:
            calls.append((layer, x))
            return x.new_zeros(*x.shape[:-1], layer.linear.out_features)

        return forward

    pair = torch.arange(2).unsqueeze(0)
    with (
        forwards_replaced({layer.module: watched(layer) for layer in layers}),
        autocast(),
        torch.random.fork_rng(devices=[]),
    ):
        hidden = hidden_states(model, pair, pair, GroupCache([2], torch.zeros(1, dtype=torch.long)))
        next_logits(model, hidden[:, -1])
    groups = [list(same) for group in given_together(calls) for _, same in groupby(group, lambda layer: layer.dtype)]
    return [[layer.module for layer in group] for group in groups]


def _product(layers: list[_Layer]) -> list[Forward]:
    """Return the forwards of layers that are given the same tensor: the first computes what all return."""
    sizes = [layer.linear.out_features for layer in layers]
    multiply = _with_lora(layers, sum(sizes))
    if len(layers) == 1:
        return [multiply]
    return sharing(len(layers), lambda x: multiply(x).split(sizes, dim=-1))


def _with_lora(layers: list[_Layer], width: int) -> Forward:
    """Return `x -> x` times all these layers' weights `(…, width)`, their adapters added."""
    dtype = layers[0].dtype
    weights, down, up = [], [], []
    for layer in layers:
        weights.append((dequantize(layer.linear) if layer.is_quantized else layer.linear.weight).to(dtype))
        scaled = torch.zeros(0, layer.linear.out_features, dtype=dtype)
        if layer.adapter is not None:
            (name,) = layer.adapter.active_adapters
            down.append(layer.adapter.lora_A[name].weight.to(dtype))
            scaled = (layer.adapter.lora_B[name].weight.t() * layer.adapter.scaling[name]).to(dtype)
        up.append(scaled)
    together = [*weights, *down]
    multiply = _multiplier(torch.cat(together) if len(together) > 1 else weights[0], _bias(layers, together))
    if not down:
        return lambda x: multiply(x.to(dtype)).to(x.dtype)
    blocks = torch.block_diag(*up)  # (all ranks, width): each adapter's own rows and columns

    def forward(x: Tensor) -> Tensor:
        both = multiply(x.to(dtype)).flatten(0, -2)
        result = torch.addmm(both[:, :width], both[:, width:], blocks)
        return result.view(*x.shape[:-1], width).to(x.dtype)

    return forward


def _bias(layers: list[_Layer], together: list[Tensor]) -> Tensor | None:
    """Return the layers' biases, zeros where there are none, or None without any."""
    if all(layer.linear.bias is None for layer in layers):
        return None
    biases = [layer.linear.bias for layer in layers] + [None] * (len(together) - len(layers))
    pairs = zip(biases, together, strict=True)
    return torch.cat([w.new_zeros(w.size(0)) if bias is None else bias.to(w.dtype) for bias, w in pairs])


def _has_layout(weight: Tensor) -> bool:
    """Return whether oneDNN has its own layout for a weight: in bf16, on CPUs with kernels for it."""
    try:
        return (
            weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    except (AttributeError, RuntimeError):
        return False


def _multiplier(weight: Tensor, bias: Tensor | None) -> Forward:
    """Return `x -> x @ weight.T + bias`, from a weight laid out for oneDNN where that exists.

    In bf16 and with up to 32 rows it takes 0.5-0.7 of the time of `linear`, which lays out the weight at each call
    (PyTorch 2.13; the operators are those that torch.compile uses for constant weights).
    """
    if _has_layout(weight):
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
            torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.size(1)), packed, bias, "none", [], "")
        except RuntimeError:
            return lambda x: nn.functional.linear(x, weight, bias)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: nn.functional.linear(x, weight, bias)
