"""probe_recipe: will this recipe learn anything? Samples the untrained model on the recipe's own prompts, in minutes.

Place in the line: before a training that takes hours. GRPO learns from differences inside a group: where all samples
of a prompt are right, or none is, or all are cut at the cap, there is nothing to learn, and a night would show it.

What a probe measured of time, kept in the cache for `plan`, which loads nothing. Torch-free.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from grpo_lite.engine.generate import generate_completions
from grpo_lite.evaluation.evaluate import score_completions
from grpo_lite.evaluation.statistics import mean_pass_at_k
from grpo_lite.evaluation.step_time import forward_seconds, training_forwards
from grpo_lite.memory.fit import rows_that_fit
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.check import weighted_sum
from grpo_lite.task.guard import limited
from grpo_lite.task.prompts import Prompts
from grpo_lite.task.rewards import load_rewards
from grpo_lite.task.tokens import prompt_ids
from grpo_lite.units import format_seconds
from rewards import format_reward
from rewards.facts import named

PROMPTS, SAMPLES = 32, 8  # samples a prompt, unless groups are larger
OPENED = re.compile(r"<([A-Za-z_][\w-]*)>\s*$")


@dataclass(frozen=True)
class Probe:
    """What k samples on some prompts showed."""

    prompts: int
    samples: int
    pass_at_1: float
    pass_at_k: float
    equal_groups: float  # share of groups whose rewards are all equal: no gradient
    cap: int
    truncated: dict[int, float]  # share of completions cut at each cap
    format_rate: float | None  # None: the recipe rewards no format
    rewarded: float  # mean reward
    opened: str | None  # the tag that the chat template opens itself
    tokens_per_s: float
    step_s: float
    steps: int
    cuts_cost: bool = True  # completions that reach the cap are right less than half as often as those that end
    evaluation_s: float = 0.0  # of base and trained model, before the merge
    notes: tuple[str, ...] = field(default=())

    @property
    def eta_s(self) -> float:
        """Seconds for the whole training."""
        return self.step_s * self.steps

    def to_json(self) -> dict[str, Any]:
        """Return plain data for run.json, with the verdict."""
        return {**asdict(self), "eta_s": self.eta_s, "verdict": verdict(self)}


def probe_recipe(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    *,
    count: int = PROMPTS,
    samples: int | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> Probe:
    """Sample the model on training prompts as training would, and score by the recipe's own rewards.

    Args:
        recipe: the recipe.
        model: its base model, without an adapter or with an untrained one.
        tokenizer: its tokenizer.
        prompts: its prompts.
        count: how many of them, drawn by the recipe's seed: files are often sorted.
        samples: per prompt; None: 8, or the group size where that is larger.
        show: gets progress lines.
    """
    group = recipe.num_generations
    samples = samples or max(SAMPLES, group)
    rows = random.Random(recipe.seed).sample(prompts.train, min(count, len(prompts.train)))
    template = recipe.grpo.get("chat_template_kwargs")
    ids = [prompt_ids(row["prompt"], tokenizer, template) for row in rows]
    cap = recipe.max_completion_length
    sampling: dict[str, Any] = {
        "max_new_tokens": cap,
        "temperature": float(recipe.grpo.get("temperature", 1.0)),
        "seed": recipe.seed,
        "rows_that_fit": rows_that_fit if recipe.memory.fit else None,
    }
    begun = time.monotonic()
    groups = generate_completions(
        model,
        tokenizer,
        ids,
        samples=samples,
        batch_size=recipe.eval.batch_size,
        progress=lambda done, total: show(f"probe: {done}/{total} prompts sampled"),
        **sampling,
    )
    sampled_s = time.monotonic() - begun
    # A round of training again, by itself: how long one takes hardly depends on how many are decoded at once.
    begun = time.monotonic()
    chosen = ids[: max(1, recipe.schedule.batch // group)]
    generate_completions(model, tokenizer, chosen, samples=group, batch_size=recipe.schedule.batch, **sampling)
    round_s = (time.monotonic() - begun) * recipe.schedule.batch / (group * len(chosen))
    completions = [completion for group in groups for completion in group]
    repeated = [row for row in rows for _ in range(samples)]
    right, _ = score_completions(tokenizer, recipe, repeated, completions)
    judged = [right[i : i + samples] for i in range(0, len(right), samples)]
    counts = [sum(bool(r) for r in group) for group in judged if None not in group]
    begun = time.monotonic()
    totals, formats = _rewards(recipe, tokenizer, repeated, completions, prompts.lead_in)
    reward_s = time.monotonic() - begun
    lengths = [len(completion) for completion in completions]
    caps = sorted({max(1, cap // 4), max(1, cap // 2), cap})
    forward_s = forward_seconds(recipe, model, tokenizer, ids, groups)
    equal = statistics.fmean(_equal(totals, samples, min(group, samples)))
    live = 1.0 - equal if recipe.compute == "packed" and not recipe.grpo.get("beta") else 1.0  # the rest is left out
    step_s = recipe.schedule.sampled_per_step * (round_s / recipe.schedule.batch + reward_s / len(completions))
    step_s += recipe.schedule.trained_per_step * live * forward_s * training_forwards(recipe)
    return Probe(
        prompts=len(rows),
        samples=samples,
        pass_at_1=mean_pass_at_k(counts, samples, 1) if counts else 0.0,
        pass_at_k=mean_pass_at_k(counts, samples, samples) if counts else 0.0,
        equal_groups=equal,
        cap=cap,
        cuts_cost=_cuts_cost(right, [n >= cap for n in lengths]),
        truncated={limit: statistics.fmean(n >= limit for n in lengths) for limit in caps},
        format_rate=None if formats is None else statistics.fmean(formats),
        rewarded=statistics.fmean(total for total in totals if total is not None) if any(totals) else 0.0,
        opened=opened[1] if (opened := OPENED.search(prompts.lead_in)) else None,
        tokens_per_s=max(1, sum(lengths)) / max(sampled_s, 1e-9),
        step_s=step_s,
        steps=recipe.schedule.steps(len(prompts.train)),
        evaluation_s=_evaluated(recipe, len(prompts.eval)) * sampled_s / len(completions),
        notes=() if counts else ("no probed prompt has a usable gold answer",),
    )


def _rewards(
    recipe: Recipe, tokenizer: Any, rows: Sequence[dict[str, Any]], completions: Sequence[list[int]], lead_in: str
) -> tuple[list[float | None], list[bool] | None]:
    """Return the total reward of each completion, and whether it earned the format reward (None without one)."""
    columns = sorted({key for row in rows for key in row if key != "prompt"})
    functions, weights = load_rewards(recipe, columns, lead_in)
    functions = [limited(function, recipe.limits.reward_timeout_s, "probe") for function in functions]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    chat = not isinstance(rows[0]["prompt"], str)
    given: dict[str, Any] = {
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
        "prompts": [row["prompt"] for row in rows],
        "completion_ids": [list(ids) for ids in completions],
        **{key: [row.get(key) for row in rows] for key in columns},
    }
    formats = None
    for section, function in zip(recipe.rewards, functions, strict=True):
        if named(section.function) is format_reward:
            formats = [value is not None and value >= 1.0 for value in function(**given)]
    return weighted_sum(functions, weights)(**given), formats


def _equal(totals: Sequence[float | None], samples: int, group: int) -> list[bool]:
    """Return for each whole group inside the samples of each prompt whether its rewards are all equal."""
    starts = [i + j for i in range(0, len(totals), samples) for j in range(0, samples - group + 1, group)]
    return [len(set(totals[start : start + group])) == 1 for start in starts]


def _cuts_cost(right: Sequence[bool | None], cut: Sequence[bool]) -> bool:
    """Return whether reaching the cap costs rewards: answers that come first and run on lose nothing by it."""
    rates = []
    for kind in (True, False):
        judged = [bool(r) for r, reached in zip(right, cut, strict=True) if reached is kind and r is not None]
        rates.append(statistics.fmean(judged) if judged else None)
    among_cut, among_ended = rates
    return not among_cut or (among_ended is not None and among_cut < among_ended / 2)


def _evaluated(recipe: Recipe, held_out: int) -> int:
    """Return how many completions the evaluation of base and trained model generates."""
    section = recipe.eval
    return 2 * (1 + section.samples) * min(held_out, section.limit or held_out) if section.enabled else 0


def verdict(probe: Probe) -> str:
    """Return one sentence, with the override to paste where something is wrong; the gravest finding wins."""
    if probe.opened and (probe.format_rate == 0 or (probe.format_rate is None and probe.rewarded == 0)):
        return (
            f"the chat template opens <{probe.opened}> itself and nothing is paid: a reward that wants to see that tag "
            "can never fire; it is handed prefilled=True, so let it take that argument"
        )
    if probe.notes:
        return f"{probe.notes[0]}, so nothing can be paid; correct data.answer or data.gold_completion"
    cut = probe.truncated[probe.cap]
    if cut >= 0.3 and probe.cuts_cost:
        return (
            f"the cap is too short: {cut:.0%} of the completions are cut at {probe.cap} tokens; "
            f"paste: grpo.max_completion_length={2 * probe.cap}"
        )
    if probe.pass_at_k == 0 and probe.equal_groups >= 0.9:
        return (
            f"too hard: none of {probe.prompts} prompts is solved in {probe.samples} samples, so every group is equal; "
            "take an easier task, a stronger model, or show examples (data.examples)"
        )
    if probe.pass_at_1 >= 0.9:
        return f"too easy: {probe.pass_at_1:.0%} of single samples are right already; take harder rows (data.train)"
    if probe.format_rate == 0:
        return "the agreed format never occurs, so its reward teaches nothing; describe it in data.system by an example"
    if probe.equal_groups >= 0.5:
        return (
            f"slow: {probe.equal_groups:.0%} of the groups have equal rewards and give no gradient; paste: "
            "sampling.refill=16"
        )
    return "it can learn: rewards differ inside the groups, and completions end before the cap"


def probe_lines(probe: Probe) -> Iterator[str]:
    """Yield the probe as lines, the verdict last."""
    yield f"{probe.prompts} prompts × {probe.samples} samples, untrained, {probe.tokens_per_s:.0f} tokens/s"
    yield f"  pass@1 {probe.pass_at_1:.1%}, pass@{probe.samples} {probe.pass_at_k:.1%}, reward {probe.rewarded:.3f}"
    yield f"  groups with equal rewards {probe.equal_groups:.0%}"
    cuts = ", ".join(f"{share:.0%} at {limit}" for limit, share in probe.truncated.items())
    yield f"  completions that reach a cap: {cuts} tokens"
    if probe.format_rate is not None:
        yield f"  in the agreed format {probe.format_rate:.0%}"
    yield (
        f"  a step about {probe.step_s:.3g} s (training counted as multiples of a measured forward pass), "
        f"{probe.steps} steps about {format_seconds(probe.eta_s)}, "
        f"evaluation about {format_seconds(probe.evaluation_s)}"
    )
    yield f"verdict: {verdict(probe)}"
