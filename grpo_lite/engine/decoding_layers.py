"""What a model's layers compute while it decodes: few kernels, no autocast, fixed addresses.

A decoding step multiplies few rows, so it costs what its kernel launches cost. For the length of a rollout, LoRA
layers multiply with copies of A and scaled B in the compute dtype, layers that are given the same tensor (queries,
keys and values; gate and up) share one product with their A matrices, and RMSNorm is one kernel. The copies keep
their addresses and are refreshed before each rollout, so that a CUDA graph may hold them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grpo_lite.engine.lora import is_off, is_vanilla, lora_layers

Forward = Callable[[Tensor], Tensor]
Layer = TypeVar("Layer")


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


def given_together(calls: Sequence[tuple[Layer, Tensor]]) -> list[list[Layer]]:
    """Return layers in groups of those that were given the same tensor, one right after the other.

    Args:
        calls: of a run of the model: a layer, and what it was given. One that was called twice is a group of its own.
    """
    times = Counter(layer for layer, _ in calls)
    groups: list[list[Layer]] = []
    given: Tensor | None = None
    for layer, x in calls:
        if times[layer] > 1:
            given = None
        elif x is given:
            groups[-1].append(layer)
        else:
            groups.append([layer])
            given = x
    return groups + [[layer] for layer, count in times.items() if count > 1]


def sharing(readers: int, compute: Callable[[Tensor], Sequence[Tensor]]) -> list[Forward]:
    """Return the forwards of layers that are given the same tensor: the first called computes what each returns."""
    given: Tensor | None = None
    waiting: dict[int, Tensor] = {}

    def part(place: int) -> Forward:
        def forward(x: Tensor) -> Tensor:
            nonlocal given, waiting
            if x is not given or place not in waiting:
                given, waiting = x, dict(enumerate(compute(x)))
            result = waiting.pop(place)
            if not waiting:
                given = None
            return result

        return forward

    return [part(place) for place in range(readers)]


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
        calls: list[tuple[_Adapter, Tensor]] = []
        for adapter in self._adapters:
            adapter.calls = calls
        with self.installed():
            run()
        for adapter in self._adapters:
            adapter.calls = None
        for group in given_together(calls):
            if len(group) > 1:
                _share(group, self.dtype)


class _Adapter:
    """One LoRA layer: its base layer, and the adapter's matrices in the compute dtype."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.layer = layer
        self.name = layer.active_adapters[0] if layer.active_adapters else ""
        self.calls: list[tuple[_Adapter, Tensor]] | None = None  # while a run is watched
        self.is_on = not is_off(layer)
        if self.is_on:
            self.down, self.up = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
            self.scaled_up = torch.empty(self.up.shape[::-1], dtype=dtype, device=self.up.device)  # (r, out)
            self.down_copy: Tensor  # (r, in)
            self.low: Forward  # `(…, in)` times A, `(rows, r)`
            _share([self], dtype)

    def refresh(self) -> None:
        if not self.is_on:
            return
        torch.mul(self.up.detach().t(), self.layer.scaling[self.name], out=self.scaled_up)
        self.down_copy.copy_(self.down.detach())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer.base_layer(x)
        if not self.is_on:
            return result
        if self.calls is not None:
            self.calls.append((self, x))
        return torch.addmm(result.flatten(0, -2), self.low(x), self.scaled_up).view(result.shape)


def _share(adapters: Sequence[_Adapter], dtype: torch.dtype) -> None:
    """Let layers that are given the same tensor share one product of it with all their A matrices."""
    first, ranks = adapters[0].down, [adapter.down.size(0) for adapter in adapters]
    together = torch.empty((sum(ranks), first.size(1)), dtype=dtype, device=first.device)
    lows = sharing(len(adapters), lambda x: torch.mm(x.flatten(0, -2), together.t()).split(ranks, dim=1))
    for adapter, copy, low in zip(adapters, together.split(ranks), lows, strict=True):
        adapter.down_copy, adapter.low = copy, low


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
