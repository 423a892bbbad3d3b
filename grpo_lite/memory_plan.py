"""plan_memory: does a recipe fit a card, with which budgets, and if not, which changes would make it. Torch-free.

Place in the line: between the device and the model. `memory.py` counts; here a recipe becomes a `Job`, and budgets are
chosen that change no gradient: how many tokens go through the model at once, and how many are cached in a rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from grpo_lite.errors import MemoryBudgetError
from grpo_lite.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    Job,
    PhaseBytes,
    rollout_phase,
    training_phase,
    weight_bytes,
)
from grpo_lite.model_shapes import KNOWN, ModelShape, model_shape, read_shape
from grpo_lite.recipe import Recipe

ASSUMED_PROMPT = 256  # tokens, where the recipe does not cap its prompts and none have been read yet
STEP = 64  # budgets are multiples of it
_OPTIMIZER_BYTES = {"8bit": 2.0, "adafactor": 0.2, "sgd": 0.0, "lion": 4.0}


@dataclass(frozen=True)
class MemoryPlan:
    """A job with its budgets chosen, and what it takes."""

    job: Job
    memory_bytes: int  # of the card
    fits: bool
    chosen: dict[str, Any]  # recipe keys that the plan sets, with their values
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
    def peak(self) -> int:
        """The largest allocation in either phase: what `torch.cuda.max_memory_allocated` counts."""
        return max(self.rollout.total, self.training.total)

    @property
    def needed(self) -> int:
        """What the card must have: the peak, the CUDA context, what the allocator cannot use, and vLLM's share."""
        return needed_bytes(self.job, self.memory_bytes)


def needed_bytes(job: Job, memory_bytes: int) -> int:
    """Return what a card must have for a job, in bytes."""
    peak = max(rollout_phase(job).total, training_phase(job).total)
    vllm = int(job.vllm_share * memory_bytes) if job.rollout == "vllm" else 0
    return peak + CONTEXT_BYTES + vllm + int(FRAGMENTATION * (peak - weight_bytes(job)))


def recipe_job(
    recipe: Recipe, shape: ModelShape | None = None, prompt: int | None = None, bfloat16: bool = True
) -> tuple[Job, tuple[str, ...]]:
    """Return a recipe's job and what was assumed.

    Args:
        recipe: the recipe.
        shape: the model's shape; None: found by `model_shape`.
        prompt: the longest prompt in tokens; None: the recipe's cap, or an assumption.
        bfloat16: whether the card computes in it; on others some models run in float32.
    """
    notes: list[str] = []
    if shape is None:
        shape, source = model_shape(recipe.model.id, recipe.model.revision)
        notes.append(f"sizes of {recipe.model.id} from {source}")
    if prompt is None:
        prompt = recipe.data.max_prompt_tokens
        if prompt is None:
            prompt = ASSUMED_PROMPT
            notes.append(f"prompts up to {prompt} tokens (the recipe sets no data.max_prompt_tokens)")
    grpo, lora = recipe.grpo, recipe.lora
    targets = lora.get("target_modules")
    names = tuple(targets) if isinstance(targets, list | tuple | set) else None
    if lora.get("modules_to_save"):
        notes.append("lora.modules_to_save is not counted")
    wide = recipe.model.load_in == "32bit" or recipe.model.dtype == "float32"
    if shape.overflows_in_float16 and not bfloat16:
        wide = True
        notes.append("float32, as this model overflows in float16 and the card has no bfloat16")
    job = Job(
        shape=shape,
        load_in=recipe.model.load_in,
        dtype_bytes=4 if wide else 2,
        rank=int(lora.get("r", 8)),
        targets=names,
        optimizer_bytes=_optimizer_bytes(str(grpo.get("optim") or "adamw_torch_fused")),
        prompt=prompt,
        completion=recipe.max_completion_length,
        group=recipe.num_generations,
        batch=recipe.generation_batch,
        rows=int(grpo.get("per_device_train_batch_size", 8)),
        accumulation=int(grpo.get("gradient_accumulation_steps", 1)),
        compute=recipe.compute,
        rollout="vllm" if grpo.get("use_vllm") else recipe.rollout,
        tokens=recipe.memory.tokens_per_microbatch,
        kv_tokens=recipe.memory.rollout_kv_tokens,
        checkpointing=bool(grpo.get("gradient_checkpointing", True)),
        offload=recipe.memory.offload_activations,
        vllm_share=0.0 if grpo.get("vllm_mode") == "server" else float(grpo.get("vllm_gpu_memory_utilization") or 0.3),
    )
    return job, (*notes, *_limits_of(job, recipe))


def _limits_of(job: Job, recipe: Recipe) -> Iterator[str]:
    """Yield what the arithmetic takes for granted about how a job is computed."""
    if job.is_windowed and recipe.compute == "packed":
        yield (
            f"TRL's own compute: {job.longest} tokens are more than the model's attention window of "
            f"{job.shape.sliding_window}"
        )
    if not job.is_packed:
        yield "plain compute as TRL 1.16 does it on a GPU (1.14 also holds all logits); compared with nothing yet"
    if recipe.model.backend == "unsloth":
        yield "our engine: how much the backend unsloth takes is not counted"


def _optimizer_bytes(name: str) -> float:
    return next((size for part, size in _OPTIMIZER_BYTES.items() if part in name), 8.0)


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
    return MemoryPlan(job, memory_bytes, fits(job), chosen if fits(job) else {}, assumed)


def _wave_tokens(job: Job) -> int:
    whole = -(-job.batch // job.group) * job.prompt + job.batch * job.completion
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
            f"{where}: needs {needed_bytes(smallest, plan.memory_bytes) / GIB:.1f} GiB with the smallest budgets, and "
            f"the card has {plan.memory_bytes / GIB:.1f} GiB.\n{advice(plan)}\nThe arithmetic: grpo-lite plan. To try "
            "all the same: memory.fit=false."
        )


def advice(plan: MemoryPlan, count: int = 3) -> str:
    """Return the cheapest changes, each of which would make the job fit, as lines."""
    found = []
    for text, _ in zip(cheapest_changes(plan.job, plan.memory_bytes), range(count), strict=False):
        found.append(f"  {text}")
    if not found:
        return "No single change makes it fit: take a smaller model (grpo-lite plan --all-gpus), or a larger card."
    return "Each of these alone would make it fit, the cheapest first:\n" + "\n".join(found)


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
    if job.load_in != "4bit" and fits(load_in="4bit"):  # computing in float32 may be the card's or the recipe's will
        yield "model.load_in=4bit"
    shorter = _largest(STEP, job.completion - 1, lambda n: fits(completion=n))
    if shorter is not None:
        yield f"grpo.max_completion_length={shorter}"
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
