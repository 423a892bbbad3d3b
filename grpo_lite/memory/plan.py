"""plan_memory: does a recipe fit a card, with which budgets, and if not, which changes would make it. Torch-free.

Place in the line: between the device and the model. `phases` counts a `Job` (`job`); here budgets are
chosen that change no gradient: how many tokens go through the model at once, in the warm-up and in GRPO, how many are
cached in a rollout, and how many completions an evaluation generates at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from grpo_lite.commands import either, hint
from grpo_lite.errors import MemoryBudgetError
from grpo_lite.memory.evaluation import evaluation_phase, most_rows
from grpo_lite.memory.phases import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    Job,
    PhaseBytes,
    rollout_phase,
    row_length,
    training_phase,
    weight_bytes,
)
from grpo_lite.memory.warmup import warmup_phase, warmup_tokens
from grpo_lite.models.config import KNOWN
from grpo_lite.models.shape import read_shape
from grpo_lite.units import gib

STEP = 64  # budgets are multiples of it


@dataclass(frozen=True)
class MemoryPlan:
    """A job with its budgets chosen, and what it takes."""

    job: Job
    memory_bytes: int  # of the card
    fits: bool
    chosen: dict[str, Any]  # recipe keys that the plan sets, with their values; the warm-up's budget is not one
    assumed: tuple[str, ...] = ()

    @property
    def rollout(self) -> PhaseBytes:
        """The rollout phase."""
        return rollout_phase(self.job)

    @property
    def training(self) -> PhaseBytes:
        """The training phase."""
        return training_phase(self.job)

    @property
    def evaluation(self) -> PhaseBytes | None:
        """Generating for the evaluation, if there is one; it takes no more than there is, so it is not in the peak."""
        return evaluation_phase(self.job) if self.job.eval_rows else None

    @property
    def warmup(self) -> PhaseBytes | None:
        """Supervised fine-tuning before GRPO, if there is one; like the evaluation it takes no more than there is."""
        return warmup_phase(self.job) if self.job.warmup_row else None

    @property
    def peak(self) -> int:
        """The largest allocation in either of GRPO's phases: what `torch.cuda.max_memory_allocated` counts."""
        return max(self.rollout.total, self.training.total)

    @property
    def needed(self) -> int:
        """What the card must have: the peak, the CUDA context, what the allocator cannot use, and vLLM's share."""
        return needed_bytes(self.job, self.memory_bytes)


def needed_bytes(job: Job, memory_bytes: int) -> int:
    """Return what a card must have for a job, in bytes."""
    needed = _with_overhead(job, max(rollout_phase(job).total, training_phase(job).total), memory_bytes)
    # The evaluation is divided down to single completions, the warm-up to single rows.
    one = replace(job, eval_rows=min(1, job.eval_rows), warmup_tokens=job.warmup_row)
    return max(needed, _evaluation_bytes(one, memory_bytes), _warmup_bytes(one, memory_bytes))


def _evaluation_bytes(job: Job, memory_bytes: int) -> int:
    return _with_overhead(job, evaluation_phase(job).total, memory_bytes) if job.eval_rows else 0


def _warmup_bytes(job: Job, memory_bytes: int) -> int:
    return _with_overhead(job, warmup_phase(job).total, memory_bytes) if job.warmup_row else 0


def _with_overhead(job: Job, peak: int, memory_bytes: int) -> int:
    vllm = int(job.vllm_share * memory_bytes) if job.rollout == "vllm" else 0
    return peak + CONTEXT_BYTES + vllm + int(FRAGMENTATION * (peak - weight_bytes(job)))


def plan_memory(job: Job, memory_bytes: int, assumed: tuple[str, ...] = ()) -> MemoryPlan:
    """Choose the largest budgets that fit; budgets that the recipe sets are upper bounds.

    Returns:
        The plan; `fits` is False when even the smallest budgets are too large.
    """

    def fits(candidate: Job) -> bool:
        return needed_bytes(candidate, memory_bytes) <= memory_bytes

    chosen: dict[str, Any] = {}
    if not job.checkpointing and not fits(job):
        job, chosen["grpo.gradient_checkpointing"] = replace(job, checkpointing=True), True
    if not fits(replace(job, tokens=job.longest)):
        kv_tokens = _largest(
            job.longest, _wave_tokens(job), lambda n: fits(replace(job, tokens=job.longest, kv_tokens=n))
        )
        if kv_tokens is not None and job.is_shared:
            job, chosen["memory.rollout_kv_tokens"] = replace(job, kv_tokens=kv_tokens), kv_tokens
    if not fits(job) and job.is_packed:
        tokens = _largest(job.longest, job.microbatch_tokens, lambda n: fits(replace(job, tokens=n)))
        if tokens is not None:
            job, chosen["memory.tokens_per_microbatch"] = replace(job, tokens=tokens), tokens
    if job.eval_rows:
        rows = most_rows(
            job.eval_rows, lambda n: _evaluation_bytes(replace(job, eval_rows=n), memory_bytes) <= memory_bytes
        )
        if rows < job.eval_rows:
            job, chosen["eval.batch_size"] = replace(job, eval_rows=rows), rows
    if job.warmup_row and _warmup_bytes(job, memory_bytes) > memory_bytes:
        tokens = _largest(
            job.warmup_row,
            warmup_tokens(job),
            lambda n: _warmup_bytes(replace(job, warmup_tokens=n), memory_bytes) <= memory_bytes,
        )
        if tokens is not None:
            job = replace(job, warmup_tokens=tokens)
    return MemoryPlan(job, memory_bytes, fits(job), chosen if fits(job) else {}, assumed)


