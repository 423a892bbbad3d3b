"""Probe: will this recipe learn anything? Samples the untrained model on the recipe's own prompts, in minutes.

Place in the line: before a training that takes hours. GRPO learns from differences inside a group. If all samples of a
prompt are right, or none is, or all are cut off at the cap, there is nothing to learn.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from grpo_lite.commands import hint
from grpo_lite.engine.generate import generate_completions
from grpo_lite.engine.out_of_memory import free_memory
from grpo_lite.evaluation.episodes import play_with
from grpo_lite.evaluation.scoring import Completions, call_reward, right_of_each, score_completions
from grpo_lite.evaluation.statistics import mean_pass_at_k
from grpo_lite.evaluation.step_time import forward_seconds, training_forwards
from grpo_lite.memory.fit import rows_that_fit
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_for_sampling
from grpo_lite.recipe.overrides import twice_the_cap, twice_the_group
from grpo_lite.recipe.recipe import ENVIRONMENT_REWARD, Recipe
from grpo_lite.rewards import format_reward
from grpo_lite.rewards.facts import named
from grpo_lite.task.check import require_beginnings
from grpo_lite.task.episodes import Episode, Player, require_scored
from grpo_lite.task.generators import Row
from grpo_lite.task.guard import limited
from grpo_lite.task.prompts import Prompts, columns_of, opened_tag
from grpo_lite.task.rewards import load_rewards, weighted_scores, weighted_sum
from grpo_lite.task.tokens import prompt_ids
from grpo_lite.units import duration

PROMPTS, SAMPLES = 32, 8  # samples a prompt, unless groups are larger
CAN_LEARN = "it can learn: rewards differ inside the groups, and completions end before the cap"
_UNJUDGED = "no probed episode can be judged: `reset` fails, or no score is given"


@dataclass(frozen=True)
class Probe:
    """What k samples on some prompts showed."""

    prompts: int
    samples: int
    pass_at_1: float
    pass_at_k: float
    equal_groups: float  # share of groups whose rewards are all equal: no gradient
    cap: int
    truncated: dict[int, float]  # share of completions that reach each length, up to the cap
    format_rate: float | None  # None: the recipe has no format reward
    rewarded: float  # mean reward
    opened: str | None  # the tag that the chat template opens itself
    tokens_per_s: float
    step_s: float  # with a gradient in every group, as in a model that learns
    steps: int
    cuts_cost: bool = True  # completions that reach the cap are right less than half as often as those that end
    evaluation_s: float = 0.0  # of base and trained model, before the merge
    completion_s: float = 0.0  # an evaluated completion, with what a first batch takes besides
    held_out: int = 0  # rows that there are
    token_s: float = 0.0  # forward and backward of a token
    notes: tuple[str, ...] = field(default=())
    verdict: str = ""
    skipped: tuple[str, ...] = ()  # what the time limit left out
    calls: float | None = None  # of tools, an episode; None: the recipe has no tools
    failed_calls: float = 0.0  # share of the calls

    @property
    def eta_s(self) -> float:
        """Seconds for the whole training."""
        return self.step_s * self.steps

    def to_json(self) -> dict[str, Any]:
        """Return plain data for run.json and the cache."""
        return {**asdict(self), "eta_s": self.eta_s}


@dataclass(frozen=True)
class _Samples:
    """Prompts and what the model wrote: `samples` completions each, or episodes, and the seconds of it."""

    rows: list[Row]  # one per completion
    ids: list[list[int]]  # of each prompt
    groups: list[list[list[int]]]  # token ids of each prompt's completions
    seconds: float
    round_s: float  # of one round of training's generation
    skipped: tuple[str, ...] = ()
    episodes: tuple[Episode, ...] = ()  # with tools: what each completion is
    player: Player | None = None

    @property
    def completions(self) -> Completions:
        return list(self.episodes) or [completion for group in self.groups for completion in group]

    def lengths(self, cap: int) -> list[int]:
        """Return the tokens of each completion; an episode without room for a tool's result counts as the cap."""
        ids = (completion for group in self.groups for completion in group)
        ends = [episode.ended == "length" for episode in self.episodes] or [False] * len(self.rows)
        return [cap if cut else len(tokens) for tokens, cut in zip(ids, ends, strict=True)]


