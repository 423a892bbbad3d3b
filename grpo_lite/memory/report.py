"""What `grpo-lite plan` prints: where a card's memory goes, what was chosen, the tables of all cards. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from grpo_lite.errors import ModelError
from grpo_lite.memory.budget import brief, choose
from grpo_lite.memory.card_time import card_times
from grpo_lite.memory.job import recipe_job
from grpo_lite.memory.phases import CONTEXT_BYTES, FRAGMENTATION, GIB, Job, PhaseBytes, weight_bytes
from grpo_lite.memory.plan import MemoryPlan, advice, largest_completion, most_completion, plan_memory
from grpo_lite.memory.times import Times, held_out_rows, time_line
from grpo_lite.memory.warmup import warmup_parts, warmup_tokens
from grpo_lite.models.config import model_shape
from grpo_lite.models.device import CARDS, Card
from grpo_lite.models.positions import too_long
from grpo_lite.recipe.overrides import yaml_text
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.units import gib, span

CARD_SIZES_GB = (4, 6, 8, 12, 16, 24, 32, 48, 80)  # as GPUs are sold
USABLE = 0.9  # the share of its size that a card has at least: a T4 of 16 GB has 14.56 GiB
UNMEASURED = "By arithmetic, checked against counted tensor bytes on a CPU; not yet measured on a GPU."


def plan_recipe(recipe: Recipe, card: Card, prompt: int | None = None) -> MemoryPlan:
    """Return a recipe's plan for a card; neither the card nor the model's weights need to be here."""
    shape, source = model_shape(recipe.model.id, recipe.model.revision)
    job, notes = recipe_job(recipe, shape, prompt=prompt, bfloat16=card.bfloat16)
    return plan_memory(job, card.memory_bytes, (f"sizes of {recipe.model.id} from {source}", *notes))


def least_card_gb(recipe: Recipe) -> int | None:
    """Return the size, in GB as it is sold, of the smallest GPU that holds a recipe's plan undivided; None: none does.

    It holds it with bfloat16 and without. A smaller one may hold it in smaller pieces. Time is not planned.

    Raises:
        ModelError: the recipe's model is not one that is planned.
    """
    for size_gb in CARD_SIZES_GB:
        cards = [Card(f"{size_gb} GB", int(USABLE * size_gb * GIB), bfloat16) for bfloat16 in (True, False)]
        plans = [plan_recipe(recipe, card) for card in cards]
        if all(plan.fits and not _divided(plan) for plan in plans):
            return size_gb
    return None


def report_lines(recipe: Recipe, card: Card, plan: MemoryPlan) -> Iterator[str]:
    """Yield the plan as lines: two phases, verdict, choices, the largest lengths that fit."""
    job = plan.job
    yield f"{recipe.name} on {card.name} ({gib(card.memory_bytes)}): {'fits' if plan.fits else 'DOES NOT FIT'}"
    yield (
        f"{recipe.model.id}, {job.load_in}, LoRA r={job.rank}; {job.batch} completions a round, groups of {job.group}, "
        f"prompts up to {job.prompt} tokens, completions up to {job.completion}"
    )
    for note in plan.assumed:
        yield f"assumed: {note}"
    if fault := too_long(recipe.model.id, job.shape.positions, job.prompt, job.completion):
        yield f"too long: {fault}"
    rollout, training = plan.rollout, plan.training
    yield ""
    if plan.warmup:
        name = f"warm-up, rows up to {job.warmup_row} tokens, {warmup_tokens(job)} tokens at once"
        yield from _phase(name, plan.warmup)
    yield from _phase("rollout", rollout)
    yield from _phase("training", training)
    if plan.evaluation:
        yield from _phase(
            f"evaluation, {job.eval_rows} completions of up to {job.eval_completion} at once", plan.evaluation
        )
    yield "not counted as tensors"
    yield _line("CUDA context and kernels", CONTEXT_BYTES)
    yield _line("what the allocator cannot fill", int(FRAGMENTATION * (plan.peak - weight_bytes(job))))
    if job.rollout == "vllm":
        yield _line("vLLM's own share", int(job.vllm_share * card.memory_bytes))
    yield ""
    spare = card.memory_bytes - plan.needed
    yield f"peak allocation {gib(plan.peak, 2)}; needs {gib(plan.needed, 2)} of the card, " + (
        f"{gib(spare, 2)} to spare" if spare >= 0 else f"{gib(-spare, 2)} too much"
    )
    if not plan.fits:
        yield advice(plan)
        return
    pieces = -(-job.step_tokens // job.microbatch_tokens)
    yield f"one micro-batch: {job.microbatch_tokens} tokens ({pieces} a micro-step)"
    if plan.warmup:
        yield f"one micro-batch of the warm-up: {warmup_tokens(job)} tokens ({warmup_parts(job)} a step)"
    for key, value in plan.chosen.items():
        yield f"chosen: {key}={yaml_text(value)}"
    if (
        job.checkpointing
        and plan_memory(replace(job, checkpointing=False), card.memory_bytes).job.checkpointing is False
    ):
        yield "fits without activation checkpointing too, which is faster: grpo.gradient_checkpointing=false"
    yield _longest_completions(job, card.memory_bytes)
    yield time_line(recipe)
    yield UNMEASURED


def _longest_completions(job: Job, memory_bytes: int) -> str:
    whole, divided = (largest_completion(job, memory_bytes, kind) or 0 for kind in (True, False))
    line = f"longest completions that fit: {whole} tokens with groups of {job.group} in one piece"
    line += f", {divided} one completion at a time"
    if divided == most_completion(job):
        which = "both" if whole == divided else "the latter"
        line += f" ({which} bounded by the model's {job.shape.positions} positions, not by memory)"
    return line


def _phase(name: str, phase: PhaseBytes) -> Iterator[str]:
    yield f"{name}: {gib(phase.total, 2)}"
    for what, size in phase.items:
        if size >= 1 << 20:
            yield _line(what, size)


def _line(what: str, size: int) -> str:
    return f"  {what:<44}{gib(size, 2):>12}"


def all_cards_table(recipes: Sequence[Recipe]) -> Iterator[str]:
    """Yield the recipe × GPU table as Markdown: need in GiB or that it does not fit, every cell marked as planned."""
    names = list(CARDS)
    heads = [f"{name}<br>{CARDS[name].memory_bytes / GIB:.1f}" for name in names]
    yield "| " + " | ".join(["recipe", "model", "least GPU", *heads]) + " |"
    yield "|---|---|---|" + "---|" * len(names)
    for recipe in recipes:
        try:
            plans, least = [plan_recipe(recipe, CARDS[name]) for name in names], least_card_gb(recipe)
        except ModelError:  # not a model that is planned
            continue
        cells = []
        for plan in plans:
            divided = " ÷" if _divided(plan) else ""
            cells.append(f"{plan.needed / GIB:.1f}{divided} planned" if plan.fits else "out of memory (planned)")
        model = f"{recipe.model.id.rpartition('/')[2]} {recipe.model.load_in}"
        yield "| " + " | ".join([f"`{recipe.name}`", model, f"{least} GB" if least else "none", *cells]) + " |"
    yield ""
    yield (
        "What a card must have, in GiB, at the recipe's longest prompts and completions; in the head what it has. "
        "Least GPU: the smallest size, as GPUs are sold, that holds this undivided; it may take long. "
        f"÷: divided into smaller pieces than the recipe's to fit, same gradient. {UNMEASURED}"
    )


def _divided(plan: MemoryPlan) -> bool:
    """Return whether less goes through the card at once than the recipe says, with the same gradient."""
    return bool({"memory.tokens_per_microbatch", "memory.rollout_kv_tokens"} & set(plan.chosen))


def all_cards_tables(recipes: Sequence[Recipe], chance: Callable[[float, int], float]) -> Iterator[str]:
    """Yield the tables of memory, of hours, and of three hours on a T4; the recipes' page holds them.

    Args:
        recipes: their rows.
        chance: how often so many problems show a gain (`statistics.chance_to_find`).
    """
    for table in (
        all_cards_table(recipes),
        hours_table(recipes),
        budget_table(recipes, CARDS["t4"], 3 * 3600, lambda rows: chance(0.05, rows)),
    ):
        yield from table
        yield ""


def hours_table(recipes: Sequence[Recipe]) -> Iterator[str]:
    """Yield the hours of whole recipes on the cards as Markdown, each a range and an estimate; `-`: none is honest."""
    names = list(CARDS)
    yield "| " + " | ".join(["recipe", "completions", "evaluated", *names]) + " |"
    yield "|---|---|---|" + "---|" * len(names)
    for recipe in recipes:
        estimates = [_estimated(recipe, CARDS[name]) for name in names]
        if any(estimates):
            cells = [_hours(recipe, times) if times else "-" for times in estimates]
            completions = f"{round(recipe.schedule.max_steps * recipe.schedule.sampled_per_step):,}"
            yield ("| " + " | ".join([f"`{recipe.name}`", completions, f"{_rows(recipe):,}", *cells]) + " |")
    yield ""
    yield (
        "Planned, not measured on a GPU: from start to merge, by the card's published speeds and guesses with a range "
        "(`grpo_lite/memory/card_time.py`). `-`: does not fit, or computes in float32 there. Left out are recipes with "
        "tools or recurrent layers."
    )


def _estimated(recipe: Recipe, card: Card) -> Times | None:
    """Return the times of a recipe on a card; None where it does not fit, or no estimate is honest."""
    try:
        plan = plan_recipe(recipe, card)
    except ModelError:
        return None
    if not plan.fits or recipe.schedule.max_steps <= 0:
        return None
    return card_times(recipe, plan.job, card)


def _hours(recipe: Recipe, times: Times) -> str:
    seconds = times.run_s(recipe, recipe.schedule.max_steps, _rows(recipe))
    return span(*times.bounds(recipe, seconds))


def _rows(recipe: Recipe) -> int:
    return held_out_rows(recipe) or 0


def budget_table(recipes: Sequence[Recipe], card: Card, limit_s: float, power: Callable[[int], float]) -> Iterator[str]:
    """Yield whole recipes beside what of them fits into a time on a card, as Markdown.

    Args:
        recipes: those without an estimate, or that fit whole, are left out.
        card: the GPU.
        limit_s: the budget, in seconds.
        power: how often an evaluation of so many problems finds a gain of 5 points.
    """
    yield f"| recipe | whole on a {card.name}: steps, problems, time | `BUDGET={brief(limit_s)}`: steps, problems |"
    yield "|---|---|---|"
    for recipe in recipes:
        times = _estimated(recipe, card)
        if times is None or not _rows(recipe):
            continue
        budget = choose(recipe, times, limit_s, recipe.schedule.max_steps, _rows(recipe))
        if budget.steps == budget.whole_steps and budget.rows == budget.whole_rows:
            continue
        yield (
            f"| `{recipe.name}` | {_chosen(budget.whole_steps, budget.whole_rows, power)}, {_hours(recipe, times)} | "
            f"{_chosen(budget.steps, budget.rows, power)} |"
        )
    yield ""
    yield (
        "Planned, not measured on a GPU. In brackets: how often an evaluation of so many problems finds a gain of 5 "
        "points, if a quarter of the answers change. `make train BUDGET=3h` measures the card first, and may choose "
        "otherwise."
    )


def _chosen(steps: int, rows: int, power: Callable[[int], float]) -> str:
    return f"{steps:,} steps, {rows:,} problems ({power(rows):.0%})"
