"""The result of a run as lines for people: reward, held-out scores, paths, and the next commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_lite.commands import UNKNOWN, hint, hint_run
from grpo_lite.report.scores import episodes_text, named_scores, own_gain, rates_text
from grpo_lite.runs.run_dir import MERGED_MODELS, SCORE_COLUMNS, RunDir
from grpo_lite.units import duration, size


def run_summary(run: RunDir) -> str:
    """Return the end-of-run summary."""
    record = run.read_run()
    warmup = record.get("warmup") or {}
    lines = ["", *_warmup_lines(warmup)]
    if warmup.get("done_at") or not warmup:
        rewards = (_number(record.get(key)) for key in ("reward_first", "reward_last"))
        steps = record["steps"]
        lines += [
            f"trained {steps} step{'s' * (steps != 1)} in {duration(record.get('training_seconds', 0.0))}, peak memory "
            f"{size(record.get('peak_memory_bytes')) or 'unknown'}",
            "mean reward {} (first step) → {} (last)".format(*rewards),
        ]
    if scores := run.read_scores():
        lines += score_lines(scores)
    lines += task_lines(run)
    if record.get("merge"):
        lines.append(merge_line(record["merge"]))
    if record.get("faults"):
        lines.append("left out: " + ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in record["faults"].items()))
    if not record.get("trained_at"):
        why = "to stay within the budget" if record.get("budget") else "by limits.max_minutes"
        lines.append(f"paused {why}; to resume, run the same command again")
    lines += ["", f"adapter   {run.adapter}"]
    if run.merged.is_dir():
        lines.append(f"merged    {run.merged}")
    if run.evaluation.is_dir():
        lines.append(f"records   {run.evaluation / 'records.jsonl'}")
    lines.append(f"report    {run.path / 'report.html'}")
    lines += [f"all       {run.path}", "", "next:", *_next_steps(run)]
    return "\n".join(lines)


def _next_steps(run: RunDir) -> list[str]:
    """Return what one does with a trained model, as commands to type."""
    steps = {
        hint("report", run=run.path): "scores, curves and every completion on one page",
        hint("chat", run=run.path, compare=True): "ask base and trained model side by side",
    }
    if run.merged.is_dir():
        steps[hint("export", run=run.path, gguf="q8_0")] = "a file for Ollama and llama.cpp"
    width = max(map(len, steps))
    return [f"  {command.ljust(width)}  {what}" for command, what in steps.items()]


def _warmup_lines(warmup: Mapping[str, Any]) -> list[str]:
    if not warmup.get("steps"):
        return []
    paused = "" if warmup.get("done_at") else f"; paused before its end ({warmup.get('max_steps')} steps), without GRPO"
    return [
        f"warm-up (SFT): {warmup['steps']} steps in {duration(warmup.get('seconds', 0.0))}, loss "
        f"{_number(warmup.get('loss_first'))} → {_number(warmup.get('loss_last'))}{paused}"
    ]


def _number(value: Any) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """Return the held-out scores as lines: the verdict first, GRPO's own and then the warm-up's where there was one."""
    lenient, strict = scores["lenient"], scores["strict"]
    lines = [own_gain(lenient)["verdict"]["sentence"]]
    if own_gain(strict)["difference"] != own_gain(lenient)["difference"]:
        lines.append(own_gain(strict)["verdict"]["sentence"])
    if "warmup" in lenient:
        lines += [lenient["warmup"]["verdict"]["sentence"], *_table(scores)]
    else:
        lines += [further["lenient"]["verdict"]["sentence"] for further in scores.get("also", {}).values()]
        lines += [f"by a second, independent judge: {rates_text(scores['honest'])}"] if "honest" in scores else []
    for name, what in MERGED_MODELS.items():
        if name in scores:
            rate = scores[name]["lenient"]
            lines.append(f"{what}, on the same prompts: {rate['rate']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})")
    if "merged_nf4" in scores:
        lines.append(f"exported in 4 bits (NF4), on the same prompts: {scores['merged_nf4']['lenient']['rate']:.3f}")
    for name, rates in scores.get("pass_at_k", {}).items():
        lines.append(f"{name} (sampled): {rates_text(rates)}")
    if episodes := episodes_text(scores):
        lines.append(episodes)
        failed = {name: means.get("failed_rewards", 0) for name, means in scores["episodes"].items()}
        if any(failed.values()):
            counts = ", ".join(f"{name} {count}" for name, count in failed.items())
            lines.append(f"get_reward failed in held-out episodes, which count as not right: {counts}")
    if scores.get("unusable_golds"):
        why = "could not be judged in every episode" if episodes else "have no usable gold answer"
        lines.append(f"{scores['unusable_golds']} held-out rows {why} and were left out")
    return lines


def task_lines(run: RunDir) -> list[str]:
    """Return what training changed at tasks of lm-evaluation-harness, a line each; none where it was not measured."""
    return [str(task["sentence"]) for task in run.read_tasks()]


def _table(scores: Mapping[str, Any]) -> list[str]:
    """Return base, warm and trained in columns, each rate with its interval."""
    rows: list[tuple[str, ...]] = [("", *SCORE_COLUMNS)]
    for name, part in named_scores(scores):
        cells = (f"{r['rate']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in map(part.__getitem__, SCORE_COLUMNS))
        rows.append((name, *cells))
    if cut := scores.get("truncated"):
        rows.append(("cut off by the cap", *(f"{cut[column]:.1%}" for column in SCORE_COLUMNS)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return [f"  {line}" for line in lines]


def warmup_summary(run: RunDir) -> str:
    """Return what the warm-up alone reached, and what comes next."""
    record = run.read_warmup()
    if not run.warm_adapter.is_dir():
        return "\nthe warm-up is not complete (limits.max_minutes); to resume, run the same command again"
    held, seconds = record.get("heldout_loss_last"), record.get("seconds", 0.0)
    lines = [
        "",
        f"warmed up: {record.get('steps')} steps on {record.get('rows')} rows in {duration(seconds)}, "
        f"loss {_number(record.get('loss_first'))} → {_number(record.get('loss_last'))}"
        + (f", on rows held out {held:.3f}" if held is not None else ""),
        "",
        f"adapter   {run.warm_adapter}",
        "",
        "next:",
        f"  {hint('train', run=run.path)}    continue with GRPO (the same recipe and overrides)",
    ]
    return "\n".join(lines)


def merge_line(record: Mapping[str, Any]) -> str:
    """Return one line on the merge's verification."""
    if "skipped" in record:
        return f"not merged: {record['skipped']}."
    if "prompts" not in record:
        return f"merged, but not verified: run `{hint('merge', run=UNKNOWN, overwrite=True)}`."
    first = " of episodes, up to the first answer" if record.get("episodes") else ""
    onto = "the base as 4-bit training read it" if record.get("onto") == "trained" else "the 16-bit base"
    return (
        f"merged onto {onto} and verified on {record['prompts']} held-out prompts{first}: top-1 agreement "
        f"{record['top1_agreement']:.1%}, mean KL {record['mean_kl']:.1e}, largest logit difference "
        f"{record['max_logit_difference']:.3f}"
    )


def interrupted_summary(run: RunDir, steps: int, signal_name: str) -> str:
    """Return what to type after an interruption."""
    checkpoint = run.last_checkpoint()
    saved = checkpoint or run.last_of_warmup()
    stage = " of the warm-up" if saved and not checkpoint else ""
    where = f"saved {saved}" if saved else "no checkpoint was saved"
    return (
        f"interrupted by {signal_name} after step {steps}{stage}; {where}.\n"
        f"To resume from there, run the same command again: {hint_run(run.path)}"
    )
