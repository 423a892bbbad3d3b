"""Check a recipe before it trains: its prompts, their lengths, the warm-up's rows, and what its rewards pay.

Rewards should pay the gold and no cheat. Needs the tokenizer, not the model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grpo_lite.commands import hint
from grpo_lite.errors import GRPOLiteError, RewardError
from grpo_lite.models.adapter import read_adapter
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_tokenizer
from grpo_lite.recipe.recipe import Recipe, WarmupSection
from grpo_lite.rewards.testing import Report, check_rewards, score_rows
from grpo_lite.task.episodes import Episode, Player, seeded
from grpo_lite.task.generators import Row
from grpo_lite.task.gold import NO_GOLD, gold_completion
from grpo_lite.task.guard import limited
from grpo_lite.task.prompts import Prompts, columns_of, load_prompts, opened_tag
from grpo_lite.task.rewards import highest_sum, load_rewards, weighted_sum
from grpo_lite.task.traces import earning, earning_lines, load_traces

GOLD_ROWS = 64
TRIED_ROWS = 4  # of an environment, of which one has to begin
MEASURED_PROMPTS = 2000


def check_recipe(recipe: Recipe, previews: int = 3) -> Iterator[str]:
    """Yield lines: rendered prompts, prompt lengths, and what the gold answers earn.

    Raises:
        GRPOLiteError: the data, the tokenizer, a reward or the adapter to start from is at fault.
    """
    base = Base.resolve(recipe.model)
    prompts = load_prompts(recipe, load_tokenizer(base))
    adapter = read_adapter(recipe, base).line if recipe.init_from else None
    yield f"{recipe.name}: valid. {len(prompts.train)} training prompts, {len(prompts.eval)} held out."
    yield from prompts.notes
    if adapter:
        yield adapter
    shown = set[str]()
    for row, note in _begun(recipe, prompts, prompts.train[:previews]):
        text = prompts.text(row)
        if text in shown and recipe.data.answer is None:
            continue
        shown.add(text)
        yield ""
        yield f"prompt: {text}"
        if note:
            yield note
        if recipe.data.answer is not None:
            yield f"answer: {json.dumps(row.get('answer'), ensure_ascii=False, default=str)}"
    if tag := opened_tag(prompts.lead_in):
        yield f"the chat template opens <{tag}>, and rewards that accept it get prefilled=True"
    yield ""
    yield prompt_lengths(recipe, prompts)
    if recipe.rewards:
        yield from gold_rewards(recipe, prompts)
    if recipe.warmup:
        yield ""
        yield from warmup_lines(recipe, recipe.warmup, prompts)


def _begun(recipe: Recipe, prompts: Prompts, rows: Sequence[Row]) -> Iterator[tuple[Row, str]]:
    """Yield rows with what `reset` adds to their prompts, and a line on it; without an environment as they are."""
    if prompts.toolkit is None or not prompts.toolkit.factories:
        yield from ((row, "") for row in rows)
        return
    for row in rows:
        episode, failure = _silent(recipe, prompts, row)
        added = len(episode.prompt_ids) - len(prompts.ids(row))
        note = f"reset added {added} tokens to this prompt; the lengths below are without them" if added > 0 else ""
        yield {**row, "prompt": episode.prompt}, failure or note


def _silent(recipe: Recipe, prompts: Prompts, row: Row) -> tuple[Episode, str]:
    """Return an episode in which nothing is said, in an environment of its own, and why it cannot begin, if so."""
    player = Player(prompts, recipe, lambda line: None)
    (episode,) = player.play([row], lambda read, room: [[] for _ in read], 1)
    return episode, player.guard.last_failure if episode.ended == "reset" else ""


def require_beginnings(recipe: Recipe, prompts: Prompts) -> None:
    """Begin an episode of each environment; refuse to load a model where none of an environment's first rows begins.

    Raises:
        RewardError: `reset` fails with each of the first `TRIED_ROWS` rows.
    """
    toolkit = prompts.toolkit
    for name in toolkit.factories if toolkit is not None else ():
        rows = [row for row in prompts.train if toolkit.name_of(row) == name][:TRIED_ROWS]  # type: ignore[union-attr]
        with seeded(recipe.seed):
            failures = list(itertools.takewhile(bool, (_silent(recipe, prompts, row)[1] for row in rows)))
        if rows and len(failures) == len(rows):
            raise RewardError(
                f"environment: {failures[0]}. So no episode begins, with none of the first {len(rows)} rows. Correct "
                "the rows or `reset`; or train anyway with check.enabled=false."
            )


def prompt_lengths(recipe: Recipe, prompts: Prompts) -> str:
    """Return one line of prompt-length percentiles, in tokens, over at most `MEASURED_PROMPTS` training prompts."""
    lengths = sorted(len(prompts.ids(row)) for row in prompts.train[:MEASURED_PROMPTS])
    of = f" (first {MEASURED_PROMPTS})" if len(prompts.train) > MEASURED_PROMPTS else ""
    return f"prompt tokens{of}: {_percentiles(lengths)}; completions up to {recipe.max_completion_length}"


def warmup_lines(recipe: Recipe, section: WarmupSection, prompts: Prompts) -> Iterator[str]:
    """Yield what the warm-up trains on: rows, what is dropped, one of them, lengths, and what the rewards pay for them.

    Raises:
        DataError: as `load_traces`.
    """
    if section.source == "self":
        count = min(section.prompts or len(prompts.train), len(prompts.train))
        yield (
            f"warm-up: the base samples {section.samples} completions of each of {count} training prompts, and learns "
            f"at most {section.keep} right ones of each"
        )
        return
    traces = load_traces(recipe, prompts)
    yield f"warm-up: {len(traces.rows)} rows"
    yield from (f"warm-up: {note}" for note in traces.notes)
    yield f"warm-up prompt: {prompts.text(traces.sources[0])}"
    first = prompts.tokenizer.decode(traces.rows[0].completion_ids)
    yield f"warm-up completion: {json.dumps(first, ensure_ascii=False)}"
    lengths = sorted(len(trace.completion_ids) for trace in traces.rows)
    cap = recipe.warmup_completion_length
    yield f"warm-up completion tokens: {_percentiles(lengths)}; up to {cap} are kept"
    yield from (f"warm-up: {line}" for line in earning_lines(earning(recipe, prompts, traces), traces))


def _percentiles(ordered: Sequence[int]) -> str:
    return ", ".join(f"p{p} {_percentile(ordered, p)}" for p in (50, 90, 99)) + f", longest {ordered[-1]}"


def _percentile(ordered: Sequence[int], percent: int) -> int:
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def gold_rewards(recipe: Recipe, prompts: Prompts) -> Iterator[str]:
    """Yield, per reward, the mean over gold completions of the first training rows."""
    if recipe.data.gold_completion is None:
        yield f"{NO_GOLD}, so the rewards are not tried"
        return
    rows = prompts.train[:GOLD_ROWS]
    columns = columns_of(rows)
    functions, _ = load_rewards(recipe, columns, prompts.lead_in)
    texts = [gold_completion(recipe, row, prompts.lead_in) for row in rows]
    chat = not isinstance(rows[0]["prompt"], str)
    yield f"a gold completion: {json.dumps(texts[0], ensure_ascii=False)}"
    for i, function in enumerate(functions):
        scores = function(
            completions=[[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
            prompts=[row["prompt"] for row in rows],
            completion_ids=[[0] * min(len(text), recipe.max_completion_length - 1) for text in texts],
            **{key: [row.get(key) for row in rows] for key in columns},
        )
        usable = [score for score in scores if score is not None]
        none = f", {len(scores) - len(usable)} unusable" if len(usable) < len(scores) else ""
        mean = sum(usable) / len(usable) if usable else float("nan")
        yield f"rewards[{i}] {function.__name__}: gold completions earn {mean:.3f} on average ({len(rows)} rows{none})"


def check_recipe_rewards(recipe: Recipe, prompts: Prompts) -> Report:
    """Score the gold completions and the battery of cheats by the recipe's weighted sum of rewards.

    Raises:
        RewardError: a reward does not load or breaks its contract, or `check.skip` names an unknown check.
    """
    rows = prompts.train[: recipe.check.rows]
    columns = columns_of(rows)
    functions, weights = load_rewards(recipe, columns, prompts.lead_in)
    functions = [limited(function, recipe.limits.reward_timeout_s, "check") for function in functions]

    def gold(row: Mapping[str, Any]) -> str:
        return gold_completion(recipe, dict(row), prompts.lead_in)

    golds, chat = [gold(row) for row in rows], recipe.data.format == "chat"
    try:
        return check_rewards(
            rows,
            weighted_sum(functions, weights),
            render_gold=gold,
            top=highest_sum(functions, weights, [score_rows(function, rows, golds, chat) for function in functions]),
            chat=chat,
            skip=recipe.check.skip,
        )
    except ValueError as error:
        raise RewardError(f"check: {error}") from None


def check_rewards_alone(recipe: Recipe) -> tuple[Report, list[str]]:
    """Check a recipe's rewards without its model; return the report and notes for people.

    Only the tokenizer's chat template matters here, and without it the check continues.

    Raises:
        GRPOLiteError: as check_recipe_rewards, or the data are at fault.
    """
    tokenizer, notes = None, []
    if recipe.data.format == "chat":
        try:
            tokenizer = load_tokenizer(Base.resolve(recipe.model))
        except GRPOLiteError as error:
            notes.append(f"checked without the chat template (whether it opens <think> is not known): {error}")
    prompts = load_prompts(recipe, tokenizer)
    return check_recipe_rewards(recipe, prompts), notes


def require_paid_gold(recipe: Recipe, prompts: Prompts, show: Callable[[str], None]) -> Report | None:
    """Run the check before training, in a line; refuse to train on rewards that do not pay the gold.

    Returns:
        The report; None where the rows hold no gold, and then a line says so.

    Raises:
        RewardError: a gold completion does not earn the top score.
    """
    if recipe.data.gold_completion is None:
        show(f"rewards: not checked, {NO_GOLD}")
        return None
    report = check_recipe_rewards(recipe, prompts)
    if not report.gold_scores:
        raise RewardError(
            f"{recipe.name}: the rewards do not pay the right answer, so there is nothing to learn:\n{report.table()}\n"
            "Correct data.answer, data.gold_completion (what a perfect completion looks like) or the rewards; "
            "or train anyway with check.enabled=false."
        )
    cheats = sorted({finding.check for finding in report.findings})
    command = hint("rewards check", recipe=recipe.name)
    tail = f"; {len(cheats)} kinds of cheat are paid too ({', '.join(cheats)}), see `{command}`"
    show(
        f"rewards: gold completions earn {report.top:g}, {report.gameability_rate:.1%} of the cheats are paid"
        + (tail if cheats else "")
    )
    return report
