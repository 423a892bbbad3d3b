"""load_traces: rows with completions -> the token ids that the warm-up trains on, and what the rewards pay for them.

The rows are those of a source, or episodes of the environment's gold policy.
Prompts become tokens as GRPO's do, so that both stages see the same ones. A completion ends with the model's end token,
once. It may be a whole episode with calls of tools, whose results are read and not trained on. Rows that cannot or must
not be trained on are dropped and counted in notes.
"""

from __future__ import annotations

import itertools
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from grpo_lite.commands import hint
from grpo_lite.errors import DataError, RewardError
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.conversations import episode_ids, is_episode, read_episode, split_conversation
from grpo_lite.task.generators import Row
from grpo_lite.task.gold import gold_episodes
from grpo_lite.task.guard import limited
from grpo_lite.task.prompts import (
    Prompts,
    column_of,
    columns_of,
    fields_of,
    fill,
    opened_tag,
    read_rows,
    render_row,
)
from grpo_lite.task.rewards import Reward, highest_sum, load_rewards, top_of, weighted_scores
from grpo_lite.task.tokens import batch_prompt_ids, completion_ids, prompt_key, require_messages

logger = logging.getLogger(__name__)

WHERE = "warmup.data"
TRIED_ROWS = 64
SHOWN_CHARACTERS = 200
_PROMPT_COLUMNS = ("question", "problem", "prompt", "instruction", "input", "query")
_COMPLETION_COLUMNS = ("solution", "response", "output", "reasoning", "generation", "trace", "chosen", "answer")
_REASONING = ("reasoning_content", "reasoning", "thinking")  # where some chat messages keep their thoughts

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Trace:
    """A row of the warm-up: the loss is on the completion, which ends with the model's end token, once."""

    prompt_ids: list[int]
    completion_ids: list[int]
    tool_mask: list[int] | None = None  # 1 where the model writes the token; None: everywhere

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Traces:
    """The rows of the warm-up, in the order of their source."""

    rows: list[Trace]
    notes: list[str]  # what was dropped and why, for people
    sources: list[Row]  # of each row: `prompt` as GRPO renders it, `completion` (text, or an episode's messages), and
    # the columns for rewards

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


@dataclass(frozen=True)
class _Draft:
    """A rendered row, not yet in tokens."""

    source: Row
    text: str | None  # of the completion, of an episode's last turn; None: null
    problems: list[Row]  # the rendered row, in one or two wordings: what is compared with the held-out rows
    episode: list[dict[str, Any]] | None = None  # its messages, where it has calls of tools
    paid: float | None = None  # by its environment, for an episode of the gold policy

    @property
    def calling_turns(self) -> int:
        """How many turns of the episode call tools."""
        return sum(bool(message.get("tool_calls")) for message in self.episode or ())


def load_traces(recipe: Recipe, prompts: Prompts) -> Traces:
    """Read or play, render, filter and tokenise the rows of `warmup.data`, or of the environment's gold policy.

    Args:
        recipe: with `warmup.source: data` or `gold`.
        prompts: of the recipe, with its tokenizer; rows with a held-out prompt are dropped.

    Raises:
        DataError: as `load_prompts`, a row brings no completion, an environment has no gold policy, or no row is left.
        RewardError: a gold policy or its environment is at fault.
    """
    if recipe.warmup is None or recipe.warmup.source == "self":
        raise ValueError("the recipe has no rows with completions")
    notes: list[str] = []
    is_gold = recipe.warmup.source == "gold"
    drafts = list(_gold_drafts(recipe, prompts) if is_gold else _drafts(recipe, prompts))
    count = len(drafts)
    unpaid = "episodes of the gold policy earn nothing"
    drafts = _only(drafts, lambda draft: draft.paid is None or draft.paid > 0, unpaid, notes)
    notes += _note_on_pay(drafts)
    is_held_out = _held_out_test(recipe, prompts)
    drafts = _only(drafts, lambda draft: not is_held_out(draft), "rows have a held-out prompt", notes)
    drafts = _only(drafts, lambda draft: draft.text is not None, "completions are null", notes)
    drafts = _only(drafts, lambda draft: bool((draft.text or "").strip()), "completions are empty", notes)
    if (turns := recipe.grpo.get("max_tool_calling_iterations")) is not None:
        why = f"episodes have more than {turns} turns with calls (grpo.max_tool_calling_iterations)"
        drafts = _only(drafts, lambda draft: draft.calling_turns <= turns, why, notes)
    pairs = list(zip(drafts, _tokenised(drafts, prompts), strict=True))
    if longest := recipe.data.max_prompt_tokens:
        why = f"prompts are over {longest} tokens (data.max_prompt_tokens)"
        pairs = _only(pairs, lambda pair: len(pair[1].prompt_ids) <= longest, why, notes)
    cap = recipe.warmup_completion_length
    why = f"completions are over {cap} tokens with the end token (warmup.max_completion_tokens)"
    pairs = _only(pairs, lambda pair: len(pair[1].completion_ids) <= cap, why, notes)
    if not pairs:
        raise _nothing_left(recipe, prompts, count, notes)
    notes += _note_on_unclosed([draft for draft, _ in pairs], prompts.lead_in)
    sources = [{**draft.source, "completion": draft.episode or draft.text} for draft, _ in pairs]
    traces = Traces([trace for _, trace in pairs], notes, sources)
    return _only_right(recipe, prompts, traces) if recipe.warmup.only_right else traces


