"""Estimates how long a step takes from a measured forward pass: for the probe, before there is a trainer.

Place in the line: beneath `probe.py`. A step is its share of rollouts, rewards, and forward and backward passes; the
last are counted in multiples of one forward pass over real completions, computed as training would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from grpo_lite.engine import attention
from grpo_lite.engine.out_of_memory import free_memory, is_out_of_memory
from grpo_lite.recipe.recipe import Recipe

BACKWARD_FORWARDS = 2.0  # a backward pass multiplies twice where the forward multiplies once


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
        groups: completions of each prompt; as many as make one micro-step are measured.
    """
    import torch

    size = min(recipe.num_generations, len(groups[0]))
    end = [0 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)]
    pairs = [(prompt, [*ids, *end]) for prompt, group in zip(prompts, groups, strict=True) for ids in group[:size]]
    rows = [(list(prompt), ids) for prompt, ids in pairs[: recipe.schedule.rows]]
    run = _packed if _is_packed(recipe, model) else _padded
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            while True:
                try:
                    run(model, rows)  # the first time compiles kernels and lays out weights
                    return _timed(partial(run, model, rows), model) / len(rows)
                except RuntimeError as error:
                    if not is_out_of_memory(error) or len(rows) == 1:
                        raise
                rows = rows[: len(rows) // 2]  # training divides a micro-step too
                free_memory()
    finally:
        model.train(was_training)


def _timed(run: Callable[[], None], model: Any) -> float:
    _wait(model)
    begun = time.perf_counter()
    run()
    _wait(model)
    return time.perf_counter() - begun


def _is_packed(recipe: Recipe, model: Any) -> bool:
    from grpo_lite.engine.score import base_model

    return recipe.compute == "packed" and attention.is_installed(base_model(model))


def _packed(model: Any, rows: list[tuple[list[int], list[int]]]) -> None:
    from grpo_lite.engine.packing import pack, plan_microbatches, read_padded_batch
    from grpo_lite.engine.score import Scoring, score

    ids, mask, width = _batch(model, rows)
    batch = read_padded_batch(ids, mask, width)
    assert batch is not None  # built above, without gaps
    score(model, pack(batch, plan_microbatches(batch, range(len(rows)), None)[0]), Scoring(1.0), nullcontext)


def _padded(model: Any, rows: list[tuple[list[int], list[int]]]) -> None:
    ids, mask, _ = _batch(model, rows)
    model(input_ids=ids, attention_mask=mask, logits_to_keep=1)


def _batch(model: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[Any, Any, int]:
    """Return ids and mask `(B, P + C)`, padded as TRL pads, and C."""
    import torch

    before, after = max(len(prompt) for prompt, _ in rows), max(len(ids) for _, ids in rows)
    ids, mask = [], []
    for prompt, completion in rows:
        left, right = before - len(prompt), after - len(completion)
        ids.append([0] * left + prompt + completion + [0] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device), after


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
