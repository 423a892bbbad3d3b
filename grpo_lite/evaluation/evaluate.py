"""Evaluate base (adapter disabled) and trained model on the same held-out prompts, leniently and strictly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_lite.engine.generate import generate_completions
from grpo_lite.engine.out_of_memory import is_out_of_memory
from grpo_lite.errors import EvaluationError, MemoryBudgetError
from grpo_lite.evaluation.statistics import mcnemar_exact, mean_pass_at_k, paired_bootstrap, verdict, wilson_interval
from grpo_lite.files.atomic import write_atomic
from grpo_lite.memory.fit import rows_that_fit
from grpo_lite.models.base import Base
from grpo_lite.models.device import detect_device
from grpo_lite.models.load import load_merged, load_tokenizer, load_trained
from grpo_lite.recipe.recipe import Recipe, RewardSection, ScoreSection
from grpo_lite.runs.provenance import tell_changes
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show, progress_lines
from grpo_lite.task.generators import Row
from grpo_lite.task.guard import limited
from grpo_lite.task.prompts import Prompts, columns_of, lead_in, load_prompts
from grpo_lite.task.rewards import Reward, import_function, load_function, load_second_opinion
from grpo_lite.task.tokens import prompt_ids
from grpo_lite.units import now, size


def evaluate_run(run: RunDir, show: Show, model: Any = None, prompts: Prompts | None = None) -> dict[str, Any]:
    """Score base and trained model of a run, and write metrics.json and evaluation/records.jsonl.

    Args:
        run: a trained run.
        show: gets progress lines.
        model: the trained PeftModel, if it is still in memory; otherwise base and adapter are loaded.
        prompts: the run's prompts, if already loaded.

    Returns:
        What metrics.json holds.

    Raises:
        EvaluationError: evaluation is switched off, or no held-out answer is usable.
    """
    recipe = run.load_recipe()
    if not recipe.eval.enabled:
        raise EvaluationError(f"{run.recipe_file}: eval.enabled is false, so there is nothing to evaluate.")
    if prompts is None:
        tell_changes(run, recipe, show)
    if model is None or prompts is None:
        base = Base.resolve(recipe.model)
        prompts = prompts or load_prompts(recipe, load_tokenizer(base))
        model = load_trained(base, recipe.rollout, run.adapter) if model is None else model
    tokenizer, rows = prompts.tokenizer, prompts.eval[: recipe.eval.limit]
    records: dict[str, list[Row]] = {}
    for name in ("base", "trained"):
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            records[name] = score_model(model, tokenizer, recipe, rows, show, name)
    result = compare(recipe, records["base"], records["trained"])
    run.evaluation.mkdir(exist_ok=True)
    _write_records(run.evaluation / "records.jsonl", rows, records)
    run.write_scores(result)
    return result


def evaluate_merged(run: RunDir, show: Show, prompts: Prompts | None = None) -> dict[str, Any]:
    """Score the merged 16-bit model greedily on the held-out prompts, and add it to metrics.json (`merged`).

    The adapter was trained on a 4-bit base and is merged into the 16-bit one, so the score may differ.
    """
    return evaluate_saved(run, show, prompts, run.merged, "merged")


def evaluate_saved(run: RunDir, show: Show, prompts: Prompts | None, folder: Path, name: str) -> dict[str, Any]:
    """Score a saved model greedily on a run's held-out prompts.

    Args:
        run: a run whose base and trained model are scored already.
        show: gets progress lines.
        prompts: the run's prompts, if already loaded.
        folder: of the model that transformers loads, 16-bit or quantised.
        name: the key in metrics.json that gets the lenient and strict rates.

    Returns:
        What metrics.json holds.

    Raises:
        MemoryBudgetError: the model does not fit the device.
    """
    recipe = run.load_recipe()
    prompts = prompts or load_prompts(recipe, load_tokenizer(Base.resolve(recipe.model)))
    tokenizer, rows = prompts.tokenizer, prompts.eval[: recipe.eval.limit]
    model = _load_saved(folder)
    greedy_only = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"samples": 0})})
    records = score_model(model, tokenizer, greedy_only, rows, show, name)
    usable = [record for record in records if record["lenient"] is not None]
    rates = {
        kind: dataclasses.asdict(wilson_interval(sum(bool(r[kind]) for r in usable), len(usable)))
        for kind in ("lenient", "strict")
    }
    result = {**run.read_scores(), name: rates}
    run.write_scores(result)
    return result


def _load_saved(folder: Path) -> Any:
    device = detect_device()
    try:
        return load_merged(folder, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    raise MemoryBudgetError(
        f"{folder}: {size(weights_bytes)} of weights do not fit into the free memory of {device.name}. The files are "
        "complete; score them on a larger GPU: grpo-lite eval."
    )


def score_model(model: Any, tokenizer: Any, recipe: Recipe, rows: list[Row], show: Show, name: str) -> list[Row]:
    """Generate greedy and sampled completions for held-out rows and score them.

    Returns:
        One record per row: `completion` (greedy); `lenient`, `strict` and, where the first reward states a second
        opinion, `honest` (bool, None without a usable gold); `samples_right`, how many of `eval.samples` sampled
        completions are leniently right.
    """
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
        {"completion": tokenizer.decode(c[0], skip_special_tokens=True), "lenient": loose, "strict": tight}
        for c, loose, tight in zip(greedy, lenient, strict, strict=True)
    ]
    opinions = _second_opinions(tokenizer, recipe, rows, [c[0] for c in greedy])
    for record, opinion in zip(records, opinions or [], strict=False):
        record["honest"] = None if record["lenient"] is None else opinion
    if section.samples:
        sampled = generate_completions(
            model, tokenizer, ids, samples=section.samples, temperature=section.temperature, seed=recipe.seed,
            progress=progress(f"{section.samples} samples"), **shared,
        )  # fmt: skip
        repeated = [row for row in rows for _ in range(section.samples)]
        right, _ = score_completions(tokenizer, recipe, repeated, [c for group in sampled for c in group])
        for i, record in enumerate(records):
            group = right[i * section.samples : (i + 1) * section.samples]
            record["samples_right"] = None if None in group else sum(bool(r) for r in group)
    return records


def score_completions(
    tokenizer: Any, recipe: Recipe, rows: Sequence[Row], completions: Sequence[list[int]]
) -> tuple[list[bool | None], list[bool | None]]:
    """Return whether each completion is leniently and strictly right; None where the gold is unusable."""
    lenient_section: ScoreSection | RewardSection = recipe.eval.lenient or recipe.rewards[0]
    lenient = _scores(lenient_section, "eval.lenient", tokenizer, recipe, rows, completions)
    threshold = getattr(lenient_section, "threshold", 1.0)
    right: list[bool | None] = [None if score is None else score >= threshold for score in lenient]
    strict = list(right)
    for i, section in enumerate(recipe.eval.strict):
        for j, score in enumerate(_scores(section, f"eval.strict[{i}]", tokenizer, recipe, rows, completions)):
            if strict[j]:
                strict[j] = score is not None and score >= section.threshold
    return right, strict


def _second_opinions(
    tokenizer: Any, recipe: Recipe, rows: Sequence[Row], completions: Sequence[list[int]]
) -> list[bool] | None:
    """Return whether the first reward's second opinion accepts each completion; None if the reward has none."""
    section, where = recipe.rewards[0], "rewards[0]"
    columns, opened = columns_of(rows), lead_in(rows, recipe, tokenizer)
    reward = import_function(section.function, where)  # only the opinion is called: eval.lenient may replace the reward
    opinion = load_second_opinion(reward, section, where, columns, opened)
    if opinion is None:
        return None
    top = getattr(opinion, "top", None) or 1.0
    opinion = limited(opinion, recipe.limits.reward_timeout_s, where)
    scores = call_reward(opinion, tokenizer, recipe, rows, completions)
    return [score is not None and score >= top for score in scores]