def _nothing_left(recipe: Recipe, prompts: Prompts, count: int, notes: Sequence[str]) -> DataError:
    where = WHERE if recipe.warmup and recipe.warmup.source == "data" else "warmup.source: gold"
    advice = "Give other rows, or raise the limit that drops them."
    if recipe.environment is not None and any("held-out" in note for note in notes):
        columns = ", ".join(columns_of(prompts.held_out))
        advice = (
            f"Give them the columns that held-out rows have ({columns}), by which they are told apart, or other rows."
        )
    return DataError(f"{where}: none of its {count} rows is left to train on. {' '.join(notes)} {advice}")


def _drafts(recipe: Recipe, prompts: Prompts) -> Iterator[_Draft]:
    assert recipe.warmup is not None
    assert recipe.warmup.data is not None
    rows = read_rows(recipe.warmup.data, recipe.seed, WHERE)
    yield from (_draft(recipe, row, i, prompts) for i, row in enumerate(rows))


def _gold_drafts(recipe: Recipe, prompts: Prompts) -> Iterator[_Draft]:
    """Yield the episodes of the gold policy; their rows are not held out."""
    assert prompts.toolkit is not None
    for i, episode in enumerate(gold_episodes(recipe, prompts)):
        tools = [tool.__name__ for tool in prompts.toolkit.offered(episode.row)]
        messages = read_episode(episode.messages, tools, f"warmup.source: gold: row {i}")
        yield _Draft(episode.row, str(messages[-1]["content"]), [], messages, episode.paid)


def _note_on_pay(drafts: Sequence[_Draft]) -> Iterator[str]:
    """Yield what the environment pays for episodes of the gold policy."""
    paid = [draft.paid for draft in drafts if draft.paid is not None]
    if paid:
        each = f"{paid[0]:g} for each" if len(set(paid)) == 1 else f"{statistics.fmean(paid):.3g} on average"
        yield f"{len(drafts)} episodes of the gold policy; the environment pays {each}."


def _tokenised(drafts: Sequence[_Draft], prompts: Prompts) -> list[Trace]:
    if prompts.toolkit is None:
        rows = [draft.source["prompt"] for draft in drafts]
        ids = batch_prompt_ids(rows, prompts.tokenizer, prompts.template_kwargs)
    else:
        ids = [prompts.ids(draft.source) for draft in drafts]
    completions = completion_ids([draft.text or "" for draft in drafts], prompts.tokenizer)
    traces = list(map(Trace, ids, completions))
    for i, draft in enumerate(drafts):
        if draft.episode is not None:
            template = prompts.template_of(draft.source) or {}
            parts = episode_ids(draft.source["prompt"], draft.episode, prompts.tokenizer, template, WHERE)
            traces[i] = Trace(ids[i], *parts)
    return traces


