"""`first_order`: for autograd functions that compute their gradient outside of autograd, which cannot derive it again.

PyTorch's own `once_differentiable` refuses too late: a second `torch.autograd.grad` passes by what is missing without
an error where its input is reached another way (PyTorch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


def first_order(backward: Backward) -> Backward:
    """Return an autograd function's `backward` that refuses to be part of a graph.

    Raises:
        RuntimeError: when it is called, with `create_graph=True`.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: gradients of gradients are not computed by grpo_lite's engine. Leave it out, or "
                "set compute: plain and rollout: generate in the recipe to train with TRL's own compute."
            )
        return backward(ctx, *grads)

    return checked
