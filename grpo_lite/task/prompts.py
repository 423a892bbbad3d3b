"""load_prompts: rows from the Hub, a file or a generator -> prompts for the trainer, train and held-out disjoint."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_lite.errors import DataError
from grpo_lite.files.hub import hub_unreachable, only_cache_if_unreachable
from grpo_lite.recipe.recipe import DataSection, Recipe, SourceSection
from grpo_lite.task.environments import Toolkit, load_toolkit, require_environment_columns, tool_template_kwargs
from grpo_lite.task.generators import Row, generate_rows
from grpo_lite.task.tokens import holds_special_tokens, prompt_ids, prompt_key, prompt_text, require_messages

_OPENED = re.compile(r"<([\w-]+)>\s*\Z")

_LONG_EPISODE = 4096  # tokens; with turns of 30 tokens more than a hundred of them


@dataclass(frozen=True)
class Prompts:
    """Rows ready for the trainer, and the tokenizer that reads them."""

    train: list[Row]  # `prompt` (chat messages or text), the gold under `answer`, and every other column
    eval: list[Row]
    notes: tuple[str, ...] = ()  # what was dropped and why, for people
    lead_in: str = ""  # what a completion continues: the end of a prompt, chat template applied
    tokenizer: Any = None
    template_kwargs: dict[str, Any] | None = None  # what the chat template gets besides the messages
    also: dict[str, list[Row]] = field(default_factory=dict)  # `eval.also`: further rows that are never trained on
    toolkit: Toolkit | None = None  # what the model may call

    @property
    def held_out(self) -> list[Row]:
        """All rows that are scored and never trained on."""
        return [*self.eval, *(row for rows in self.also.values() for row in rows)]

    def text(self, row: Row) -> str:
        """Return a row's prompt as the model sees it."""
        return prompt_text(row["prompt"], self.tokenizer, self.template_of(row))

    def ids(self, row: Row) -> list[int]:
        """Return a row's prompt as token ids."""
        observed = self.toolkit is not None and bool(self.toolkit.factories)
        return prompt_ids(row["prompt"], self.tokenizer, self.template_of(row), observed)

    def template_of(self, row: Row) -> dict[str, Any] | None:
        """Return what the chat template gets for a row: with tools also their schemas."""
        if self.toolkit is None:
            return self.template_kwargs
        return {**(self.template_kwargs or {}), "tools": self.toolkit.offered(row) or None}

    @cached_property
    def longest(self) -> list[int]:
        """Token ids of the longest training prompt among the first 5,000, the ones with most characters measured."""
        by_length = sorted(self.train[:5000], key=lambda row: -len(str(row["prompt"])))[:64]
        return max((self.ids(row) for row in by_length), key=len)

    @property
    def columns(self) -> list[str]:
        """Names of the columns that rewards get beside the prompt."""
        return columns_of(self.train)

    def proof_texts(self, count: int) -> list[str]:
        """Return prompts as the model sees them, to try an exported model on: held-out ones where there are any."""
        return [self.text(row) for row in (self.eval or self.train)[:count]]