def _held_out_test(recipe: Recipe, prompts: Prompts) -> Callable[[_Draft], bool]:
    """Return what says whether a draft's problem is held out.

    The prompt says it. In an environment all rows may have one prompt, so there every other column counts that both
    have.
    """
    columns = set(columns_of(prompts.held_out)) if recipe.environment is not None else set[str]()
    known: dict[tuple[str, ...], set[str]] = {}  # by the columns that are compared

    def key(row: Row, shared: tuple[str, ...]) -> str:
        return prompt_key(row["prompt"]) + json.dumps([row.get(name) for name in shared], sort_keys=True, default=str)

    def is_held_out(draft: _Draft) -> bool:
        for row in draft.problems:
            shared = tuple(sorted(columns & row.keys()))
            if shared not in known:
                known[shared] = {key(held, shared) for held in prompts.held_out}
            if key(row, shared) in known[shared]:
                return True
        return False

    return is_held_out


def _only_right(recipe: Recipe, prompts: Prompts, traces: Traces) -> Traces:
    """Return the traces that the first reward pays in full.

    Raises:
        DataError: it cannot be asked about these rows, or pays none of them.
    """
    if not recipe.rewards:
        raise DataError(
            "warmup.only_right: true is given, and the recipe has no reward function to ask, only its environment's "
            "get_reward. Remove the key, or add a function, such as rewards.accuracy_reward."
        )
    try:
        functions, _, scores = _scores(recipe, prompts, traces)
    except RewardError as error:
        raise DataError(f"warmup.only_right: true is given, but the rewards cannot be asked: {error}") from None
    top = top_of(functions[0])
    right = [score is not None and score >= top for score in scores[0]]
    dropped = len(right) - sum(right)
    if dropped == len(right):
        command = hint("check", "warmup.only_right=false", recipe=recipe.name)
        raise DataError(
            f"warmup.only_right: true is given, and the first reward pays none of the {dropped} traces in full. See "
            f"one with `{command}`. Then correct warmup.completion, "
            "warmup.answer or the reward."
        )
    notes = [f"{dropped} of {len(right)} traces do not earn the first reward in full and were dropped."]
    return Traces(
        list(itertools.compress(traces.rows, right)),
        [*traces.notes, *(notes if dropped else [])],
        list(itertools.compress(traces.sources, right)),
    )


def _scores(
    recipe: Recipe, prompts: Prompts, traces: Traces
) -> tuple[list[Reward], list[float], list[list[float | None]]]:
    """Return the recipe's rewards, their weights, and what each pays for the traces, as in training.

    Raises:
        RewardError: the rows lack a column that a reward needs, or a reward fails.
    """
    rows, columns = traces.sources, columns_of(traces.sources)
    texts = _seen_by_rewards(prompts, traces)
    chat = recipe.data.format == "chat"
    functions, weights = load_rewards(recipe, columns, prompts.lead_in)
    scores = [
        limited(function, recipe.limits.reward_timeout_s, WHERE)(
            completions=[
                row["completion"] if is_episode(row["completion"]) else [{"role": "assistant", "content": text}]
                for row, text in zip(rows, texts, strict=True)
            ]
            if chat
            else texts,
            prompts=[row["prompt"] for row in rows],
            completion_ids=[trace.completion_ids for trace in traces.rows],
            **{key: [row.get(key) for row in rows] for key in columns},
        )
        for function in functions
    ]
    return functions, weights, scores


def _seen_by_rewards(prompts: Prompts, traces: Traces) -> list[str]:
    ids = [trace.completion_ids for trace in traces.rows]
    return list(prompts.tokenizer.batch_decode(ids, skip_special_tokens=True))


def _only(items: list[_Item], keep: Callable[[_Item], bool], why: str, notes: list[str]) -> list[_Item]:
    """Return the items to keep, and note how many are dropped."""
    kept = [item for item in items if keep(item)]
    if dropped := len(items) - len(kept):
        notes.append(f"{dropped} of {len(items)} {why} and were dropped.")
    return kept