def _scores(
    section: Any, where: str, tokenizer: Any, recipe: Recipe, rows: Sequence[Row], completions: Sequence[list[int]]
) -> list[float | None]:
    function = load_function(section, where, columns_of(rows), lead_in(rows, recipe, tokenizer))
    function = limited(function, recipe.limits.reward_timeout_s, where)
    return call_reward(function, tokenizer, recipe, rows, completions)


def call_reward(
    function: Reward, tokenizer: Any, recipe: Recipe, rows: Sequence[Row], completions: Sequence[list[int]]
) -> list[float | None]:
    """Score completions (token ids, one per row) by one reward, as many in a call as in training."""
    columns = columns_of(rows)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    chat = bool(rows) and not isinstance(rows[0]["prompt"], str)
    size = recipe.schedule.batch
    scores: list[float | None] = []
    for start in range(0, len(rows), size):
        batch, answers = rows[start : start + size], texts[start : start + size]
        scores += function(
            completions=[[{"role": "assistant", "content": text}] for text in answers] if chat else answers,
            prompts=[row["prompt"] for row in batch],
            completion_ids=[list(ids) for ids in completions[start : start + size]],
            **{key: [row.get(key) for row in batch] for key in columns},
        )
    return scores


def compare(recipe: Recipe, base: list[Row], trained: list[Row]) -> dict[str, Any]:
    """Compare paired records: rates with Wilson intervals, paired bootstrap, McNemar, pass@k and a verdict.

    Raises:
        EvaluationError: no record has a usable gold.
    """
    usable = [i for i, record in enumerate(base) if record["lenient"] is not None]
    if not usable:
        raise EvaluationError("eval: no held-out row has a usable gold answer. Check data.answer and eval.lenient.")
    result: dict[str, Any] = {"n": len(usable), "unusable_golds": len(base) - len(usable), "measured_at": now()}
    for kind in ("lenient", "strict", *(["honest"] if "honest" in base[usable[0]] else [])):
        before = [bool(base[i][kind]) for i in usable]
        after = [bool(trained[i][kind]) for i in usable]
        difference = paired_bootstrap(before, after, seed=recipe.seed)
        test = mcnemar_exact(before, after)
        result[kind] = {
            "base": dataclasses.asdict(wilson_interval(sum(before), len(before))),
            "trained": dataclasses.asdict(wilson_interval(sum(after), len(after))),
            "difference": dataclasses.asdict(difference),
            "mcnemar": dataclasses.asdict(test),
            "verdict": dataclasses.asdict(verdict(difference, test, score=f"held-out {kind} score")),
        }
    if samples := recipe.eval.samples:
        result["pass_at_k"] = {
            f"pass@{k}": {
                name: mean_pass_at_k([records[i]["samples_right"] for i in usable], samples, k)
                for name, records in (("base", base), ("trained", trained))
            }
            for k in _powers_of_two(samples)
        }
    return result


def _powers_of_two(limit: int) -> list[int]:
    return sorted({1 << i for i in range(limit.bit_length()) if 1 << i <= limit} | {limit})


def _write_records(path: Path, rows: list[Row], records: dict[str, list[Row]]) -> None:
    lines = [
        json.dumps({**row, "base": before, "trained": after}, ensure_ascii=False, default=str)
        for row, before, after in zip(rows, records["base"], records["trained"], strict=True)
    ]
    write_atomic(path, "\n".join(lines) + "\n")
