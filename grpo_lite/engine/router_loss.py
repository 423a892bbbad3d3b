"""The router's loss of a mixture of experts, over packed rows: what TRL adds so that experts share the work.

TRL 1.16 calls transformers' function on the padded rows of a micro-step, where a prompt counts in every row. Here its
tokens are computed once and weigh as much as the rows they stand for: that function takes weights where it expects a
mask. It multiplies means over the whole micro-step, so where that is divided, each part's router logits are joined with
the others', which are constants.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import (
    load_balancing_loss_func,
)  # of all families: trl/trainer/utils.py

logger = logging.getLogger(__name__)

RouterLogits = tuple[Tensor, ...]  # (T, experts) of each layer


def has_router_loss(model: PreTrainedModel) -> bool:
    """Return whether a model routes tokens and hands its router's logits out, and let TRL find the number of experts.

    Granite 4 has a router's settings whether it has experts or not, and calls their number `num_local_experts`: TRL
    1.16 asks for `num_experts` and fails. With transformers 5.17 it hands no logits out, and TRL 1.14 fails on that.
    """
    config: Any = model.config.get_text_config()
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not count:
        return False
    if getattr(config, "num_experts", None) is None:
        config.num_experts = count
    recorded = getattr(model.base_model, "_can_record_outputs", None) or {"router_logits"}
    if "router_logits" not in recorded:
        logger.warning(
            "No router loss is added: transformers %s does not return the router logits of %s.",
            transformers.__version__,
            type(model).__name__,
        )
    return "router_logits" in recorded


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
