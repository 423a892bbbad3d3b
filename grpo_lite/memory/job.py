"""recipe_job: everything about a recipe that decides its memory, as a `Job`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_lite.memory.phases import Job
from grpo_lite.memory.warmup import padded_step
from grpo_lite.models.shape import ModelShape
from grpo_lite.recipe.recipe import Recipe

ASSUMED_PROMPT = 256  # tokens, where the recipe does not cap its prompts and none have been read yet
_OPTIMIZER_BYTES = {"8bit": 2.0, "adafactor": 0.2, "sgd": 0.0, "lion": 4.0}


def recipe_job(
    recipe: Recipe,
    shape: ModelShape,
    prompt: int | None = None,
    bfloat16: bool = True,
    warmup_row: int | None = None,
) -> tuple[Job, tuple[str, ...]]:
    """Return a recipe's job and what was assumed.

    Args:
        recipe: the recipe.
        shape: its model's.
        prompt: the longest prompt in tokens; None: the recipe's cap, or an assumption.
        bfloat16: whether the card computes in it; on others some models run in float32.
        warmup_row: tokens of the warm-up's longest row; None: the longest prompt with a completion at its cap.
    """
    notes = []
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
        holds_reference=recipe.holds_reference,
        prompt=prompt,
        completion=recipe.max_completion_length,
        group=recipe.schedule.group,
        batch=recipe.schedule.batch,
        rows=recipe.schedule.rows,
        accumulation=recipe.schedule.accumulation,
        compute=recipe.compute,
        rollout="vllm" if grpo.get("use_vllm") else recipe.rollout,
        tokens=recipe.memory.tokens_per_microbatch,
        warmup_tokens=recipe.memory.tokens_per_microbatch,
        kv_tokens=recipe.memory.rollout_kv_tokens,
        checkpointing=bool(grpo.get("gradient_checkpointing", True)),
        offload=recipe.memory.offload_activations,
        has_turns=recipe.has_tools,
        eval_rows=_eval_rows(recipe),
        eval_completion=recipe.eval_completion_length,
        eval_while_training=bool(recipe.eval.every),
        warmup_row=(warmup_row or prompt + recipe.warmup_completion_length) if recipe.warmup else 0,
        warmup_step=padded_step(recipe.warmup.tokens_per_step) if recipe.warmup else 0,
        vllm_share=0.0 if grpo.get("vllm_mode") == "server" else float(grpo.get("vllm_gpu_memory_utilization") or 0.3),
    )
    return job, (*notes, *_limits_of(job, recipe))


def _eval_rows(recipe: Recipe) -> int:
    """Return how many completions the evaluation generates at once (generate_completions)."""
    section = recipe.eval
    if not section.enabled:
        return 0
    prompts = section.limit or section.batch_size
    sampled = max(1, section.batch_size // section.samples) * section.samples if section.samples else 0
    return max(min(section.batch_size, prompts), min(sampled, prompts * section.samples))


def _limits_of(job: Job, recipe: Recipe) -> Iterator[str]:
    """Yield what the arithmetic takes for granted about how a job is computed."""
    if not job.is_packed:
        yield "plain compute as TRL 1.16 does it on a GPU (1.14 also holds all logits)"
    if job.rollout == "shared" and not job.is_shared:
        border = job.shape.rope_border
        yield f"rollouts by `generate`, as rows may cross {border} tokens, where the rotary frequencies change"
    if job.shape.scores_explicitly:
        yield "attention score by score, whose memory is in the square of the longest row"
    if any(block.experts for block, _ in job.shape.blocks):
        yield "experts in the compute dtype, neither quantized nor adapted"
    if recipe.has_tools:
        yield f"an episode is one completion: calls, results and answers within {job.completion} tokens"
    if recipe.model.backend == "unsloth":
        yield "our engine: how much the backend unsloth takes is not counted"


def _optimizer_bytes(name: str) -> float:
    return next((size for part, size in _OPTIMIZER_BYTES.items() if part in name), 8.0)
