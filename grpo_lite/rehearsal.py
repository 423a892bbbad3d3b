"""Run the largest wave and the largest micro-batch once before the first step, so that an overflow shows at once.

Completions at their full length come late in training, and a run that dies at step 600 has cost a night. Here the
longest prompt is given made-up completions at the cap: one decoding step behind full buffers, one forward and backward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from grpo_lite.group_cache import GroupCache
from grpo_lite.memory import cache_capacity
from grpo_lite.rollout import GroupDecoder, plan_waves
from grpo_lite.scoring import base_model


def longest_round(trainer: Any, prompt: list[int]) -> list[list[int]]:
    """Return the prompts of a round of generation, each repeated G times, all as long as `prompt` and distinct."""
    rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    vocabulary = base_model(trainer.accelerator.unwrap_model(trainer.model)).config.vocab_size
    return [[(prompt[0] + i // trainer.num_generations) % vocabulary, *prompt[1:]] for i in range(rows)]


def rehearse_rollout(trainer: Any, prompt: list[int]) -> None:
    """Decode one token of the largest wave behind prompts and completions at full length; draws nothing."""
    model = base_model(trainer.accelerator.unwrap_model(trainer.model))
    prompts: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(longest_round(trainer, prompt)):
        prompts.setdefault(tuple(ids), []).append(row)
    longest = trainer.max_completion_length
    waves = plan_waves(prompts, longest, trainer.options.rollout_kv_tokens)
    wave = max(waves, key=lambda groups: sum(len(p) + len(members) * longest for p, members in groups))
    decoder = GroupDecoder(trainer.accelerator.autocast)
    device = model.device
    groups = torch.tensor([group for group, (_, members) in enumerate(wave) for _ in members], device=device)
    flat = torch.tensor([token for ids, _ in wave for token in ids], device=device).unsqueeze(0)
    positions = torch.arange(len(prompt), device=device).repeat(len(wave)).unsqueeze(0)
    cache = GroupCache([len(prompt)] * len(wave), groups)
    with torch.no_grad(), trainer._no_checkpointing(trainer.model), trainer.accelerator.autocast():
        decoder._forward(model, flat, positions, cache)
        for layer, (keys, _) in cache.prompts.items():
            shape = (len(groups), keys.size(1), cache_capacity(longest), keys.size(3))
            cache.completions[layer] = keys.new_zeros(shape), keys.new_zeros(shape)
        cache.generated = max(0, longest - 2)
        last = torch.full((len(groups), 1), len(prompt) + cache.generated, device=device)
        hidden = decoder._forward(model, flat[0, : len(groups)].new_zeros((len(groups), 1)), last, cache)[:, 0]
        log_p = torch.log_softmax(decoder._logits(model, hidden) / 0.9, dim=-1)
        (log_p.exp() * log_p).sum(-1)


def longest_inputs(trainer: Any, prompt: list[int]) -> dict[str, Tensor]:
    """Return a micro-step's inputs as TRL prepares them, with every completion at its cap."""
    rows, longest = trainer.args.per_device_train_batch_size, trainer.max_completion_length
    device = trainer.accelerator.device
    prompts = torch.tensor(longest_round(trainer, prompt)[:rows], device=device)  # (B, P)
    completions = prompts[:, :1].expand(rows, longest).contiguous()  # (B, C)
    signs = 1.0 - 2.0 * (torch.arange(rows, device=device) % 2)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": signs,
        "num_items_in_batch": torch.tensor(rows * longest, device=device),
    }
    if trainer.beta != 0.0:
        inputs["ref_per_token_logps"] = torch.zeros(completions.shape, device=device)
    return inputs


def rehearse_training(trainer: Any, inputs: dict[str, Tensor]) -> None:
    """Take one micro-step's forward and backward, with room kept for the optimizer's state; leaves no gradient."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    has_state = bool(getattr(trainer.optimizer, "state", None))
    kept = [] if has_state else [torch.empty((2, *p.shape), dtype=torch.float32, device=p.device) for p in trained]
    try:
        with trainer._unrecorded(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=inputs["num_items_in_batch"])
        trainer.accelerator.backward(cast(Tensor, loss))
    finally:
        del kept
        for parameter in trained:
            parameter.grad = None
