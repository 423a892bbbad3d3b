"""Score episodes: held-out rows played with real tools, greedily and sampled, and what the turns and calls were."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grpo_lite.engine.generate import generate_completions, positions_of
from grpo_lite.evaluation.scoring import right_of_each, score_completions, second_opinions
from grpo_lite.memory.fit import rows_that_fit
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.screen import Show, progress_lines
from grpo_lite.task.episodes import Episode, Player, require_scored, seeded, turns_of
from grpo_lite.task.generators import Row


def score_episodes(
    model: Any, tokenizer: Any, recipe: Recipe, rows: list[Row], show: Show, name: str, player: Player
) -> list[Row]:
    """Play an episode of each row greedily, and `eval.samples` sampled ones, and score them.

    At most `eval.batch_size` are played at once, so that no more environments are made.

    Returns:
        The records of `score_model`.
    """
    section, records = recipe.eval, []
    played: list[Episode] = []
    progress = progress_lines(show, f"evaluating {name}, greedy")
    for start in range(0, len(rows), section.batch_size):
        part = rows[start : start + section.batch_size]
        episodes = play_with(model, tokenizer, recipe, player, part, recipe.eval_completion_length)
        lenient, strict = score_completions(tokenizer, recipe, part, episodes, player)
        opinions = second_opinions(tokenizer, recipe, part, episodes)
        for i, episode in enumerate(episodes):
            records.append(_record(episode, lenient[i], strict[i]))
            if opinions is not None:
                records[-1]["honest"] = None if lenient[i] is None else opinions[i]
        played += episodes
        progress(start + len(part), len(rows))
    require_scored(played, f"evaluating {name}")
    if not section.samples:
        return records
    progress = progress_lines(show, f"evaluating {name}, {section.samples} samples")
    size = max(1, section.batch_size // section.samples)
    for start in range(0, len(rows), size):
        repeated = [row for row in rows[start : start + size] for _ in range(section.samples)]
        episodes = play_with(
            model, tokenizer, recipe, player, repeated, recipe.eval_completion_length,
            temperature=section.temperature, seed=recipe.seed + start,
        )  # fmt: skip
        right, _ = score_completions(tokenizer, recipe, repeated, episodes, player)
        for record, count in zip(records[start : start + size], right_of_each(right, section.samples), strict=True):
            record["samples_right"] = count
        progress(min(start + size, len(rows)), len(rows))
    return records


def play_with(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    player: Player,
    rows: Sequence[Row],
    max_tokens: int,
    temperature: float | None = None,
    seed: int = 0,
) -> list[Episode]:
    """Play an episode of each row with a model's turns; greedily without a temperature.

    The same seed gives the same episodes, also where tools or `reset` draw from `random` or NumPy. The caller's own
    random state is left untouched.
    """
    turns = _seeds(seed)

    def generate(prompts: list[list[int]], room: int) -> list[list[int]]:
        sampling: dict[str, Any] = {} if temperature is None else {"samples": 1, "temperature": temperature}
        groups = generate_completions(
            model,
            tokenizer,
            prompts,
            max_new_tokens=room,
            batch_size=recipe.eval.batch_size,
            seed=next(turns),
            rows_that_fit=rows_that_fit if recipe.memory.fit else None,
            **sampling,
        )
        return [completions[0] for completions in groups]

    with seeded(seed):
        return player.play(rows, generate, max_tokens, positions_of(model))


def episode_means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return turns, calls and failed calls an episode, the share without a call, and in how many get_reward failed."""
    return {
        "turns": statistics.fmean(turns_of(record["turns"]) for record in records),
        "calls": statistics.fmean(record["calls"] for record in records),
        "failed_calls": statistics.fmean(record["failed_calls"] for record in records),
        "without_call": statistics.fmean(record["calls"] == 0 for record in records),
        "failed_rewards": sum("fault" in record for record in records),
    }


def _record(episode: Episode, lenient: bool | None, strict: bool | None) -> Row:
    return {
        "completion": episode.answer,
        "prompt": episode.prompt,
        "turns": episode.messages,
        "calls": episode.calls,
        "failed_calls": episode.failed_calls,
        "lenient": lenient,
        "strict": strict,
        "truncated": episode.ended == "length",
        **({"fault": episode.fault} if episode.fault else {}),
    }


def _seeds(first: int) -> Iterator[int]:
    """Yield a seed for each turn: the same one would draw the same numbers again."""
    while True:
        yield first
        first += 1_000_003
