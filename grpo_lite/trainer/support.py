"""`Support`: which models, batches and settings our compute may serve; all others take TRL's own way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from grpo_lite.engine import attention
from grpo_lite.engine.decode import decoding_obstacle
from grpo_lite.engine.score import PlainScores, Scoring, base_model, self_check

logger = logging.getLogger(__name__)


class Support:
    """Decides once per model whether its attention can be packed, and says in one line why not."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.decided: dict[int, bool] = {}  # per model (policy, reference), at first use
        self._shown: set[str] = set()

    def is_packable(self, model: nn.Module) -> bool:
        """Return whether log-probabilities and gradients of this model are packed."""
        return self.trainer.options.compute == "packed" and self.is_supported(model)

    def is_supported(self, model: nn.Module) -> bool:
        """Return whether packed compute is right for this model; the first call runs the self-check."""
        unwrapped = self.trainer.accelerator.unwrap_model(model)
        inner = base_model(unwrapped)
        if id(inner) not in self.decided:
            reason = self._obstacle(unwrapped)
            if reason:
                logger.warning("Packed compute and shared rollouts are off, TRL's own are used: %s.", reason)
            self.decided[id(inner)] = reason is None
        return self.decided[id(inner)]

    def can_share_rollout(
        self, prompt_ids: list[list[int]], images: Any = None, multimodal_fields: Any = None, *_: Any, **__: Any
    ) -> bool:
        """Return whether our decoder may generate for these prompts; takes `_generate_single_turn`'s arguments."""
        trainer = self.trainer
        if trainer.options.rollout == "generate" or trainer.use_vllm or trainer.use_transformers_continuous_batching:
            return False
        if not self.is_supported(trainer.model) or not all(prompt_ids) or images is not None or multimodal_fields:
            return False
        reason = decoding_obstacle(trainer.generation_config)
        if reason:
            self._show_once(f"Shared rollouts are off, `generate` is used: {reason}.")
            return False
        lengths = [len(ids) for ids in prompt_ids]
        return self.has_one_rope(trainer.model, min(lengths), max(lengths) + trainer.max_completion_length)

    def has_one_rope(self, model: nn.Module, shortest: int, longest: int) -> bool:
        """Return whether rows of all of these lengths are decoded with the same rotary frequencies."""
        inner = base_model(self.trainer.accelerator.unwrap_model(model))
        return not self._is_beyond(attention.rope_border(inner, shortest, longest), inner, "Shared rollouts are")

    def has_fixed_rope(self, model: nn.Module, longest: int) -> bool:
        """Return whether the rotary frequencies of rows up to this length, padding included, depend on it alone."""
        inner = base_model(self.trainer.accelerator.unwrap_model(model))
        return not self._is_beyond(attention.dynamic_rope_border(inner, longest), inner, "Packed compute is")

    def _is_beyond(self, border: int | None, inner: nn.Module, what: str) -> bool:
        if border is not None:
            self._show_once(
                f"{what} off for batches that reach or cross {border} tokens, TRL's own is used: "
                f"{type(inner).__name__} changes its rotary frequencies there."
            )
        return border is not None

    def no_checkpointing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Switch activation checkpointing off: without a backward it saves nothing, and its reentrant kind warns."""
        unwrapped = self.trainer.accelerator.unwrap_model(model)
        return disable_gradient_checkpointing(unwrapped, self.trainer.args.gradient_checkpointing_kwargs)

    def _obstacle(self, model: nn.Module) -> str | None:
        trainer = self.trainer
        alone = trainer.accelerator.num_processes == 1 and trainer.accelerator.distributed_type == DistributedType.NO
        if not alone and not trainer.peers.can_average_gradients():
            return "more than one process"
        if reason := model_obstacle(model):
            return reason
        scoring = Scoring(trainer.temperature, trainer.args.cast_lm_head_to_fp32)
        plain = partial(GRPOTrainer._get_per_token_logps_and_entropies, trainer)
        with self.no_checkpointing(model):
            return pack_attention(model, scoring, trainer.accelerator.autocast, lambda *batch: plain(model, *batch)[0])

    def _show_once(self, line: str) -> None:
        if line not in self._shown:
            self._shown.add(line)
            logger.warning(line)


def model_obstacle(model: nn.Module) -> str | None:
    """Return what a model with its adapter has that packed compute does not serve, or None."""
    inner = base_model(model)
    if hasattr(model, "_orig_mod"):
        return "a compiled model"
    if len(set(getattr(inner, "hf_device_map", {}).values())) > 1:
        return "a model split over devices"
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "the adapter is a prompt-learning one"
    if reason := attention.obstacle(inner):
        return f"{type(inner).__name__}: {reason}"
    return None


def pack_attention(
    model: nn.Module, scoring: Scoring, autocast: Callable[[], AbstractContextManager[Any]], plain: PlainScores
) -> str | None:
    """Let the model's attention be packed, unless it then computes something else; return what is wrong then.

    Args:
        model: with its adapter, activation checkpointing off.
        scoring, autocast, plain: as for `engine.score.self_check`.
    """
    inner = base_model(model)
    attention.install(inner)
    reason = self_check(model, scoring, autocast, plain)
    if reason is None:
        return None
    attention.uninstall(inner)
    return f"{type(inner).__name__}: {reason}"
