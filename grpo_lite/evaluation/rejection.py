"""sample_traces: the base's own right completions, as rows that the warm-up trains on (`warmup.source: self`).

Rejection sampling. The model samples completions of the training prompts, the recipe's own rewards keep the right ones,
and the run directory keeps what was accepted, so that a killed run resumes with the same rows. With tools a completion
is an episode, played to its end; the results in it are read and not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grpo_lite.engine.generate import generate_completions
from grpo_lite.errors import DataError
from grpo_lite.evaluation.episodes import play_with
from grpo_lite.evaluation.scoring import call_reward, score_completions
from grpo_lite.files.atomic import write_atomic
from grpo_lite.memory.fit import rows_that_fit
from grpo_lite.recipe.recipe import Recipe, WarmupSection
from grpo_lite.screen import Show, progress_lines
from grpo_lite.task.episodes import Episode, Player, make_player
from grpo_lite.task.generators import Row
from grpo_lite.task.guard import limited
from grpo_lite.task.prompts import Prompts, columns_of
from grpo_lite.task.rewards import Reward, load_rewards, top_of, weighted_scores
from grpo_lite.task.tokens import batch_prompt_ids
from grpo_lite.task.traces import Trace, Traces

Progress = Callable[[int, int], None]  # prompts done, of how many


@dataclass(frozen=True)
class _Sample:
    """One completion, scored."""

    ids: list[int]  # what the model wrote; of one turn without the end token
    text: str  # the same
    is_right: bool  # the first reward is at its top; of an episode: as in the evaluation
    has_ended: bool  # by itself, within the cap
    total: float  # weighted sum of all rewards, the environment's own included
    episode: Episode | None = None


def sample_traces(recipe: Recipe, model: Any, prompts: Prompts, show: Show) -> Traces:
    """Sample the training prompts and return the completions to learn from; the same ones for the same seed.

    A completion is accepted if the first reward is at its top and it ended by itself; an episode, if the evaluation
    would call it right and it ended with an answer. Of each prompt the best `warmup.keep` distinct ones stay: by the
    weighted sum of all rewards, then the shorter ones.

    Args:
        recipe: with `warmup.source: self`.
        model: what the warm-up starts from, with or without an adapter.
        prompts: of the recipe, with its tokenizer.
        show: gets progress lines.

    Raises:
        DataError: no completion is right.
    """
    if recipe.warmup is None:
        raise ValueError("the recipe has no warmup")
    section, rows = recipe.warmup, prompts.train[: recipe.warmup.prompts]
    player = make_player(prompts, recipe, show)
    sampled = _sampled_turns if player is None else partial(_sampled_episodes, player=player)
    samples = sampled(
        recipe,
        model,
        prompts,
        rows,
        progress=progress_lines(show, f"warm-up: {section.samples} samples of each prompt"),
    )
    accepted = [_best(group, section.keep) for group in samples]
    if not any(accepted):
        raise _nothing_right(recipe, section, samples)
    pairs = [(row, sample) for row, group in zip(rows, accepted, strict=True) for sample in group]
    traces = [_trace(prompts, row, sample) for row, sample in pairs]
    return Traces(traces, [_note(samples, len(traces))], [_source(row, sample) for row, sample in pairs])


def write_traces(path: Path, traces: Traces) -> None:
    """Write traces as JSON lines, whole or not at all; the first line carries the notes."""
    lines = [
        {"source": source, "prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids}
        | ({} if row.tool_mask is None else {"tool_mask": row.tool_mask})
        for row, source in zip(traces.rows, traces.sources, strict=True)
    ]
    lines[0]["notes"] = traces.notes
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def read_traces(path: Path) -> Traces:
    """Read what `write_traces` wrote.

    Raises:
        DataError: the file is damaged.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        rows = [Trace(line["prompt_ids"], line["completion_ids"], line.get("tool_mask")) for line in lines]
        return Traces(rows, lines[0]["notes"], [line["source"] for line in lines])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path}: the completions for the warm-up cannot be read ({error}). Remove the file to sample them again."
        ) from None


def _trace(prompts: Prompts, row: Row, sample: _Sample) -> Trace:
    if sample.episode is None:
        return Trace(prompts.ids(row), [*sample.ids, prompts.tokenizer.eos_token_id])
    return Trace(sample.episode.prompt_ids, sample.episode.ids, sample.episode.mask)


def _source(row: Row, sample: _Sample) -> Row:
    if sample.episode is None or not sample.episode.calls:
        return {**row, "completion": sample.text}
    return {**row, "completion": sample.episode.messages}


def _sampled_turns(
    recipe: Recipe, model: Any, prompts: Prompts, rows: Sequence[Row], progress: Progress
) -> list[list[_Sample]]:
    """Return `warmup.samples` scored completions of each prompt, each of one turn."""
    assert recipe.warmup is not None
    groups = generate_completions(
        model,
        prompts.tokenizer,
        batch_prompt_ids([row["prompt"] for row in rows], prompts.tokenizer, prompts.template_kwargs),
        max_new_tokens=recipe.warmup_completion_length,
        samples=recipe.warmup.samples,
        temperature=recipe.temperature,
        batch_size=recipe.eval.batch_size,
        seed=recipe.seed,
        rows_that_fit=rows_that_fit if recipe.memory.fit else None,
        progress=progress,
    )
    return _score(recipe, prompts, rows, groups)


