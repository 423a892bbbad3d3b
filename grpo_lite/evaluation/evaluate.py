"""Evaluate a run's models on the same held-out prompts, leniently and strictly: base, warm (after a warm-up), trained.

They are one model in memory: the base with its adapter disabled, with the warm-up's adapter, with the trained one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_lite.commands import UNKNOWN, hint
from grpo_lite.engine.generate import generate_completions
from grpo_lite.engine.out_of_memory import is_out_of_memory
from grpo_lite.errors import EvaluationError, MemoryBudgetError, ModelError
from grpo_lite.evaluation.episodes import episode_means, score_episodes
from grpo_lite.evaluation.scoring import right_of_each, score_completions, second_opinions
from grpo_lite.evaluation.statistics import mcnemar_exact, mean_pass_at_k, paired_bootstrap, verdict, wilson_interval
from grpo_lite.files.atomic import write_atomic
from grpo_lite.memory.fit import rows_that_fit
from grpo_lite.models.adapter import other_weights, read_sealed
from grpo_lite.models.base import Base, weights_bytes
from grpo_lite.models.device import detect_device
from grpo_lite.models.load import load_merged, load_tokenizer, load_trained
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.provenance import show_changes
from grpo_lite.runs.run_dir import SCORE_COLUMNS, RunDir
from grpo_lite.screen import Show, progress_lines
from grpo_lite.task.episodes import Player, make_player
from grpo_lite.task.generators import Row
from grpo_lite.task.prompts import Prompts, load_prompts
from grpo_lite.task.tokens import prompt_ids
from grpo_lite.units import now, size

# What each stage of a run with a warm-up changes: from which column to which, and how its verdict begins.
STAGES = {"warmup": ("base", "warm", "Warm-up (SFT)"), "grpo": ("warm", "trained", "GRPO alone")}
Columns = dict[str, list[Row]]  # records of the same rows, by column
# Saved models by their keys in metrics.json: what a change from the trained model comes from.
SAVED = {"merged": "The merge", "merged_nf4": "The export in 4 bits"}


def evaluate_run(run: RunDir, show: Show, model: Any = None, prompts: Prompts | None = None) -> dict[str, Any]:
    """Score the models of a run, and write metrics.json, evaluation/records.jsonl and, for `eval.also`, also.jsonl.

    Args:
        run: a trained run.
        show: gets progress lines.
        model: the trained PeftModel, if it is still in memory; otherwise base and adapter are loaded.
        prompts: the run's prompts, if already loaded.

    Returns:
        What metrics.json holds.

    Raises:
        EvaluationError: evaluation is switched off, or no held-out answer is usable.
        ModelError: the warm-up's adapter is damaged.
    """
    recipe = run.load_recipe()
    if not recipe.eval.enabled:
        raise EvaluationError(f"{run.recipe_file}: eval.enabled is false, so there is nothing to evaluate.")
    warm = _warm_weights(run, recipe)
    if prompts is None:
        show_changes(run, recipe, show)
    if model is None or prompts is None:
        base = Base.resolve(recipe.model)
        prompts = prompts or load_prompts(recipe, load_tokenizer(base))
        model = load_trained(base, recipe.rollout, run.adapter) if model is None else model
    rows, player = prompts.eval[: recipe.eval.limit], make_player(prompts, recipe, show)
    records: Columns = {}
    also: dict[str, Columns] = {name: {} for name in prompts.also}
    for name in SCORE_COLUMNS if warm else ("base", "trained"):
        with _column(model, name, warm):
            records[name] = score_model(model, prompts.tokenizer, recipe, rows, show, name, player)
            for further, its_rows in prompts.also.items():
                what = f"{name} on {further}"
                also[further][name] = score_model(
                    model, prompts.tokenizer, greedy_only(recipe), its_rows, show, what, player
                )
    cause = _cause(run, recipe)
    result = compare(recipe, records, cause)
    if also:
        result["also"] = {name: compare(greedy_only(recipe), columns, cause, name) for name, columns in also.items()}
    run.evaluation.mkdir(exist_ok=True)
    _write_records(run.evaluation / "records.jsonl", _lines(rows, records))
    if also:
        lines = (line for name, columns in also.items() for line in _lines(prompts.also[name], columns, set=name))
        _write_records(run.evaluation / "also.jsonl", lines)
    if lost := run.read_scores().get("merged_onto_original"):  # of a merge that was not kept: it cannot be scored again
        result["merged_onto_original"] = lost
    run.write_scores(result)
    return result


def _warm_weights(run: RunDir, recipe: Recipe) -> dict[str, Any] | None:
    """Return the weights that GRPO started from, or None where there was no warm-up or it is not complete."""
    if recipe.warmup is None or not run.warm_adapter.is_dir():
        return None
    try:
        return read_sealed(run.warm_adapter)
    except ModelError as error:
        raise ModelError(
            f"{error}. It is the warm-up's, which is scored between base and trained. Restore the folder, or remove "
            "it: base and trained are then scored alone, and GRPO's own share stays unknown."
        ) from None


@contextlib.contextmanager
def _column(model: Any, name: str, warm: Mapping[str, Any] | None) -> Iterator[None]:
    """Let the model be the one that a column is about."""
    with contextlib.ExitStack() as stack:
        if name == "base":
            stack.enter_context(model.disable_adapter())
        elif name == "warm" and warm:
            stack.enter_context(other_weights(model, warm))
        yield


def _cause(run: RunDir, recipe: Recipe) -> str:
    """Return what made the trained model of the base, for its verdict; empty where it was GRPO alone."""
    if recipe.warmup is None:
        return ""
    complete = run.warm_adapter.is_dir() or run.read_warmup().get("done_at")
    return "Warm-up and GRPO together" if complete else "Warm-up (SFT), paused before its end, without GRPO"


def greedy_only(recipe: Recipe) -> Recipe:
    """Return the recipe without sampled completions in its evaluation."""
    return recipe.with_section("eval", samples=0)


def evaluate_merged(run: RunDir, show: Show, prompts: Prompts | None = None) -> dict[str, Any]:
    """Score the merged 16-bit model greedily on the held-out prompts, and add it to metrics.json (`merged`).

    An adapter that was trained on a 4-bit base and is merged onto the 16-bit one may score otherwise.
    """
    return evaluate_saved(run, show, prompts, run.merged, "merged")


def evaluate_saved(run: RunDir, show: Show, prompts: Prompts | None, folder: Path, name: str) -> dict[str, Any]:
    """Score a saved model greedily on a run's held-out prompts.

    Args:
        run: a run whose base and trained model are scored already.
        show: gets progress lines.
        prompts: the run's prompts, if already loaded.
        folder: of the model that transformers loads, 16-bit or quantised.
        name: the key in metrics.json that gets the lenient and strict rates, and how the lenient one differs from the
            trained model's (`change`).

    Returns:
        What metrics.json holds.

    Raises:
        MemoryBudgetError: the model does not fit the device.
        EvaluationError: no row could be judged.
    """
    recipe = run.load_recipe()
    prompts = prompts or load_prompts(recipe, load_tokenizer(Base.resolve(recipe.model)))
    tokenizer, rows = prompts.tokenizer, prompts.eval[: recipe.eval.limit]
    model = load_saved(folder)
    player = make_player(prompts, recipe, show)
    records = score_model(model, tokenizer, greedy_only(recipe), rows, show, name, player)
    usable = [record for record in records if record["lenient"] is not None]
    if not usable:
        raise EvaluationError(f"{folder}: none of its {len(records)} held-out rows could be judged")
    rates = {
        kind: dataclasses.asdict(wilson_interval(sum(bool(r[kind]) for r in usable), len(usable)))
        for kind in ("lenient", "strict")
    }
    result = {**run.read_scores(), name: {**rates, **_against_trained(run, records, recipe.seed, name)}}
    run.write_scores(result)
    return result


def _against_trained(run: RunDir, records: list[Row], seed: int, name: str) -> dict[str, Any]:
    """Return the paired change from the trained model to a saved one; nothing where their rows are not the same."""
    file = run.evaluation / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    trained = [json.loads(line)["trained"]["lenient"] for line in lines]
    if len(trained) != len(records):
        return {}
    pairs = [(a, r["lenient"]) for a, r in zip(trained, records, strict=True) if None not in (a, r["lenient"])]
    before, after = ([bool(pair[side]) for pair in pairs] for side in (0, 1))
    return {"change": _change(before, after, seed, "held-out lenient score", SAVED[name])} if pairs else {}


def load_saved(folder: Path) -> Any:
    """Return a saved model for evaluation.

    Raises:
        MemoryBudgetError: it does not fit the device.
    """
    device = detect_device()
    try:
        return load_merged(folder, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    raise MemoryBudgetError(
        f"{folder}: {size(weights_bytes(folder))} of weights do not fit into the free memory of {device.name}. The "
        f"files are complete; score them on a larger GPU: {hint('eval', run=UNKNOWN)}"
    )


def score_model(
    model: Any, tokenizer: Any, recipe: Recipe, rows: list[Row], show: Show, name: str, player: Player | None = None
) -> list[Row]:
    """Generate greedy and sampled completions for held-out rows and score them.

    Args:
        player: plays the episodes of a recipe with tools; None: completions are single answers.

    Returns:
        One record per row: `completion` (greedy) and whether the cap cut it off (`truncated`); `lenient`, `strict` and,
        where the first reward states a second opinion, `honest` (bool, None without a usable gold); `samples_right`,
        how many of `eval.samples` sampled completions are leniently right. Of an episode also `prompt` and `turns`
        (messages), `calls` and `failed_calls`, and `fault` where its `get_reward` failed, so that it is not right.

    Raises:
        RewardError: a reward fails; `get_reward` only where it fails in every episode.
    """
    if player is not None:
        return score_episodes(model, tokenizer, recipe, rows, show, name, player)
    section = recipe.eval
    ids = [prompt_ids(row["prompt"], tokenizer, recipe.template_kwargs) for row in rows]
    fit = rows_that_fit if recipe.memory.fit else None
    shared: dict[str, Any] = {
        "max_new_tokens": recipe.eval_completion_length,
        "batch_size": section.batch_size,
        "rows_that_fit": fit,
    }

    def progress(kind: str) -> Callable[[int, int], None]:
        return progress_lines(show, f"evaluating {name}, {kind}")

    greedy = generate_completions(model, tokenizer, ids, progress=progress("greedy"), **shared)
    lenient, strict = score_completions(tokenizer, recipe, rows, [c[0] for c in greedy])
    records: list[Row] = [
        {
            "completion": tokenizer.decode(c[0], skip_special_tokens=True), "lenient": loose, "strict": tight,
            "truncated": len(c[0]) >= recipe.eval_completion_length,
        }
        for c, loose, tight in zip(greedy, lenient, strict, strict=True)
    ]  # fmt: skip
    opinions = second_opinions(tokenizer, recipe, rows, [c[0] for c in greedy])
    for record, opinion in zip(records, opinions or [], strict=False):
        record["honest"] = None if record["lenient"] is None else opinion
    if section.samples:
        sampled = generate_completions(
            model, tokenizer, ids, samples=section.samples, temperature=section.temperature, seed=recipe.seed,
            progress=progress(f"{section.samples} samples"), **shared,
        )  # fmt: skip
        repeated = [row for row in rows for _ in range(section.samples)]
        right, _ = score_completions(tokenizer, recipe, repeated, [c for group in sampled for c in group])
        for record, count in zip(records, right_of_each(right, section.samples), strict=True):
            record["samples_right"] = count
    return records


def compare(recipe: Recipe, columns: Columns, cause: str = "", on: str | None = None) -> dict[str, Any]:
    """Compare paired records: rates with Wilson intervals, paired bootstrap, McNemar, pass@k and a verdict.

    Args:
        recipe: says how many samples were drawn, and seeds the bootstrap.
        columns: one record a row, as `score_model` returns them, of `base` and `trained`; `warm` adds the comparisons
            base -> warm (`warmup`) and warm -> trained (`grpo`).
        cause: what the change from base to trained comes from, where that was not GRPO alone.
        on: name of the set that the rows are of; None: the held-out rows.

    Raises:
        EvaluationError: no record has a usable gold.
    """
    base = columns["base"]
    usable = [i for i in range(len(base)) if all(rows[i]["lenient"] is not None for rows in columns.values())]
    if not usable:
        where = f"eval{f'.also.{on}' if on else ''}"
        raise EvaluationError(
            f"{where}: no held-out row has a usable gold answer. Check data.answer and eval.lenient."
            if "turns" not in base[0]
            else f"{where}: no episode on a held-out row could be judged: `reset` failed, or no score is given. The "
            f"first failures are shown above; {hint('check-env')} plays the environment without a model."
        )
    result: dict[str, Any] = {"n": len(usable), "unusable_golds": len(base) - len(usable), "measured_at": now()}
    if "truncated" in base[0]:
        result["truncated"] = {name: _share(row["truncated"] for row in rows) for name, rows in columns.items()}
    if "turns" in base[0]:
        result["episodes"] = {name: episode_means([rows[i] for i in usable]) for name, rows in columns.items()}
    for kind in ("lenient", "strict", *(["honest"] if "honest" in base[usable[0]] else [])):
        right = {name: [bool(records[i][kind]) for i in usable] for name, records in columns.items()}
        score = f"{kind} score on {on}" if on else f"held-out {kind} score"
        result[kind] = {
            **{name: dataclasses.asdict(wilson_interval(sum(r), len(r))) for name, r in right.items()},
            **_change(right["base"], right["trained"], recipe.seed, score, cause),
        }
        for stage, (before, after, name) in STAGES.items() if "warm" in columns else ():
            result[kind][stage] = _change(right[before], right[after], recipe.seed, score, name)
    samples = recipe.eval.samples
    # A sampled episode that could not be reset is neither right nor wrong, so its row is left out here.
    sampled = [i for i in usable if all(rows[i].get("samples_right") is not None for rows in columns.values())]
    if sampled and samples:
        result["pass_at_k"] = {
            f"pass@{k}": {
                name: mean_pass_at_k([records[i]["samples_right"] for i in sampled], samples, k)
                for name, records in columns.items()
            }
            for k in _powers_of_two(samples)
        }
    return result


def _change(before: list[bool], after: list[bool], seed: int, score: str, cause: str) -> dict[str, Any]:
    difference, test = paired_bootstrap(before, after, seed=seed), mcnemar_exact(before, after)
    return {
        "difference": dataclasses.asdict(difference),
        "mcnemar": dataclasses.asdict(test),
        "verdict": dataclasses.asdict(verdict(difference, test, score=score, cause=cause)),
    }


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)


def _powers_of_two(limit: int) -> list[int]:
    return sorted({1 << i for i in range(limit.bit_length()) if 1 << i <= limit} | {limit})


def _lines(rows: list[Row], records: Columns, **more: str) -> Iterator[str]:
    for i, row in enumerate(rows):
        columns = {name: dict(of_column[i]) for name, of_column in records.items()}
        played = [column.pop("prompt", row["prompt"]) for column in columns.values()]  # with what `reset` returned
        yield json.dumps({**row, **more, "prompt": played[0], **columns}, ensure_ascii=False, default=str)


def _write_records(path: Path, lines: Iterable[str]) -> None:
    write_atomic(path, "\n".join(lines) + "\n")