def load_prompts(recipe: Recipe, tokenizer: Any = None) -> Prompts:
    """Load, split, render and check the recipe's rows.

    Args:
        recipe: whose `data` section says where rows come from.
        tokenizer: measures prompts for `max_prompt_tokens`; None: lengths are not checked.

    Raises:
        DataError: source missing or unreachable, a column missing, no rows, or held-out rows also trained on.
    """
    data = recipe.data
    toolkit = load_toolkit(recipe)
    template_kwargs = recipe.template_kwargs
    if toolkit is not None and tokenizer is not None:
        template_kwargs = tool_template_kwargs(template_kwargs, tokenizer, recipe.model.id)
    rows = read_rows(data.train, recipe.seed, "data.train")
    notes: list[str] = []
    if data.eval is not None:
        train, held_out = rows, read_rows(data.eval, recipe.seed + 1, "data.eval")
    else:
        train, held_out = _hold_out(rows, data.holdout, recipe.seed)
    train = [render_row(data, row, "data.train", i) for i, row in enumerate(train)]
    held_out = [render_row(data, row, "data.eval", i) for i, row in enumerate(held_out)]
    train, note = _without(train, held_out, recipe)
    notes += note
    if tokenizer is not None:
        marked = sum(holds_special_tokens(row["prompt"], tokenizer) for row in train)
        if marked:
            notes.append(f"{marked} prompts hold the text of a special token; it is read as text, not as markup")
    if tokenizer is not None and data.max_prompt_tokens is not None:
        train, note = _short_enough(train, recipe, tokenizer, "training")
        notes += note
        held_out, note = _short_enough(held_out, recipe, tokenizer, "held-out")
        notes += note
    also: dict[str, list[Row]] = {}
    if recipe.eval.enabled:
        also, of_also = _further(recipe, train, tokenizer)
        notes += of_also
    if not train:
        raise DataError("data.train: no rows are left to train on. " + " ".join(notes) + " Give more or shorter rows.")
    if recipe.eval.enabled and not held_out:
        raise DataError("data.eval: no held-out rows are left. " + " ".join(notes) + " Raise data.holdout.")
    if toolkit is not None:
        if recipe.grpo.get("max_tool_calling_iterations") is None and recipe.max_completion_length > _LONG_EPISODE:
            notes.append(
                f"turns are not limited: a model that only calls tools fills all {recipe.max_completion_length} tokens "
                "(set grpo.max_tool_calling_iterations)"
            )
        for name, rows in {"data.train": train, "data.eval": held_out if recipe.eval.enabled else [], **also}.items():
            require_environment_columns(toolkit, rows, name)
            require_environment_columns(toolkit, same_columns(rows), name)
    train, held_out = same_columns(train), same_columns(held_out)
    also = {name: same_columns(rows) for name, rows in also.items()}
    opening = lead_in(train, recipe, tokenizer)
    return Prompts(train, held_out, tuple(notes), opening, tokenizer, template_kwargs, also, toolkit)


def _further(recipe: Recipe, train: list[Row], tokenizer: Any) -> tuple[dict[str, list[Row]], list[str]]:
    """Return the rows of `eval.also` by name, without those that are also trained on, and what was dropped."""
    sets: dict[str, list[Row]] = {}
    notes: list[str] = []
    trained_on = {_key(row, recipe) for row in train}
    for number, (name, source) in enumerate(recipe.eval.also.items(), start=2):  # data.eval has the seed + 1
        where = f"eval.also.{name}"
        rows = [
            render_row(recipe.data, row, where, i)
            for i, row in enumerate(read_rows(source, recipe.seed + number, where))
        ]
        fresh = [row for row in rows if _key(row, recipe) not in trained_on]
        if len(fresh) < len(rows):
            notes.append(f"{len(rows) - len(fresh)} rows of {where} have a training prompt and were dropped.")
        if tokenizer is not None and recipe.data.max_prompt_tokens is not None:
            fresh, note = _short_enough(fresh, recipe, tokenizer, where)
            notes += note
        if not fresh:
            raise DataError(f"{where}: no rows are left. {' '.join(notes)} Give other rows, or remove the key.")
        sets[name] = fresh
    return sets, notes


