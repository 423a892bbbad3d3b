"""What a model's layers compute while it decodes: few kernels, no autocast, fixed addresses.

A decoding step multiplies few rows, so it costs what its kernel launches cost. For the length of a rollout, LoRA
layers multiply with copies of A and scaled B in the compute dtype, layers that are given the same tensor (queries,
keys and values; gate and up) share one product with their A matrices, and RMSNorm is one kernel. The copies keep
their addresses and are refreshed before each rollout, so that a CUDA graph may hold them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lite.engine.lora import is_off, is_vanilla, lora_layers

Forward = Callable[[Tensor], Tensor]


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Let modules compute by these forwards inside the context."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own in before.items():
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own


class DecodingLayers:
    """The short forwards of one model's layers."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Prepare `model`'s layers to compute in `dtype`; they change inside `installed` only."""
        self.dtype = dtype
        self._adapters = [_Adapter(layer, dtype) for layer in lora_layers(model)]
        self._forwards: dict[nn.Module, Forward] = {adapter.layer: adapter.forward for adapter in self._adapters}
        self._forwards |= {norm: _fused_norm(norm) for norm in model.modules() if _can_be_fused(norm, dtype)}

    @staticmethod
    def state(model: nn.Module) -> tuple[tuple[Any, ...], ...]:
        """Return which adapters are on: layers that were prepared for another state compute something else."""
        return tuple((is_off(layer), *layer.active_adapters) for layer in lora_layers(model))

    @staticmethod
    def obstacle(model: nn.Module) -> str | None:
        """Return why this model's adapters cannot be shortened, or None."""
        for layer in lora_layers(model):
            if not isinstance(layer.get_base_layer(), nn.Linear):
                return f"an adapter is on {type(layer.get_base_layer()).__name__}, not on a linear layer"
            if not (is_off(layer) or is_vanilla(layer)):
                return "the adapter is not plain LoRA without dropout"
        return None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Refresh the copies of the adapter, and let the layers take the short way inside the context."""
        for adapter in self._adapters:
            adapter.refresh()
        with forwards_replaced(self._forwards):
            yield

    def join(self, run: Callable[[], object]) -> None:
        """Watch one run of the model: layers that it gives the same tensor share a product from then on."""
        order: list[_Adapter] = []
        for adapter in self._adapters:
            adapter.order = order
        with self.installed():
            run()
        groups: list[list[_Adapter]] = []
        for adapter in order:
            if groups and groups[-1][0].given is adapter.given and adapter not in groups[-1]:
                groups[-1].append(adapter)
            else:
                groups.append([adapter])
        for adapter in self._adapters:
            adapter.order = adapter.given = None
        for group in groups:
            _Product.join(group, self.dtype)


class _Adapter:
    """One LoRA layer: its base layer, and the adapter's matrices in the compute dtype."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.layer = layer
        self.name = layer.active_adapters[0] if layer.active_adapters else ""
        self.order: list[_Adapter] | None = None
        self.given: Tensor | None = None
        self.is_on = not is_off(layer)
        if self.is_on:
            self.down, self.up = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
            self.scaled_up = torch.empty(self.up.shape[::-1], dtype=dtype, device=self.up.device)  # (r, out)
            self.product, self.columns = _Product([self], dtype), slice(None)

    def refresh(self) -> None:
        if not self.is_on:
            return
        torch.mul(self.up.detach().t(), self.layer.scaling[self.name], out=self.scaled_up)
        self.product.down[self.columns].copy_(self.down.detach())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer.base_layer(x)
        if not self.is_on:
            return result
        if self.order is not None:
            self.order.append(self)
            self.given = x
        low = self.product.of(x)[:, self.columns]
        return torch.addmm(result.flatten(0, -2), low, self.scaled_up).view(result.shape)


class _Product:
    """The product of one tensor with the A matrices of all layers that are given it."""

    def __init__(self, adapters: list[_Adapter], dtype: torch.dtype) -> None:
        first = adapters[0].down
        ranks = [adapter.down.size(0) for adapter in adapters]
        self.down = torch.empty((sum(ranks), first.size(1)), dtype=dtype, device=first.device)
        self.readers = len(adapters)
        self._given: Tensor | None = None
        self._low: Tensor | None = None
        self._read = 0

    @classmethod
    def join(cls, adapters: list[_Adapter], dtype: torch.dtype) -> None:
        """Let these layers, which are called in this order with one tensor, share a product."""
        if len(adapters) == 1:
            return
        product = cls(adapters, dtype)
        start = 0
        for adapter in adapters:
            adapter.product, adapter.columns = product, slice(start, start + adapter.down.size(0))
            start += adapter.down.size(0)

    def of(self, x: Tensor) -> Tensor:
        """Return `x` `(…, in)` times all A, `(rows, sum of ranks)`; kept until every layer has read it."""
        if self._low is None or self._given is not x:
            self._given, self._low, self._read = x, torch.mm(x.flatten(0, -2), self.down.t()), 0
        low = self._low
        self._read += 1
        if self._read == self.readers:
            self._given = self._low = None
        return low


def _epsilon(norm: nn.Module) -> float | None:
    if not type(norm).__name__.endswith("RMSNorm"):
        return None
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    return None


def _fused_norm(norm: nn.Module) -> Forward:
    weight, epsilon = norm.weight, _epsilon(norm)

    def forward(x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, weight.shape, weight, epsilon)  # type: ignore[arg-type]

    return forward


def _can_be_fused(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether PyTorch's RMSNorm computes what this module does (Gemma's multiplies with 1 + weight)."""
    weight = getattr(norm, "weight", None)
    if _epsilon(norm) is None or not isinstance(weight, Tensor) or weight.dim() != 1 or weight.dtype != dtype:
        return False
    x = torch.linspace(-2.0, 3.0, 2 * weight.numel(), device=weight.device).view(2, -1).to(dtype)
    with torch.no_grad():
        difference = float((_fused_norm(norm)(x).float() - norm(x).float()).abs().max())
        scale = float(norm(x).float().abs().max())
    return difference <= 4 * torch.finfo(dtype).eps * max(scale, 1e-3)