def _wave_tokens(job: Job) -> int:
    whole = job.batch * row_length(job.longest)
    return min(whole, job.kv_tokens or whole)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest multiple of STEP (or `low`) up to `high` that fits, None when not even `low` does."""
    if not fits(low):
        return None
    steps = (0, (high - low) // STEP + 1)
    while steps[1] - steps[0] > 1:
        middle = sum(steps) // 2
        steps = (middle, steps[1]) if fits(low + middle * STEP) else (steps[0], middle)
    return low + steps[0] * STEP


def require_fit(plan: MemoryPlan, where: str) -> None:
    """Refuse a plan that does not fit, with the cheapest changes that would.

    Raises:
        MemoryBudgetError: it does not fit.
    """
    if not plan.fits:
        smallest = replace(plan.job, tokens=plan.job.longest, kv_tokens=plan.job.longest)
        raise MemoryBudgetError(
            f"{where}: needs {gib(needed_bytes(smallest, plan.memory_bytes))} with the smallest budgets, and "
            f"the card has {gib(plan.memory_bytes)}.\n{advice(plan)}\nThe arithmetic: {hint('plan')}. To try "
            "anyway: memory.fit=false."
        )


def advice(plan: MemoryPlan) -> str:
    """Return the three cheapest changes, each of which would make the job fit, as lines."""
    changes = [f"  {text}" for text in itertools.islice(cheapest_changes(plan.job, plan.memory_bytes), 3)]
    if not changes:
        table = either("make plan ARGS=--all-gpus", "grpo-lite plan --all-gpus")
        return f"No single change makes it fit: take a smaller model ({table}), or a larger card."
    return "Each of these alone would make it fit, the cheapest first:\n" + "\n".join(changes)


def cheapest_changes(job: Job, memory_bytes: int) -> Iterator[str]:
    """Yield single changes that make a job fit, those that change the result least first."""

    def fits(**changes: Any) -> bool:
        return plan_memory(replace(job, **changes), memory_bytes).fits

    if not job.checkpointing and fits(checkpointing=True):
        yield "grpo.gradient_checkpointing=true   (a quarter slower, same gradient)"
    if job.compute == "plain" and fits(compute="packed"):
        yield "compute=packed   (same gradient)"
    if job.rollout != "shared" and fits(rollout="shared"):
        yield "rollout=shared grpo.use_vllm=false"
    if job.optimizer_bytes > 2 and fits(optimizer_bytes=2.0):
        yield "grpo.optim=paged_adamw_8bit"
    if not job.offload and job.checkpointing and fits(offload=True):
        yield "memory.offload_activations=true   (slower: activations wait in main memory)"
    # Computing in float32 may be the card's or the recipe's will; vLLM takes no quantized base.
    if job.load_in != "4bit" and job.rollout != "vllm" and fits(load_in="4bit"):
        yield "model.load_in=4bit"
    shorter = _largest(STEP, job.completion - 1, lambda n: fits(completion=n))
    if shorter is not None:
        yield f"grpo.max_completion_length={shorter}"
    shorter = _largest(STEP, job.eval_completion - 1, lambda n: fits(eval_completion=n)) if job.eval_rows else None
    if shorter is not None:
        yield f"eval.max_new_tokens={shorter}"
    shorter = _largest(STEP, job.warmup_row - 1, lambda n: fits(warmup_row=n)) if job.warmup_row else None
    if shorter is not None:
        yield f"warmup.max_completion_tokens={max(1, shorter - job.prompt)}"
    if job.rank > 8 and fits(rank=8):
        yield f"lora.r=8 lora.lora_alpha=16   (instead of r={job.rank})"
    shorter = _largest(STEP, job.prompt - 1, lambda n: fits(prompt=n))
    if shorter is not None:
        yield f"data.max_prompt_tokens={shorter}"
    yield from _smaller_models(job, fits)


def _smaller_models(job: Job, fits: Callable[..., bool]) -> Iterator[str]:
    shapes = {name: read_shape(config, name) for name, config in KNOWN.items()}
    own = next((name for name, shape in shapes.items() if shape == job.shape), "")
    family = own.rpartition("-")[0]
    smaller = [n for n, s in shapes.items() if family and n.startswith(family) and s.parameters < job.shape.parameters]
    for name in sorted(smaller, key=lambda n: -shapes[n].parameters):
        if fits(shape=shapes[name]):
            yield f"a smaller model of the family: {name}"
            return


def largest_completion(job: Job, memory_bytes: int, whole_groups: bool) -> int | None:
    """Return the longest completion cap that fits, in tokens.

    Never more than the model has positions for behind the prompt.

    Args:
        job: whose prompt, group and model stay.
        memory_bytes: of the card.
        whole_groups: whether a group must go through rollout and training in one piece (fast), or may be divided down
            to single completions.
    """

    def fits(completion: int) -> bool:
        pieces = job.group if whole_groups else 1
        tokens = job.prompt + pieces * completion
        candidate = replace(job, completion=completion, rows=max(job.rows, pieces), tokens=tokens, kv_tokens=tokens)
        return needed_bytes(candidate, memory_bytes) <= memory_bytes

    most = most_completion(job)
    if most is None:
        return _largest(STEP, 131072, fits)
    if most < 1:
        return None
    return most if fits(most) else _largest(min(STEP, most), most, fits)


def most_completion(job: Job) -> int | None:
    """Return the tokens that the model's positions leave for a completion behind the longest prompt; None: unknown."""
    return None if job.shape.positions is None else max(0, job.shape.positions - job.prompt)