def same_columns(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with every column of any of them, None where a row has none, as TRL's dataset gives them."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of the rows' columns that a reward gets, `prompt` and `completion` aside."""
    return sorted({key for row in rows for key in row if key not in ("prompt", "completion")})


def read_rows(source: SourceSection, seed: int, where: str) -> list[Row]:
    """Return the rows of one source.

    Raises:
        DataError: missing, unreadable, unreachable or empty.
    """
    if source.generator:
        rows = generate_rows(source.generator, source.kwargs, seed, where)
    elif source.path:
        rows = _read_file(Path(source.path).expanduser(), where)
    else:
        rows = _read_hub(source, where)
    rows = rows[: source.limit]
    if not rows:
        raise DataError(f"{where}: the source has no rows. Give a file or dataset with at least one.")
    return rows


def _read_file(path: Path, where: str) -> list[Row]:
    if re.match(r"\w[\w+.-]+:/", str(path)):
        raise DataError(f"{where}.path: {str(path)!r} is an address, and files are read from disks only. Download it.")
    if not path.is_file():
        raise DataError(f"{where}.path: {str(path)!r} is given, but there is no such file. Check the path.")
    try:
        if path.suffix == ".jsonl":
            return _read_jsonl(path, where)
        if path.suffix == ".json":
            loaded = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
                raise DataError(f"{where}.path: {path} must hold a list of objects, one a row.")
            for index, row in enumerate(loaded):
                _require_text(row, f"{where}.path: {path} row {index}")
            return loaded
        if path.suffix == ".csv":
            csv.field_size_limit(1 << 30)  # the module's own limit is 128 KiB, and prompts may be longer
            with path.open(encoding="utf-8-sig", newline="") as file:
                return [dict(row) for row in csv.DictReader(file)]
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_table(path).to_pylist())
    # JSON, Unicode and most Arrow errors are ValueErrors
    except (OSError, ValueError, RecursionError, csv.Error, NotImplementedError, LookupError, TypeError) as error:
        raise DataError(f"{where}.path: {path} cannot be read as {path.suffix}: {error}") from None
    raise DataError(f"{where}.path: {path.name} is given; allowed endings: .jsonl, .json, .csv, .parquet.")


def _read_jsonl(path: Path, where: str) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}.path: {path} line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}.path: {path} line {number} is {type(row).__name__}, not an object.")
            if "\\u" in line:
                _require_text(row, f"{where}.path: {path} line {number}")
            rows.append(row)
    return rows


def _require_text(row: Row, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON's escapes can write and no tokenizer can read."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where} holds {half} alone, half of a character. Write the whole one, or \\ufffd.") from None


def _read_hub(source: SourceSection, where: str) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name = "/".join(filter(None, (source.hub, source.data_dir))) + (f" ({source.config})" if source.config else "")
    split = f"{source.split}[:{source.limit}]" if source.limit and "[" not in source.split else source.split
    try:
        with only_cache_if_unreachable():
            dataset = datasets.load_dataset(
                source.hub, source.config, data_dir=source.data_dir, split=split, revision=source.revision
            )
    except DatasetNotFoundError as error:
        raise DataError(
            f"{where}.hub: the dataset {name} was not found on the Hub, or is gated or private: {error}. Check the "
            "spelling, accept its terms on its page, or log in with `hf auth login`."
        ) from None
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError, FileNotFoundError) as error:
        message = hub_unreachable(f"{where}.hub", f"the dataset {name}", error)
        raise DataError(f"{message} as {where}.path=my.jsonl.") from None
    except ValueError as error:  # unknown config or split; the message lists those that exist
        raise DataError(f"{where}: {name}, split {source.split!r}: {error}") from None
    return [dict(row) for row in dataset]


def _hold_out(rows: list[Row], holdout: float, seed: int) -> tuple[list[Row], list[Row]]:
    count = int(holdout) if holdout >= 1 else min(math.ceil(holdout * len(rows)), len(rows) - 1)
    if count >= len(rows):
        raise DataError(f"data.holdout: {count} is given, but there are only {len(rows)} rows. Hold out fewer.")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    indices = set(order[:count])
    return [row for i, row in enumerate(rows) if i not in indices], [rows[i] for i in order[:count]]


def render_row(data: DataSection, row: Row, where: str, index: int, key: str = "data.prompt") -> Row:
    """Return the row with its `prompt` rendered and its gold under `answer`; all other columns are kept.

    Args:
        data: holds the template of the prompt, and what stands around it.
        row: as it was read.
        where: the recipe key of the source, for messages.
        index: of the row in the source, for messages.
        key: the recipe key that the template comes from, for messages.

    Raises:
        DataError: a column that the template or `answer` names is missing.
    """
    columns = {name: value for name, value in row.items() if name is not None}
    column_names = fields_of(data.prompt, key) + ([data.answer] if data.answer else [])
    for name in column_names:
        if column_of(name) not in columns:
            raise DataError(
                f"{where}: row {index} has no column {name!r}. It has: {', '.join(map(str, columns))}. "
                f"Correct {key}{' or data.answer' if data.answer else ''}."
            )
        if name in columns and columns[name] is None and name != data.answer:
            raise DataError(f"{where}: row {index} has null in the column {name!r}, which {key} names. Fill it in.")
    passthrough = data.prompt == "{prompt}" and isinstance(row.get("prompt"), list)
    if passthrough:
        require_messages(row["prompt"], f"{where}: row {index}")
    if passthrough and data.format != "chat":
        raise DataError(f"{where}: row {index} has chat messages in the column prompt. Set data.format=chat.")
    question = "" if passthrough else fill(data.prompt, columns, key)
    out = {name: value for name, value in columns.items() if name not in ("prompt", "completion")}
    if data.answer:
        out["answer"] = columns[data.answer]
    out["prompt"] = _chat(data, row, question, passthrough) if data.format == "chat" else _text(data, question)
    return out


def fields_of(template: str, key: str) -> list[str]:
    """Return what a template names in braces, in order, such as `question` or `messages[0][content]`.

    Raises:
        DataError: it is no template; the message names the recipe's `key`.
    """
    try:
        return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise _no_template(template, error, key) from None


def column_of(field: str) -> str:
    """Return the column that a template's field begins at."""
    return field.split(".")[0].split("[")[0]


def fill(template: str, columns: Row, key: str) -> str:
    """Return a template with a row's columns filled in.

    Raises:
        DataError: it cannot be; the message names the recipe's `key`.
    """
    try:
        return template.format_map(columns)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _no_template(template, error, key) from None


def _no_template(template: str, error: Exception, key: str) -> DataError:
    return DataError(
        f"{key}: {template!r} cannot be filled in: {error}. Expected: text with columns in braces, such as "
        "'{question}='; double the braces that are meant as text ('{{' and '}}')."
    )


def _chat(data: DataSection, row: Row, question: str, passthrough: bool) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": data.system}] if data.system else []
    for example in data.examples:
        messages += [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
    return messages + (list(row["prompt"]) if passthrough else [{"role": "user", "content": question}])


def _text(data: DataSection, question: str) -> str:
    examples = "".join(f"{example.prompt}{example.answer}\n" for example in data.examples)
    return (f"{data.system}\n" if data.system else "") + examples + question


def _key(row: Row, recipe: Recipe) -> str:
    """Return what equal tasks have in common: the prompt; in an environment also all else that `reset` gets."""
    return prompt_key(row["prompt"]) if recipe.environment is None else json.dumps(row, sort_keys=True, default=str)


def _without(train: list[Row], held_out: list[Row], recipe: Recipe) -> tuple[list[Row], list[str]]:
    """Drop training rows whose prompt is also held out: disjoint by construction, and said."""
    forbidden = {_key(row, recipe) for row in held_out}
    disjoint = [row for row in train if _key(row, recipe) not in forbidden]
    dropped = len(train) - len(disjoint)
    what = "have a held-out prompt" if recipe.environment is None else "are also held out"
    return disjoint, [f"{dropped} training rows {what} and were dropped."] if dropped else []


def lead_in(rows: Sequence[Row], recipe: Recipe, tokenizer: Any) -> str:
    """Return what completions continue: the end of the first prompt as the model sees it, "" without a chat template.

    A template that opens `<think>` there leaves only the closing tag to the model; rewards must know
    (`rewards.format.ends_with_tag`). The rewards see text prompts themselves.
    """
    if tokenizer is None or not rows or isinstance(rows[0]["prompt"], str):
        return ""
    return prompt_text(rows[0]["prompt"], tokenizer, recipe.template_kwargs)[-200:]


def opened_tag(text: str) -> str | None:
    """Return the tag that a text ends with, such as `think` where the chat template opens `<think>` in the prompt."""
    opened = _OPENED.search(text)
    return opened[1] if opened else None


def _short_enough(rows: list[Row], recipe: Recipe, tokenizer: Any, which: str) -> tuple[list[Row], list[str]]:
    cap = recipe.data.max_prompt_tokens or 0
    short = [row for row in rows if len(prompt_ids(row["prompt"], tokenizer, recipe.template_kwargs)) <= cap]
    dropped = len(rows) - len(short)
    return short, [
        f"{dropped} of {len(rows)} {which} prompts are over {cap} tokens and were dropped."
    ] if dropped else []