def _draft(recipe: Recipe, row: Row, index: int, prompts: Prompts) -> _Draft:
    """Render the prompt and the completion of one row.

    Without a template for either, chat messages bring both: the last one is the completion.
    """
    section = recipe.warmup
    if section is None:
        raise ValueError("the recipe has no warmup")
    columns = {name: value for name, value in row.items() if name is not None}
    template, episode = section.prompt or recipe.data.prompt, None
    if section.completion == "{completion}" and "completion" not in columns and "messages" in columns:
        if recipe.has_tools and is_episode(columns["messages"]):
            before, episode = _split_episode(columns["messages"], index)
            text = None
        else:
            before, text = _split(columns["messages"], index)
        if section.prompt is None:
            template = "{prompt}"
            columns["prompt"] = before[1:] if recipe.data.system and before[0].get("role") == "system" else before
    else:
        episode = _episode_in(section.completion, columns) if recipe.has_tools else None
        text = None if episode else _completion(section.completion, columns, index)
    source = _rendered(recipe, template, columns, index)
    problems = [source]
    if template != recipe.data.prompt:  # the same problem in other words
        names = map(column_of, fields_of(recipe.data.prompt, "data.prompt"))
        if all(row.get(name) is not None for name in names):
            problems.append(_rendered(recipe, recipe.data.prompt, row, index))
    if episode is not None and prompts.toolkit is not None:
        tools = [tool.__name__ for tool in prompts.toolkit.offered(source)]
        episode = read_episode(episode, tools, f"{WHERE}: row {index}")
        return _Draft(source, str(episode[-1]["content"]), problems, episode)
    if text is not None:
        text = _without_tag(_without_end(text, prompts.tokenizer), source["prompt"], prompts.lead_in)
    return _Draft(source, text, problems)


