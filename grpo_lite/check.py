"""check_recipe: what a recipe would train on, shown before any training; needs the tokenizer, not the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from grpo_lite.data import Prompts, load_prompts, prompt_ids, prompt_text
from grpo_lite.errors import DataError
from grpo_lite.generators import Row
from grpo_lite.model import load_tokenizer
from grpo_lite.recipe import Recipe
from grpo_lite.reward_loader import load_rewards

GOLD_ROWS = 64
_OPENED = re.compile(r"<(\w+)>\s*\Z")


def check_recipe(recipe: Recipe, previews: int = 3) -> Iterator[str]:
    """Yield lines: rendered prompts, prompt lengths, and what the gold answers earn.

    Raises:
        GRPOLiteError: the data, the tokenizer or a reward is at fault.
    """
    tokenizer = load_tokenizer(recipe)
    prompts = load_prompts(recipe, tokenizer)
    yield f"{recipe.name}: valid. {len(prompts.train)} training prompts, {len(prompts.eval)} held out."
    yield from prompts.notes
    kwargs = recipe.grpo.get("chat_template_kwargs")
    for row in prompts.train[:previews]:
        yield ""
        yield f"prompt: {prompt_text(row['prompt'], tokenizer, kwargs)}"
        yield f"answer: {json.dumps(row.get('answer'), ensure_ascii=False, default=str)}"
    if opened := _OPENED.search(prompts.lead_in):
        yield f"the chat template opens <{opened[1]}>, so completions begin inside it and the rewards are told"
    yield ""
    yield prompt_lengths(recipe, tokenizer, prompts)
    yield from gold_rewards(recipe, prompts)


def prompt_lengths(recipe: Recipe, tokenizer: Any, prompts: Prompts, most: int = 2000) -> str:
    """Return one line of prompt-length percentiles, in tokens, over at most `most` training prompts."""
    kwargs = recipe.grpo.get("chat_template_kwargs")
    lengths = sorted(len(prompt_ids(row["prompt"], tokenizer, kwargs)) for row in prompts.train[:most])
    shown = ", ".join(f"p{p} {_percentile(lengths, p)}" for p in (50, 90, 99))
    of = f" (first {most})" if len(prompts.train) > most else ""
    return f"prompt tokens{of}: {shown}, longest {lengths[-1]}; completions up to {recipe.max_completion_length}"


def _percentile(ordered: Sequence[int], percent: int) -> int:
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def gold_rewards(recipe: Recipe, prompts: Prompts) -> Iterator[str]:
    """Yield, per reward, the mean over gold completions of the first training rows."""
    rows = prompts.train[:GOLD_ROWS]
    columns = sorted({key for row in rows for key in row if key != "prompt"})
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
        paid = [score for score in scores if score is not None]
        none = f", {len(scores) - len(paid)} unusable" if len(paid) < len(scores) else ""
        mean = sum(paid) / len(paid) if paid else float("nan")
        yield f"rewards[{i}] {function.__name__}: gold completions earn {mean:.3f} on average ({len(rows)} rows{none})"


def gold_completion(recipe: Recipe, row: Row, lead_in: str = "") -> str:
    """Return what a perfect completion of a row looks like, by the recipe's `data.gold_completion`.

    Where the chat template has opened the thinking already (`lead_in`), it begins inside: without the opening tag, or
    with a line of thinking and the closing tag if `data.gold_completion` shows none.

    Raises:
        DataError: the template names a column that is not there.
    """
    from rewards.extraction import extract_answer

    answer = str("" if row.get("answer") is None else row["answer"])
    final = extract_answer(answer, ("hash", "boxed")) or answer.strip()
    try:
        text = recipe.data.gold_completion.format_map({**row, "gold": final})
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"data.gold_completion: {recipe.data.gold_completion!r} does not fit the rows ({error}). "
            f"Columns: {', '.join(row)}, gold."
        ) from None
    opened = _OPENED.search(lead_in)
    if opened is None:
        return text
    opening, closing = f"<{opened[1]}>", f"</{opened[1]}>"
    if text.lstrip().startswith(opening):
        return text.lstrip().removeprefix(opening)
    return text if closing in text else f"working\n{closing}\n{text}"