def _sampled_episodes(
    recipe: Recipe, model: Any, prompts: Prompts, rows: Sequence[Row], progress: Progress, player: Player
) -> list[list[_Sample]]:
    """Play and score `warmup.samples` episodes of each prompt, at most `eval.batch_size` at once."""
    assert recipe.warmup is not None
    count, tokenizer = recipe.warmup.samples, prompts.tokenizer
    functions, weights = _rewards(recipe, prompts, rows)
    samples: list[_Sample] = []
    size = max(1, recipe.eval.batch_size // count)
    for start in range(0, len(rows), size):
        repeated = [row for row in rows[start : start + size] for _ in range(count)]
        episodes = play_with(
            model, tokenizer, recipe, player, repeated, recipe.warmup_completion_length,
            temperature=recipe.temperature, seed=recipe.seed + start,
        )  # fmt: skip
        right, _ = score_completions(tokenizer, recipe, repeated, episodes, player)
        scores = [call_reward(function, tokenizer, recipe, repeated, episodes) for function in functions]
        totals = weighted_scores(scores, weights) if functions else [0.0] * len(episodes)
        for episode, is_right, total, own in zip(episodes, right, totals, player.rewards(episodes), strict=True):
            written = [token for token, is_own in zip(episode.ids, episode.mask, strict=True) if is_own]
            text = tokenizer.decode(written, skip_special_tokens=True)
            ended = episode.ended == "answer"
            samples.append(_Sample(written, text, bool(is_right), ended, (total or 0.0) + (own or 0.0), episode))
        progress(min(start + size, len(rows)), len(rows))
    return [samples[start : start + count] for start in range(0, len(samples), count)]


def _rewards(recipe: Recipe, prompts: Prompts, rows: Sequence[Row]) -> tuple[list[Reward], list[float]]:
    functions, weights = load_rewards(recipe, columns_of(rows), prompts.lead_in)
    return [limited(function, recipe.limits.reward_timeout_s, "warmup") for function in functions], weights


def _score(recipe: Recipe, prompts: Prompts, rows: Sequence[Row], groups: list[list[list[int]]]) -> list[list[_Sample]]:
    """Score every completion by the recipe's rewards, group by group of a prompt."""
    repeated = [row for row, group in zip(rows, groups, strict=True) for _ in group]
    completions = [ids for group in groups for ids in group]
    functions, weights = _rewards(recipe, prompts, rows)
    scores = [call_reward(function, prompts.tokenizer, recipe, repeated, completions) for function in functions]
    top = top_of(functions[0])
    texts = prompts.tokenizer.batch_decode(completions, skip_special_tokens=True)
    samples = [
        _Sample(ids, text, first is not None and first >= top, len(ids) < recipe.warmup_completion_length, total or 0.0)
        for ids, text, first, total in zip(completions, texts, scores[0], weighted_scores(scores, weights), strict=True)
    ]
    size = len(groups[0]) if groups else 1
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _best(group: Sequence[_Sample], keep: int) -> list[_Sample]:
    """Return the best distinct completions of one prompt that are right and ended by themselves."""
    right = [sample for sample in group if sample.is_right and sample.has_ended and sample.text.strip()]
    ranked = sorted(right, key=lambda sample: (-sample.total, len(sample.ids)))
    distinct: dict[str, _Sample] = {}
    for sample in ranked:
        distinct.setdefault(sample.text, sample)
    return list(distinct.values())[:keep]


def _note(samples: Sequence[Sequence[_Sample]], kept: int) -> str:
    solved = sum(any(sample.is_right and sample.has_ended for sample in group) for group in samples)
    flat = [sample for group in samples for sample in group]
    right = sum(sample.is_right and sample.has_ended for sample in flat)
    return (
        f"{solved} of {len(samples)} prompts have a right completion that ends by itself; {right} of {len(flat)} "
        f"completions are right, and {kept} are kept."
    )


def _nothing_right(recipe: Recipe, section: WarmupSection, samples: Sequence[Sequence[_Sample]]) -> DataError:
    flat = [sample for group in samples for sample in group]
    cut = sum(not sample.has_ended for sample in flat)
    at = f"at {recipe.warmup_completion_length} tokens" + (" or at the last turn" if recipe.has_tools else "")
    right = sum(sample.is_right for sample in flat)
    but = f" that ends by itself ({right} are right, but cut off)" if right else ""
    return DataError(
        f"warmup.source: 'self' is given, but none of the {len(flat)} completions sampled ({len(samples)} prompts × "
        f"{section.samples}) is right{but}, so there is nothing to learn from; {cut} were cut off "
        f"{at}. Sample more (warmup.samples), take easier prompts or a longer cap "
        "(grpo.max_completion_length), or give rows with completions (warmup.source=data and warmup.data)."
    )
