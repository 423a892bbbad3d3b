"""What every trainer here asks of its numbers: gradients that are finite, and an adapter that may be saved.

Apart from the trainers, since TRL's own and Unsloth's are asked too (`trainer_sealed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from grpo_lite.errors import TrainingError


def are_finite(gradients: Iterable[Tensor]) -> bool:
    """Return whether no gradient, of one or more, holds NaN or infinity; one transfer from the device."""
    return bool(torch.isfinite(torch.stack([g.detach().abs().max().float() for g in gradients])).all())


def require_finite_adapter(trainer: Any, last_good: Callable[[], str] = str) -> None:
    """Refuse to save a trainer's adapter that holds NaN or infinity.

    Args:
        trainer: a transformers Trainer.
        last_good: returns a sentence on what had been saved before; asked only when there is something to refuse.

    Raises:
        TrainingError: it does; the checkpoint before is the last good one.
    """
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            said = [f"({name}), and such weights are never saved.", *filter(None, [last_good()])]
            raise TrainingError(
                f"{trainer.args.output_dir}: step {trainer.state.global_step}: the adapter holds NaN or infinity "
                f"{' '.join(said)} Lower grpo.learning_rate or set grpo.max_grad_norm, in a new run directory."
            )
