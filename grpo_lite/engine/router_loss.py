"""The router's loss of a mixture of experts, over packed rows: what TRL adds so that experts share the work.

TRL 1.16 calls transformers' function on the padded rows of a micro-step, where a prompt counts in every row. Here its
tokens are computed once and weigh as much as the rows they stand for: that function takes weights where it expects a
mask. It multiplies means over the whole micro-step, so where that is divided, each part's router logits are joined with
the others', which are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import (
    load_balancing_loss_func,
)  # of all families: trl/trainer/utils.py

RouterLogits = tuple[Tensor, ...]  # (T, experts) of each layer


def has_experts(config: Any) -> bool:
    """Return whether a model routes tokens, and let TRL find how many experts there are.

    Granite 4 has a router's settings whether it has experts or not, and calls their number `num_local_experts`: TRL
    1.16 asks for `num_experts` and fails.
    """
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if count and getattr(config, "num_experts", None) is None:
        config.num_experts = count
    return bool(count)


class RouterLoss:
    """The router logits of a micro-step's parts, and the loss of all of them together.

    Args:
        config: of the model: `num_experts` and `num_experts_per_tok`.
        weights: of each part, `(T,)`: how many padded rows each of its tokens stands for (`packing.token_weights`).
    """

    def __init__(self, config: Any, weights: Sequence[Tensor]) -> None:
        self._experts = int(config.num_experts), int(config.num_experts_per_tok)
        self._weights = torch.cat(list(weights)).unsqueeze(0)  # (1, T of all parts)
        self._parts: list[RouterLogits] = [()] * len(weights)

    def note(self, part: int, logits: RouterLogits) -> None:
        """Keep the router logits of a part; those of the others are constants from now on."""
        self._parts = [tuple(layer.detach() for layer in each) for each in self._parts]
        self._parts[part] = logits

    def value(self) -> Tensor:
        """Return the loss; differentiable in the part that was noted last."""
        layers = tuple(torch.cat(layer) for layer in zip(*self._parts, strict=True))
        loss: Tensor = load_balancing_loss_func(layers, *self._experts, self._weights)
        return loss
