"""The result of a run as lines for people: reward, held-out scores, paths, and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from grpo_lite.runs.run_dir import RunDir
from grpo_lite.units import duration, size


def run_summary(run: RunDir) -> str:
    """Return the end-of-run summary."""
    record = run.read_run()
    lines = [
        "",
        f"trained {record['steps']} steps in {duration(record.get('training_seconds', 0.0))}, peak memory "
        f"{size(record.get('peak_memory_bytes')) or 'unknown'}",
        f"mean reward {_number(record.get('reward_first'))} (first step) → {_number(record.get('reward_last'))} (last)",
    ]
    if scores := run.read_scores():
        lines += score_lines(scores)
    if record.get("merge"):
        lines.append(merge_line(record["merge"]))
    if record.get("faults"):
        lines.append("left out: " + ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in record["faults"].items()))
    if not record.get("trained_at"):
        lines.append("paused by limits.max_minutes; to resume, give the same command again")
    lines += ["", f"adapter   {run.adapter}"]
    if run.merged.is_dir():
        lines.append(f"merged    {run.merged}")
    if run.evaluation.is_dir():
        lines.append(f"records   {run.evaluation / 'records.jsonl'}")
    lines.append(f"report    {run.path / 'report.html'}")
    lines += [f"all       {run.path}", "", "next:"]
    lines.append(f"  make eval RUN={shlex.quote(str(run.path))}    evaluate again")
    if run.merged.is_dir():
        lines.append(f"  load {run.merged} with transformers, vLLM or any tool that reads safetensors")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """Return the held-out scores as lines: verdict first."""
    lines = [scores["lenient"]["verdict"]["sentence"]]
    if scores["strict"]["difference"] != scores["lenient"]["difference"]:
        lines.append(scores["strict"]["verdict"]["sentence"])
    if "honest" in scores:
        honest = scores["honest"]["difference"]
        lines.append(f"by a second, independent judge: {honest['before']:.3f} → {honest['after']:.3f}")
    if "merged" in scores:
        rate = scores["merged"]["lenient"]
        lines.append(
            f"the merged 16-bit model on the same prompts: {rate['rate']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})"
        )
    if "merged_nf4" in scores:
        lines.append(f"exported in 4 bits (NF4), on the same prompts: {scores['merged_nf4']['lenient']['rate']:.3f}")
    for name, rates in scores.get("pass_at_k", {}).items():
        lines.append(f"{name} (sampled): {rates['base']:.3f} → {rates['trained']:.3f}")
    if scores.get("unusable_golds"):
        lines.append(f"{scores['unusable_golds']} held-out rows have no usable gold answer and were left out")
    return lines


def warmup_summary(run: RunDir) -> str:
    """Return what the warm-up alone reached, and what comes next."""
    record = run.read_run().get("warmup") or {}
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
        f"  make train RECIPE=… RUN={shlex.quote(str(run.path))}    continue with GRPO (the same recipe and ARGS)",
    ]
    return "\n".join(lines)


def merge_line(record: Mapping[str, Any]) -> str:
    """Return one line on the merge's verification."""
    if "skipped" in record:
        return f"not merged: {record['skipped']}."
    if "prompts" not in record:
        return "merged, but not verified: run `grpo-lite merge --overwrite`."
    return (
        f"merged into the 16-bit base and verified on {record['prompts']} held-out prompts: top-1 agreement "
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
        f"To resume from there, give the same command again: RUN={shlex.quote(str(run.path))}"
    )
