"""What did training unlearn? Tasks of lm-evaluation-harness on base, trained and merged model, row by row.

Base and trained are one model in memory, its adapter disabled and enabled; the merged model is loaded after them. Each
row of a task is compared with itself, so the interval is that of a paired difference. The result lies in the run's
`evaluation/lm_eval.json`; report, model card and end lines quote its sentences. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_lite.commands import either
from grpo_lite.engine.out_of_memory import free_memory, is_out_of_memory
from grpo_lite.errors import EvaluationError
from grpo_lite.evaluation.evaluate import load_saved
from grpo_lite.evaluation.statistics import PairedDifference, mcnemar_exact, paired_bootstrap, verdict
from grpo_lite.files.atomic import write_atomic
from grpo_lite.files.hub import hub_unreachable, only_cache_if_unreachable
from grpo_lite.files.records import read_json_lines
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_tokenizer, load_trained
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show
from grpo_lite.units import now

Key = tuple[str, str, str]  # task, filter that reads its answers, metric
Scores = dict[Key, dict[int, float]]  # the score of each row, by the row's number
LABELS = {"significant gain": "better", "significant loss": "unlearned", "no significant gain": "no clear change"}
TURNED = {"significant gain": "significant loss", "significant loss": "significant gain"}  # where lower is better


def evaluate_tasks(run: RunDir, names: Sequence[str], limit: int | None, show: Show) -> list[dict[str, Any]]:
    """Score tasks on a run's models, and write `evaluation/lm_eval.json` and the rows' scores, `lm_eval.jsonl`.

    Results of other tasks stay in lm_eval.json, as long as the run has not trained further.

    Args:
        run: a trained run.
        names: of the harness's tasks, groups or tags, or paths of a task's YAML.
        limit: rows of each task, the first ones; None: all.
        show: gets progress lines.

    Returns:
        One entry a task and filter: `task`, `filter`, `metric`, its mean by column, `difference`, `label`, `sentence`;
        `merged_difference` where there is a merged model.

    Raises:
        EvaluationError: the extra is missing, a task is unknown, not reachable or unsafe, or nothing can be compared.
    """
    require_harness()
    recipe = run.load_recipe()
    tasks = load_tasks(names, show)
    base = Base.resolve(recipe.model)
    tokenizer = load_tokenizer(base)
    model = load_trained(base, recipe.rollout, run.adapter)
    columns: dict[str, Scores] = {}
    for column in ("base", "trained"):
        with model.disable_adapter() if column == "base" else contextlib.nullcontext():
            columns[column] = _score(model, tokenizer, recipe, tasks, limit, show, column)
    if run.merged.is_dir():
        del model
        free_memory()
        columns["merged"] = _score(load_saved(run.merged), tokenizer, recipe, tasks, limit, show, "merged")
    entries = compare_tasks(columns, _lower_is_better(tasks), recipe.seed)
    _write(run, columns, [{**entry, "limit": limit, "measured_at": now()} for entry in entries])
    return entries


def require_harness() -> None:
    """Raise EvaluationError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        command = either('make eval RUN=… ARGS="--lm-eval …"', "pip install 'grpo-lite[lm-eval]'")
        raise EvaluationError(f"eval --lm-eval: lm-evaluation-harness is not installed here. Add it: {command}")


