"""How long a step takes, from a forward pass that is measured: for the probe, before there is a trainer.

Place in the line: beneath `probe.py`. A step is its share of rollouts, rewards, and forward and backward passes; the
last are counted in multiples of one forward pass over real completions, computed as training would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from grpo_lite import attention
from grpo_lite.recipe import Recipe

BACKWARD_FORWARDS = 2.0  # a backward pass multiplies twice where the forward multiplies once
MEASURED_GROUPS = 4


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps a run takes, and how many completions each of them costs."""

    steps: int
    sampled: float  # completions generated a step: rounds that are trained on several times cost less
    trained: int  # completions that go through forward and backward a step


def schedule(recipe: Recipe, rows: int) -> Schedule:
    """Return a recipe's schedule over so many training rows, counted as transformers and TRL 1.16 do."""
    grpo = recipe.grpo
    per_device = int(grpo.get("per_device_train_batch_size", 8))
    accumulation = int(grpo.get("gradient_accumulation_steps", 1))
    iterations = int(grpo.get("num_iterations") or 1)
    trained = per_device * accumulation
    sampled = trained / iterations
    if grpo.get("max_steps", -1) > 0:
        return Schedule(int(grpo["max_steps"]), sampled, trained)
    rounds = max(1, rows // max(1, recipe.generation_batch // recipe.num_generations))
    micro_steps = rounds * iterations * max(1, recipe.generation_batch // per_device)
    epoch = max(1, math.ceil(micro_steps / accumulation))
    return Schedule(math.ceil(float(grpo.get("num_train_epochs", 3)) * epoch), sampled, trained)


def training_forwards(recipe: Recipe) -> float:
    """Return what forward and backward of a completion cost in forward passes, checkpointing's own included."""
    return 1.0 + BACKWARD_FORWARDS + (1.0 if recipe.grpo.get("gradient_checkpointing", True) else 0.0)


def forward_seconds(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sequence[int]]],
) -> float:
    """Return the seconds a completion takes in a forward pass without gradients, packed where training would pack.

    Args:
        recipe: the recipe.
        model: the policy.
        tokenizer: whose end-of-sequence token closes a completion.
        prompts: token ids.
        groups: completions of each prompt; the first few groups are measured.
    """
    import torch

    count = min(MEASURED_GROUPS, len(prompts))
    size = min(recipe.num_generations, len(groups[0]))
    end = [0 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)]
    chosen = [[[*prompts[i], *completion, *end] for completion in groups[i][:size]] for i in range(count)]
    run = _packed if _is_packed(recipe, model) else _padded
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            run(model, chosen[0], len(prompts[0]))  # the first time compiles kernels and lays out weights
            _wait(model)
            begun = time.perf_counter()
            for i, rows in enumerate(chosen):
                run(model, rows, len(prompts[i]))
            _wait(model)
            return (time.perf_counter() - begun) / (count * size)
    finally:
        model.train(was_training)


def _is_packed(recipe: Recipe, model: Any) -> bool:
    from grpo_lite.scoring import base_model

    return recipe.compute == "packed" and base_model(model).config._attn_implementation == attention.IMPLEMENTATION


def _packed(model: Any, rows: list[list[int]], prompt: int) -> None:
    import torch

    from grpo_lite.packing import PaddedBatch, pack
    from grpo_lite.scoring import Scoring, score

    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)  # (G, P + C)
    everyone = [list(range(len(rows)))]
    batch = PaddedBatch(ids, [prompt] * len(rows), [len(row) - prompt for row in rows], prompt, everyone)
    score(model, pack(batch, everyone), Scoring(1.0), nullcontext)


def _padded(model: Any, rows: list[list[int]], prompt: int) -> None:
    import torch

    del prompt
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)  # (G, P + C)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    model(input_ids=ids, attention_mask=mask, logits_to_keep=1)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