def _split_episode(messages: Any, index: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    where = f"{WHERE}: row {index}"
    require_messages([{**message, "content": message.get("content") or ""} for message in messages], where)
    return split_conversation(messages, where)


def _episode_in(template: str, columns: Row) -> list[dict[str, Any]] | None:
    """Return the messages of an episode where the template is one column that holds them."""
    value = columns.get(template[1:-1]) if template == f"{{{template[1:-1]}}}" else None
    return value if isinstance(value, list) and is_episode(value) else None


def _rendered(recipe: Recipe, template: str, columns: Row, index: int) -> Row:
    data = recipe.data
    _require_columns(template, columns, index, "warmup.prompt", _PROMPT_COLUMNS)
    gold = (recipe.warmup and recipe.warmup.answer) or data.answer
    answer = gold if gold in columns else None
    data = data.model_copy(update={"prompt": template, "answer": answer})
    return render_row(data, columns, WHERE, index, "warmup.prompt")


def _completion(template: str, columns: Row, index: int) -> str | None:
    """Return the text of a completion without its end, or None where a column that it takes is null."""
    column = template[1:-1]
    messages = columns.get(column) if template == f"{{{column}}}" else None
    if isinstance(messages, list | dict):
        if not isinstance(messages, list) or len(messages) != 1:
            raise DataError(
                f"{WHERE}: row {index} has {str(messages)[:SHOWN_CHARACTERS]} in the column {column!r}. Allowed: "
                "text, or a list with one assistant message. Set warmup.completion to a template over the columns."
            )
        return _assistant_text(messages[0], index)
    names = _require_columns(template, columns, index, "warmup.completion", _COMPLETION_COLUMNS)
    if any(columns[name] is None for name in names):
        return None
    return fill(template, columns, "warmup.completion")


def _require_columns(template: str, columns: Row, index: int, key: str, likely: Sequence[str]) -> list[str]:
    """Return the columns that a template takes.

    Raises:
        DataError: the row has not all of them; the message shows a template over those that it has.
    """
    names = [column_of(field) for field in fields_of(template, key)]
    missing = next((name for name in names if name not in columns), None)
    if missing is None:
        return names
    best = next((name for word in likely for name in columns if word in str(name).lower()), next(iter(columns), "text"))
    raise DataError(
        f"{WHERE}: row {index} has no column {missing!r}. It has: {', '.join(map(str, columns))}. "
        f"Set {key} to a template over them, for example '{{{best}}}'."
    )


def _split(messages: Any, index: int) -> tuple[list[dict[str, Any]], str | None]:
    """Split a conversation into the prompt and the text of its last message."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(
            f"{WHERE}: row {index} has {str(messages)[:SHOWN_CHARACTERS]} in the column 'messages'. Allowed: a list of "
            "chat messages, the last one the assistant's and at least one before it."
        )
    require_messages(messages, f"{WHERE}: row {index}")
    return messages[:-1], _assistant_text(messages[-1], index)


def _assistant_text(message: Any, index: int) -> str | None:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or message.get("role") != "assistant":
        raise DataError(
            f"{WHERE}: row {index} has {str(message)[:SHOWN_CHARACTERS]} where the completion is expected. Allowed: a "
            "message with the role 'assistant'. Set warmup.completion to a template over the columns."
        )
    if apart := next((name for name in _REASONING if message.get(name)), None):
        raise DataError(
            f"{WHERE}: row {index} has the assistant's reasoning under {apart!r}, apart from its content. Join them by "
            f"templates, such as warmup.completion='<think>{{messages[1][{apart}]}}</think>{{messages[1][content]}}' "
            "and warmup.prompt='{messages[0][content]}'."
        )
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return None if content is None else str(content)


def _without_end(text: str, tokenizer: Any) -> str:
    """Return a completion without the end token's text at its end."""
    end = str(tokenizer.eos_token or "")
    while end and text.rstrip().endswith(end):
        text = text.rstrip().removesuffix(end)
    return text


def _without_tag(text: str, prompt: Any, lead_in: str) -> str:
    """Return a completion without the opening tag that ends its prompt, and without the same gap behind it."""
    end = prompt if isinstance(prompt, str) else lead_in
    tag = opened_tag(end)
    if tag is None or not text.lstrip().startswith(f"<{tag}>"):
        return text
    return text.lstrip().removeprefix(f"<{tag}>").removeprefix(end[end.rindex(">") + 1 :])


def _note_on_unclosed(drafts: Sequence[_Draft], lead_in: str) -> Iterator[str]:
    """Yield a note where the prompt opens a tag that completions never close: their answer stands in the thoughts."""
    tags = [
        (opened_tag(d.source["prompt"] if isinstance(d.source["prompt"], str) else lead_in), d.text) for d in drafts
    ]
    if unclosed := sum(tag is not None and f"</{tag}>" not in (text or "") for tag, text in tags):
        tag = next(tag for tag, _ in tags if tag)
        yield f"{unclosed} of {len(drafts)} completions never close the <{tag}> that their prompt opens."


def earning(recipe: Recipe, prompts: Prompts, traces: Traces) -> dict[str, Any] | None:
    """Score the first `TRIED_ROWS` completions by the recipe's own rewards.

    Args:
        recipe: whose rewards are asked.
        prompts: its prompts, for the tokenizer and what completions continue.
        traces: of the warm-up.

    Returns:
        `tried`, `zero` (of them earn nothing), `mean` and `top` (what the rewards pay at most) of the weighted sum, and
        `example`, a completion that earns nothing, or None. None instead of all where the rows lack a column that a
        reward needs, none has a usable gold, or the recipe has no reward but an environment's.
    """
    if not recipe.rewards:
        return None
    traces = Traces(traces.rows[:TRIED_ROWS], [], traces.sources[:TRIED_ROWS])
    try:
        functions, weights, scores = _scores(recipe, prompts, traces)
    except RewardError as error:
        logger.info("the traces are not tried by the rewards: %s", error)
        return None
    texts = _seen_by_rewards(prompts, traces)
    totals = weighted_scores(scores, weights)
    known = [(total, text) for total, text in zip(totals, texts, strict=True) if total is not None]
    if not known:
        return None
    worthless = [text for total, text in known if total <= 0]
    return {
        "tried": len(known),
        "zero": len(worthless),
        "mean": statistics.fmean(total for total, _ in known),
        "top": highest_sum(functions, weights, scores),
        "example": worthless[0][:SHOWN_CHARACTERS] if worthless else None,
    }


def earning_lines(earned: dict[str, Any] | None, traces: Traces) -> Iterator[str]:
    """Yield what `earning` found, for people."""
    if earned is None:
        columns = ", ".join(columns_of(traces.sources[:TRIED_ROWS])) or "none"
        yield (
            "the rewards cannot be tried on the traces: a reward needs a column that their rows lack "
            f"(they have: {columns}), no gold is usable, or only the environment pays"
        )
        return
    pay = f"{earned['mean']:.3g} on average" + (f" of at most {earned['top']:g}" if earned["top"] is not None else "")
    if not earned["zero"]:
        yield f"the traces earn {pay} ({earned['tried']} tried)"
        return
    yield (
        f"your traces do not earn your reward: {earned['zero']} of {earned['tried']} earn nothing ({pay}), for example "
        f"{json.dumps(earned['example'], ensure_ascii=False)}"
    )