def load_tasks(names: Sequence[str], show: Show) -> dict[str, Any]:
    """Return the harness's tasks by name, their data loaded.

    No code of a data set is run: datasets 4 and later have no loading scripts. Neither is code that a model writes.

    Raises:
        EvaluationError: a name is unknown, the data are not reachable, or the task would run a model's code.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from lm_eval.tasks import TaskManager

    shipped = [name for name in names if not Path(name).is_file()]
    manager = TaskManager(include_defaults=bool(shipped))
    for name in shipped:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else " `lm-eval ls tasks` lists them."
            raise EvaluationError(f"eval --lm-eval: {name!r} is no task of lm-evaluation-harness, and no file.{hint}")
    tasks: dict[str, Any] = {}
    for name in names:
        show(f"lm-eval: loading {name}")
        try:
            with only_cache_if_unreachable():
                tasks |= manager.load([name])["tasks"]
        except DatasetNotFoundError as error:
            raise EvaluationError(f"eval --lm-eval: {name}: its data were not found, or are gated: {error}") from None
        except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError, FileNotFoundError) as error:
            message = hub_unreachable("eval --lm-eval", f"the data of {name}", error)
            raise EvaluationError(f"{message} in a task of your own (a YAML file).") from None
    if unsafe := [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise EvaluationError(
            f"eval --lm-eval: {', '.join(unsafe)}: runs code that the model writes, outside our sandbox. That is "
            "not done here. Code is scored by a recipe with rewards.unit_test_reward (docs/sandbox.md)."
        )
    return tasks


def compare_tasks(
    columns: Mapping[str, Scores], lower_is_better: Collection[tuple[str, str]], seed: int
) -> list[dict[str, Any]]:
    """Compare each task's scores of base and trained (and of base and merged), paired by row.

    Args:
        columns: the scores of `base`, `trained` and perhaps `merged`.
        lower_is_better: the metrics that count errors, each as task and metric.
        seed: of the bootstrap.

    Raises:
        EvaluationError: no task gives a number for each row.
    """
    entries = []
    for key in columns["base"]:
        rows = sorted(set.intersection(*(set(scores.get(key, {})) for scores in columns.values())))
        if not rows:
            continue
        values = {column: [scores[key][row] for row in rows] for column, scores in columns.items()}
        lower = (key[0], key[2]) in lower_is_better
        difference, label = _change(values["base"], values["trained"], lower, seed)
        entry: dict[str, Any] = dict(zip(("task", "filter", "metric"), key, strict=True))
        entry |= {column: sum(scores) / len(scores) for column, scores in values.items()}
        entry |= {"difference": dataclasses.asdict(difference), "label": label}
        if "merged" in values:
            of_merged, merged_label = _change(values["base"], values["merged"], lower, seed)
            entry |= {"merged_difference": dataclasses.asdict(of_merged), "merged_label": merged_label}
        entries.append({**entry, "sentence": _sentence(entry)})
    if not entries:
        raise EvaluationError("eval --lm-eval: these tasks give no number for each row, so nothing can be paired.")
    return entries


def _change(before: list[float], after: list[float], lower: bool, seed: int) -> tuple[PairedDifference, str]:
    """Return the paired difference and what it means: better, unlearned or no clear change."""
    difference = paired_bootstrap(before, after, seed=seed)
    right_or_wrong = {*before, *after} <= {0.0, 1.0}
    label = verdict(difference, mcnemar_exact(before, after) if right_or_wrong else None).label
    return difference, LABELS[TURNED.get(label, label) if lower else label]


def _sentence(entry: Mapping[str, Any]) -> str:
    d, what = entry["difference"], entry["metric"]
    if entry["filter"] != "none":
        what += f", {entry['filter']}"
    means = " → ".join(f"{entry[column]:.3f}" for column in ("base", "trained"))
    rows = "1 row" if d["n"] == 1 else f"{d['n']} rows"
    text = (
        f"{entry['task']} ({what}): {means} ({d['difference']:+z.3f}, {d['confidence']:.0%} interval {d['low']:+z.3f} "
        f"to {d['high']:+z.3f}, {rows}): {entry['label']}"
    )
    if "merged" in entry:
        d = entry["merged_difference"]
        text += f"; merged {entry['merged']:.3f} ({d['low']:+z.3f} to {d['high']:+z.3f}): {entry['merged_label']}"
    return f"{text}."


def _score(
    model: Any, tokenizer: Any, recipe: Recipe, tasks: dict[str, Any], limit: int | None, show: Show, column: str
) -> Scores:
    """Return every row's score of each task, with half as many rows at once after running out of memory."""
    rows = recipe.eval.batch_size
    while True:
        show(f"lm-eval: {column} on {', '.join(tasks)}")
        try:
            return _scores_of(_samples(model, tokenizer, recipe, tasks, limit, rows))
        except RuntimeError as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
        rows //= 2
        free_memory()
        show(f"lm-eval: out of memory; {column} again, {rows} rows at once")


def _samples(
    model: Any, tokenizer: Any, recipe: Recipe, tasks: dict[str, Any], limit: int | None, rows: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the harness's record of each row, by task."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    chat = recipe.data.format == "chat"
    harness = HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=rows, trust_remote_code=False,
        chat_template_args=dict(recipe.template_kwargs or {}),
    )  # fmt: skip
    result = simple_evaluate(
        model=harness, tasks=list(tasks.values()), task_manager=TaskManager(include_defaults=False), limit=limit,
        bootstrap_iters=0, apply_chat_template=chat, log_samples=True,
    )  # fmt: skip
    return dict(result["samples"])


def _scores_of(samples: Mapping[str, list[dict[str, Any]]]) -> Scores:
    """Return the score of each row by task, filter and the task's first metric that gives each row a number.

    Metrics of a whole corpus, as BLEU and perplexity, have none.
    """
    scores: Scores = {}
    for task, rows in samples.items():
        for name in dict.fromkeys(row["filter"] for row in rows):
            read = [row for row in rows if row["filter"] == name]
            for metric in read[0]["metrics"]:
                values = [_number(row.get(metric)) for row in read]
                if None not in values:
                    ids = (int(row["doc_id"]) for row in read)
                    scores[task, name, metric] = {i: v for i, v in zip(ids, values, strict=True) if v is not None}
                    break
    return scores


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _lower_is_better(tasks: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Return the metrics that count errors, each as task and metric."""
    return {
        (name, metric)
        for name, task in tasks.items()
        for metric, higher in (task.higher_is_better() or {}).items()
        if higher is False
    }


def _write(run: RunDir, columns: Mapping[str, Scores], entries: list[dict[str, Any]]) -> None:
    """Write the entries and the rows' scores; those of other tasks stay."""
    new = {(entry["task"], entry["filter"]) for entry in entries}
    kept = [entry for entry in run.read_tasks() if (entry["task"], entry["filter"]) not in new]
    rows_file = run.evaluation / "lm_eval.jsonl"
    names = {(entry["task"], entry["filter"]) for entry in kept}
    rows = [row for row in read_json_lines(rows_file) if (row.get("task"), row.get("filter")) in names]
    for key, by_row in columns["base"].items():
        what = dict(zip(("task", "filter", "metric"), key, strict=True))
        for row in by_row:
            values = {column: scores.get(key, {}).get(row) for column, scores in columns.items()}
            rows.append({**what, "row": row, **values})
    record = {
        "steps": run.read_run().get("steps"),  # a run that trains further makes the results obsolete
        "lm_eval": importlib.metadata.version("lm_eval"),
        "tasks": [*kept, *entries],
    }
    run.evaluation.mkdir(exist_ok=True)
    write_atomic(rows_file, "".join(json.dumps(row) + "\n" for row in rows))
    write_atomic(run.tasks_file, json.dumps(record, indent=2) + "\n")