@dataclass(frozen=True)
class _Scores:
    """What the recipe's rewards say of the completions, in their order, and the seconds of it."""

    totals: list[float | None]
    formats: list[bool] | None  # whether each has the agreed format; None: the recipe has no format reward
    seconds: float


def probe_base(recipe: Recipe, base: Base, prompts: Prompts, **arguments: Any) -> tuple[Probe, float]:
    """Load a recipe's base, probe it and free its memory.

    Args:
        recipe: the recipe.
        base: its base.
        prompts: its prompts.
        arguments: of `probe_recipe`.

    Returns:
        The probe, and how long loading took, in seconds.

    Raises:
        GRPOLiteError: the base cannot be loaded, or no episode begins.
    """
    if recipe.check.enabled and recipe.environment is not None:
        require_beginnings(recipe, prompts)
    begun = time.monotonic()
    model = load_for_sampling(base, recipe.rollout)
    loaded_s = time.monotonic() - begun
    probe = probe_recipe(recipe, model, prompts, **arguments)
    del model
    gc.collect()
    free_memory()
    return probe, loaded_s


def probe_recipe(
    recipe: Recipe,
    model: Any,
    prompts: Prompts,
    *,
    count: int = PROMPTS,
    samples: int | None = None,
    limit_s: float | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> Probe:
    """Sample the model on training prompts as training would, and score by the recipe's own rewards.

    Args:
        recipe: the recipe.
        model: its base model, without an adapter or with an untrained one.
        prompts: its prompts, with its tokenizer.
        count: how many of them, drawn by the recipe's seed: files are often sorted.
        samples: per prompt; None: 8, or the group size if that is larger.
        limit_s: no batch is sampled that would probably end later; the first one always is. None: all are.
        show: gets progress lines.
    """
    tokenizer = prompts.tokenizer
    samples = samples or max(SAMPLES, recipe.num_generations)
    rows = random.Random(recipe.seed).sample(prompts.train, min(count, len(prompts.train)))
    sampled = _sample(recipe, model, prompts, rows, samples, limit_s, show)
    right, _ = score_completions(tokenizer, recipe, sampled.rows, sampled.completions, sampled.player)
    require_scored(sampled.episodes, "probe")
    counts = [count for count in right_of_each(right, samples) if count is not None]
    scores = _score(recipe, tokenizer, sampled, prompts.lead_in)
    equal = statistics.fmean(_equal(scores.totals, samples, min(recipe.num_generations, samples)))
    forward_s = forward_seconds(recipe, model, tokenizer, sampled.ids, sampled.groups)
    cap = recipe.max_completion_length
    lengths = sampled.lengths(cap)
    calls = sum(episode.calls for episode in sampled.episodes)
    caps = sorted({max(1, cap // 4), max(1, cap // 2), cap})
    known = [total for total in scores.totals if total is not None]
    probe = Probe(
        prompts=len(sampled.ids),
        samples=samples,
        pass_at_1=mean_pass_at_k(counts, samples, 1) if counts else 0.0,
        pass_at_k=mean_pass_at_k(counts, samples, samples) if counts else 0.0,
        equal_groups=equal,
        cap=cap,
        cuts_cost=_cuts_cost(right, [n >= cap for n in lengths]),
        truncated={limit: statistics.fmean(n >= limit for n in lengths) for limit in caps},
        format_rate=None if scores.formats is None else statistics.fmean(scores.formats),
        rewarded=statistics.fmean(known) if known else 0.0,
        opened=opened_tag(prompts.lead_in),
        tokens_per_s=max(1, sum(lengths)) / max(sampled.seconds, 1e-9),
        step_s=_step_seconds(recipe, sampled, scores, forward_s),
        steps=recipe.schedule.steps(len(prompts.train)),
        evaluation_s=recipe.evaluated_completions(len(prompts.eval)) * sampled.seconds / len(lengths),
        completion_s=sampled.seconds / len(lengths),
        held_out=len(prompts.eval),
        token_s=forward_s * training_forwards(recipe) / _row_tokens(recipe, sampled),
        notes=() if counts else (_UNJUDGED if sampled.episodes else "no probed prompt has a usable gold answer",),
        skipped=sampled.skipped,
        calls=calls / len(sampled.episodes) if sampled.episodes else None,
        failed_calls=sum(episode.failed_calls for episode in sampled.episodes) / max(1, calls),
    )
    return replace(probe, verdict=verdict(probe, recipe))


def _sample(
    recipe: Recipe,
    model: Any,
    prompts: Prompts,
    rows: list[Row],
    samples: int,
    limit_s: float | None,
    show: Callable[[str], None],
) -> _Samples:
    """Generate `samples` completions of each row's prompt, and time one round as training generates it."""
    if prompts.toolkit is not None:
        return _sample_episodes(recipe, model, prompts, rows, samples, limit_s, show)
    ids = [prompt_ids(row["prompt"], prompts.tokenizer, recipe.template_kwargs) for row in rows]
    generate = partial(
        generate_completions,
        model,
        prompts.tokenizer,
        max_new_tokens=recipe.max_completion_length,
        temperature=recipe.temperature,
        rows_that_fit=rows_that_fit if recipe.memory.fit else None,
    )
    on_gpu = limit_s is not None and model.device.type == "cuda"  # where a few completions take as long as many
    most = len(ids) if limit_s is None else max(1, recipe.eval.batch_size // samples)
    size = most if limit_s is None or on_gpu else 1
    begun = time.monotonic()
    groups: list[list[list[int]]] = []
    part_s = prompt_s = 0.0  # of the last part, and of each prompt in it
    while part := ids[len(groups) : len(groups) + size]:
        if limit_s is not None and groups and time.monotonic() - begun + prompt_s * len(part) > limit_s:
            break
        part_begun = time.monotonic()
        groups += generate(
            part,
            samples=samples,
            batch_size=recipe.eval.batch_size,
            seed=recipe.seed + len(groups),
            progress=partial(_show_progress, show, len(groups), len(ids)),
        )
        part_s = time.monotonic() - part_begun
        prompt_s, size = part_s / len(part), min(most, 2 * size)
    sampled_s = time.monotonic() - begun
    skipped = [f"{len(ids) - len(groups)} of {len(ids)} prompts"] if len(groups) < len(ids) else []
    ids = ids[: len(groups)]
    round_s = max(part_s if on_gpu else 0.0, prompt_s * recipe.schedule.batch / samples)
    if limit_s is None or sampled_s + round_s <= limit_s:
        round_s = _round_seconds(recipe, generate, ids)
    else:
        skipped.append("timing a training round's generation by itself")
    repeated = [row for row in rows[: len(ids)] for _ in range(samples)]
    return _Samples(repeated, ids, groups, sampled_s, round_s, tuple(skipped))


def _sample_episodes(
    recipe: Recipe,
    model: Any,
    prompts: Prompts,
    rows: list[Row],
    samples: int,
    limit_s: float | None,
    show: Callable[[str], None],
) -> _Samples:
    """Play `samples` episodes of each row.

    Where reward functions score the episodes at the end, each has an environment of its own until then.
    """
    scores = [*recipe.rewards, recipe.primary_score, *recipe.eval.strict]
    keeps = any(section.function != ENVIRONMENT_REWARD for section in scores)
    player = Player(prompts, recipe, show)
    size = max(1, recipe.eval.batch_size // samples)
    begun, prompt_s = time.monotonic(), 0.0
    episodes: list[Episode] = []
    done = 0
    while part := rows[done : done + size]:
        if limit_s is not None and done and time.monotonic() - begun + prompt_s * len(part) > limit_s:
            break
        part_begun = time.monotonic()
        played = play_with(
            model,
            prompts.tokenizer,
            recipe,
            Player(prompts, recipe, show) if keeps else player,
            [row for row in part for _ in range(samples)],
            recipe.max_completion_length,
            temperature=recipe.temperature,
            seed=recipe.seed + done,
        )
        if not keeps:
            player.rewards(played)
        episodes += played
        done += len(part)
        prompt_s = (time.monotonic() - part_begun) / len(part)
        _show_progress(show, 0, len(rows), done, done)
    skipped = (f"{len(rows) - done} of {len(rows)} prompts",) if done < len(rows) else ()
    groups = [[episode.ids for episode in episodes[i * samples : (i + 1) * samples]] for i in range(done)]
    ids = [episodes[i * samples].prompt_ids for i in range(done)]
    repeated = [episode.row for episode in episodes]
    sampled_s = time.monotonic() - begun
    round_s = prompt_s * recipe.schedule.batch / samples
    return _Samples(repeated, ids, groups, sampled_s, round_s, skipped, tuple(episodes), player)


def _show_progress(show: Callable[[str], None], before: int, count: int, done: int, part: int) -> None:
    show(f"probe: {before + done}/{count} prompts sampled")


def _round_seconds(recipe: Recipe, generate: Callable[..., Any], ids: list[list[int]]) -> float:
    """Time the generation of one training round: it takes nearly as long, however many completions are decoded."""
    group, batch = recipe.schedule.group, recipe.schedule.batch
    chosen = ids[: max(1, batch // group)]
    begun = time.monotonic()
    generate(chosen, samples=group, batch_size=batch, seed=recipe.seed)
    return (time.monotonic() - begun) * batch / (group * len(chosen))


def _score(recipe: Recipe, tokenizer: Any, sampled: _Samples, lead_in: str) -> _Scores:
    """Return each completion's total reward, and whether it has the agreed format."""
    functions, weights = load_rewards(recipe, columns_of(sampled.rows), lead_in)
    functions = [limited(function, recipe.limits.reward_timeout_s, "probe") for function in functions]
    completions = sampled.completions
    formats = None
    for section, function in zip(recipe.rewards, functions, strict=True):
        if named(section.function) is format_reward:
            values = call_reward(function, tokenizer, recipe, sampled.rows, completions)
            formats = [value is not None and value >= 1.0 for value in values]
    begun = time.monotonic()
    if sampled.player is None:
        totals = call_reward(weighted_sum(functions, weights), tokenizer, recipe, sampled.rows, completions)
    else:
        parts = [call_reward(function, tokenizer, recipe, sampled.rows, completions) for function in functions]
        paid = sampled.player.rewards(sampled.episodes)
        if not functions or any(reward is not None for reward in paid):
            parts, weights = [*parts, paid], [*weights, 1.0]
        totals = weighted_scores(parts, weights)
    return _Scores(totals, formats, time.monotonic() - begun)


def _equal(totals: Sequence[float | None], samples: int, group: int) -> list[bool]:
    """Return for each whole group inside the samples of each prompt whether its rewards are all equal."""
    starts = [i + j for i in range(0, len(totals), samples) for j in range(0, samples - group + 1, group)]
    return [len(set(totals[start : start + group])) == 1 for start in starts]


def _cuts_cost(right: Sequence[bool | None], cut: Sequence[bool]) -> bool:
    """Return whether reaching the cap costs rewards: an answer that comes before the cut loses nothing."""
    rates = []
    for kind in (True, False):
        judged = [bool(r) for r, reached in zip(right, cut, strict=True) if reached is kind and r is not None]
        rates.append(statistics.fmean(judged) if judged else None)
    among_cut, among_ended = rates
    return not among_cut or (among_ended is not None and among_cut < among_ended / 2)


def _step_seconds(recipe: Recipe, sampled: _Samples, scores: _Scores, forward_s: float) -> float:
    """Return the seconds of a training step: its share of generation and rewards, and forward and backward passes.

    Groups of equal rewards, which packed compute leaves out, count in full: a model that learns has fewer of them.
    """
    plan = recipe.schedule
    sampling_s = sampled.round_s / plan.batch + scores.seconds / len(sampled.rows)
    training_s = forward_s * training_forwards(recipe)
    return plan.sampled_per_step * sampling_s + plan.trained_per_step * training_s


def _row_tokens(recipe: Recipe, sampled: _Samples) -> float:
    """Return the mean tokens of a completion, its end and its share of the prompt, as `forward_seconds` packs it."""
    size = min(recipe.num_generations, len(sampled.groups[0]))
    rows = [len(ids) + 1 for group in sampled.groups for ids in group[:size]]
    shares = 1 if recipe.compute == "packed" else size
    return (sum(rows) + shares * sum(map(len, sampled.ids))) / len(rows)


def verdict(probe: Probe, recipe: Recipe) -> str:
    """Return one sentence on the worst problem, with the override to paste if there is one."""
    if probe.opened and (probe.format_rate == 0 or (probe.format_rate is None and probe.rewarded == 0)):
        return (
            f"the chat template opens <{probe.opened}> itself and no completion gets a reward: a reward that looks for "
            "that tag never finds it; give the reward an argument `prefilled`, which is then True"
        )
    if probe.notes == (_UNJUDGED,):
        return f"{_UNJUDGED}; play the environment without a model: {hint('check-env', recipe=recipe.name)}"
    if probe.notes:
        return f"{probe.notes[0]}, so no completion gets a reward; correct data.answer or data.gold_completion"
    cut = probe.truncated[probe.cap]
    if cut >= 0.3 and probe.cuts_cost:
        return (
            f"the cap is too short: {cut:.0%} of the completions are cut off at {probe.cap} tokens; "
            f"paste: {twice_the_cap(recipe)}"
        )
    if probe.calls == 0 and probe.pass_at_1 < 0.9:
        return (
            f"no tool is called in {probe.prompts * probe.samples} episodes, so there is no call to reinforce: say in "
            "data.system when to call which tool, show whole episodes in a warm-up, or take a model that was trained "
            "with tools"
        )
    if probe.failed_calls >= 0.9:
        return (
            f"{probe.failed_calls:.0%} of the calls fail; look at the names, types and docstrings that the model "
            f"reads: {hint('check', recipe=recipe.name)}"
        )
    if probe.pass_at_k == 0 and probe.equal_groups >= 0.9:
        return (
            f"too hard: none of {probe.prompts} prompts is solved in {probe.samples} samples, so every group is equal; "
            "take an easier task, a stronger model, or show examples (data.examples)"
        )
    if probe.pass_at_1 >= 0.9:
        return (
            f"too easy: {probe.pass_at_1:.0%} of single samples are right already; train on harder rows (data.train), "
            "or take a smaller model"
        )
    if probe.format_rate == 0:
        return "the agreed format never occurs, so its reward teaches nothing; show an example of it in data.system"
    if probe.equal_groups >= 0.5:
        return (
            f"slow: {probe.equal_groups:.0%} of the groups have equal rewards and give no gradient; paste: "
            f"{twice_the_group(recipe)}"
        )
    return CAN_LEARN


def probe_lines(probe: Probe) -> Iterator[str]:
    """Yield the probe as lines, the verdict last."""
    yield f"{probe.prompts} prompts × {probe.samples} samples, untrained, {probe.tokens_per_s:.0f} tokens/s"
    yield f"  pass@1 {probe.pass_at_1:.1%}, pass@{probe.samples} {probe.pass_at_k:.1%}, reward {probe.rewarded:.3f}"
    yield f"  groups with equal rewards {probe.equal_groups:.0%}"
    cuts = ", ".join(f"{share:.0%} at {limit}" for limit, share in probe.truncated.items())
    yield f"  completions that reach a cap: {cuts} tokens"
    if probe.calls is not None:
        yield f"  calls an episode {probe.calls:.1f}, {probe.failed_calls:.0%} of them failed"
    if probe.format_rate is not None:
        yield f"  in the agreed format {probe.format_rate:.0%}"
    yield (
        f"  a step about {probe.step_s:.3g} s (with a gradient in every group; training counted as multiples of a "
        "measured forward pass), "
        f"{probe.steps} steps about {duration(probe.eta_s)}, "
        f"evaluation about {duration(probe.evaluation_s)}"
    )
    yield f"verdict: {probe.verdict}"
