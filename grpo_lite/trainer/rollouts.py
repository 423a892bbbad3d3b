"""`RolloutGRPOTrainer`: how TRL's GRPOTrainer generates, and which models its engine may serve at all.

The part of the seam to TRL (`trainer.py`) that concerns rollouts: TRL's own call of `generate` is given our decoding
loop. Read in trl 1.14.0 and 1.16.0.
"""

import logging
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from grpo_lite.engine import attention
from grpo_lite.engine.decode import GroupDecoder, Rollout, decoding_obstacle
from grpo_lite.engine.lora import shorten_lora
from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.quantised import dequantized, keep_weights_unpacked
from grpo_lite.engine.score import SELF_CHECK_TOKENS, Scoring, base_model, self_check
from grpo_lite.task.tokens import holds_special_tokens
from grpo_lite.task.tokens import prompt_ids as tokens_of_prompt
from grpo_lite.trainer.refill import SamplingGRPOTrainer

logger = logging.getLogger(__name__)


class RolloutGRPOTrainer(SamplingGRPOTrainer):
    """GRPOTrainer with shared-prefix rollouts; see `EngineOptions`."""

    def __init__(self, *args: Any, options: EngineOptions | None = None, **kwargs: Any) -> None:
        self._supported: dict[int, bool] = {}  # per model (policy, reference), decided at first use
        self._told: set[str] = set()
        self._rollout: Rollout | None = None  # of the last generation
        self._old_logps_wanted = False  # TRL's next request for log-probabilities is for those of the sampling policy
        super().__init__(*args, options=options, **kwargs)
        keep_weights_unpacked(self.model)
        if not self.options.is_plain:
            shorten_lora(self.model)

    def prepare_decoding(self) -> None:
        """Decide now whether the model is served by our decoder, for sampling outside of a step."""
        if self.options.rollout == "shared" and not self.use_vllm:
            self._is_supported(self.model)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, images, multimodal = super()._tokenize_prompts(prompts)
        template = {"chat_template": self.chat_template, "tools": self.tools or None, **self.chat_template_kwargs}
        if images is None and not multimodal and self.environment_factories is None:
            for row, prompt in enumerate(prompts):
                if holds_special_tokens(prompt, self.processing_class):  # TRL would read them as markup
                    ids[row] = tokens_of_prompt(prompt, self.processing_class, template)
        return ids, images, multimodal

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        self._rollout = None
        if self.options.rollout == "generate" or not self._can_share_rollout(prompt_ids, args, kwargs):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        inner = base_model(self.accelerator.unwrap_model(self.model))
        decoder = GroupDecoder(self.accelerator.autocast, self.options.rollout_kv_tokens, temperature=self.temperature)
        previous = inner.__dict__.get("generate")
        inner.generate = partial(inner.generate, custom_generate=decoder)
        try:
            with dequantized(inner):
                generated = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            del inner.__dict__["generate"]
            if previous is not None:
                inner.generate = previous
        if [len(ids) for ids in generated[0]] == [len(row) for row in decoder.rollout.entropies]:
            self._rollout = decoder.rollout
        return generated

    def _can_share_rollout(self, prompt_ids: list[list[int]], args: Any, kwargs: Any) -> bool:
        if self.use_vllm or self.use_transformers_continuous_batching or not self._is_supported(self.model):
            return False
        if not all(prompt_ids):
            return False
        images, multimodal = (*args, None, None)[:2]
        if images is not None or multimodal or kwargs.get("images") or kwargs.get("multimodal_fields"):
            return False
        reason = decoding_obstacle(self.generation_config)
        if reason:
            self._tell_once(f"Shared rollouts are off, `generate` is used: {reason}.")
            return False
        return self._is_inside_window(self.model, max(map(len, prompt_ids)) + self.max_completion_length)

    def _score_generation(self, inputs: Any) -> dict[str, Any]:
        # When TRL asks for old log-probabilities, it does so first (trl 1.14-1.16); see `_sampled_logps`.
        rounds = self.args.steps_per_generation * self.num_iterations
        wanted = self.args.gradient_accumulation_steps % rounds != 0
        self._old_logps_wanted = wanted and self.options.compute == "packed" and not self.use_vllm
        try:
            output = super()._score_generation(inputs)
        finally:
            self._old_logps_wanted = False
        if self._rollout is not None and not self.tools:
            mask = output["completion_mask"]
            output["rollout_entropies"] = _padded(self._rollout.entropies, mask)
        return output

    def _sampled_logps(self, width: int, device: torch.device) -> Tensor | None:
        """Return the log-probabilities `(B, width)` noted while sampling, where TRL asks for the old policy's."""
        wanted, self._old_logps_wanted = self._old_logps_wanted, False
        if not wanted or self._rollout is None or self.tools:
            return None
        return _padded(self._rollout.logps, torch.empty((len(self._rollout.logps), width), device=device))

    # Which models can be packed

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            logger.warning(line)

    def _is_inside_window(self, model: nn.Module, longest: int) -> bool:
        """Say whether sequences of this length fit into the model's attention window, if it has one."""
        inner = base_model(self.accelerator.unwrap_model(model))
        window = attention.sliding_window(inner)
        if window is None or longest <= window:
            return True
        self._tell_once(
            "Packed compute and shared rollouts are off for sequences beyond the attention window, TRL's own are used: "
            f"{type(inner).__name__} has a window of {window} tokens."
        )
        return False

    def _is_supported(self, model: nn.Module) -> bool:
        """Decide once per model whether its attention can be packed; say why not in one line."""
        unwrapped = self.accelerator.unwrap_model(model)
        inner = base_model(unwrapped)
        if id(inner) not in self._supported:
            reason = self._obstacle(unwrapped)
            if reason:
                logger.warning("Packed compute and shared rollouts are off, TRL's own are used: %s.", reason)
            self._supported[id(inner)] = reason is None
        return self._supported[id(inner)]

    def _obstacle(self, model: nn.Module) -> str | None:
        alone = self.accelerator.num_processes == 1 and self.accelerator.distributed_type == DistributedType.NO
        if not alone and not self._averages_gradients():
            return "more than one process"
        if hasattr(model, "_orig_mod"):
            return "a compiled model"
        if len(set(getattr(base_model(model), "hf_device_map", {}).values())) > 1:
            return "a model split over devices"
        if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
            return "the adapter is a prompt-learning one"
        inner = base_model(model)
        reason = attention.obstacle(inner)
        if reason:
            return f"{type(inner).__name__}: {reason}"
        window = attention.sliding_window(inner)
        if window is not None and window < SELF_CHECK_TOKENS:
            return f"{type(inner).__name__} has a window of {window} tokens"
        previous = inner.config._attn_implementation
        attention.install(inner)
        scoring = Scoring(self.temperature, self.args.cast_lm_head_to_fp32)
        plain = partial(GRPOTrainer._get_per_token_logps_and_entropies, self)
        with self._no_checkpointing(model):
            reason = self_check(model, scoring, self.accelerator.autocast, lambda *batch: plain(model, *batch)[0])
        if reason:
            inner.config._attn_implementation = previous
            return f"{type(inner).__name__}: {reason}"
        return None

    def _averages_gradients(self) -> bool:
        """Say whether several processes are served (`trainer_parallel.py`)."""
        return False

    def _no_checkpointing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Activation checkpointing has nothing to save without a backward, and its reentrant kind warns."""
        unwrapped = self.accelerator.unwrap_model(model)
        return disable_gradient_checkpointing(unwrapped, self.args.gradient_checkpointing_kwargs)


def _padded(rows: list[list[float]], like: Tensor) -> Tensor:
    """Return the rows as a tensor of `like`'s shape and device, zeros behind each."""
    padded = torch.zeros(like.shape)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values)
    return padded.to(like.device)
