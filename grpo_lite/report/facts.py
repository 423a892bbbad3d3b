"""The content of a run's report, read from its files: verdict, figures, phases, completions, what was not measured."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_lite.files.records import read_json_lines
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.doctor import examine, stated_findings
from grpo_lite.report.evidence import Evidence, Finding, read_evidence
from grpo_lite.report.scores import columns_of, gain_text, own_gain
from grpo_lite.report.turns import turns_of
from grpo_lite.runs.provenance import starts_from
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.units import duration, size

MOST_ROWS = 2000  # most completions on the page; it says so if a run has more
LONGEST_TEXT = 4000  # characters of one text; the middle of longer ones is left out
LATEST_STEPS, MOST_LATEST = 3, 96  # steps and completions that the page of a running training shows
PHASES = {
    "warmup": "warm-up (SFT)",
    "rollout": "generating completions",
    "reward": "computing rewards",
    "update": "forward, backward, optimizer",
    "other": "saving, logging, starting up",
    "evaluation": "held-out evaluation",
    "merge": "merge and verification",
}


@dataclass(frozen=True)
class RunPage:
    """Everything that a report is written from."""

    name: str
    recipe: Recipe
    record: Mapping[str, Any]  # run.json
    scores: Mapping[str, Any]  # metrics.json; empty: not evaluated
    tasks: Sequence[Mapping[str, Any]]  # of lm-evaluation-harness; empty: not measured
    evidence: Evidence
    findings: Sequence[Finding]
    stated: Sequence[Mapping[str, Any]]


def read_page(run: RunDir) -> RunPage:
    """Collect a run's facts.

    Raises:
        RunDirError: the folder is not a run.
    """
    e = read_evidence(run)
    tasks, stated = run.read_tasks(), stated_findings(run)
    return RunPage(run.name, e.recipe, run.read_run(), e.scores, tasks, e, examine(run), stated)


def headline(page: RunPage) -> dict[str, Any]:
    """Return the verdict: `label`, `sentence`, `tone` (good, bad, flat, none) and, once measured, the rates.

    After a warm-up the verdict is GRPO's own; `warmup` then says what the warm-up gained.
    """
    if not page.scores:
        sentence = "There is no held-out score before and after."
        return {"label": _progress(page), "sentence": sentence, "tone": "none"}
    part = page.scores["lenient"]
    change, columns = own_gain(part), columns_of(part)
    d, label, sentence = change["difference"], change["verdict"]["label"], change["verdict"]["sentence"]
    tone = "good" if "gain" in label and d["low"] > 0 else "bad" if d["high"] < 0 else "flat"
    names = {"base": "before", "trained": "after"} if len(columns) == 2 else {}
    rates = [{"name": names.get(column, column), **part[column]} for column in columns]
    warmup = ""
    if "warmup" in part:
        label = f"GRPO alone: {label}"
        warmup = f"warm-up (SFT): {gain_text(part['warmup'])}, {part['warmup']['verdict']['label']}"
        sentence = f"{sentence} {part['warmup']['verdict']['sentence']}"
    elif page.recipe.warmup is not None:
        label = f"{sentence.partition(': ')[0]}: {label}"  # the verdict says what it is about
    figures = {key: d[key] for key in ("difference", "low", "high", "n")}
    return {"label": label, "sentence": sentence, "tone": tone, "rates": rates, "warmup": warmup, **figures}


def stated_rows(page: RunPage) -> list[dict[str, str]]:
    """Return what the doctor reported during the run, oldest first: `when` it was the case, and the `sentence`."""
    present = {finding.key for finding in page.findings}
    return [{"when": _when(record, present), "sentence": record["sentence"]} for record in page.stated]


def _when(record: Mapping[str, Any], present: Collection[str]) -> str:
    first, last = record["step"], record.get("until")
    if record["key"] in present and last is None:
        return f"since step {first}"
    steps = f"step {first}" if last is None or last <= first else f"steps {first}–{last}"
    return steps if record["key"] in present else f"{steps}, no longer"


def _progress(page: RunPage) -> str:
    """Return how far a run without scores is."""
    if page.record.get("trained_at"):
        return "trained, not evaluated"
    e = page.evidence
    done, of_warmup = (e.last_step, "") if e.last_step or not e.warmup_steps else (e.warmup_step, " of the warm-up")
    return f"not finished: {done} step{'s' * (done != 1)}{of_warmup} so far"


def tiles(page: RunPage) -> list[tuple[str, str]]:
    """Return the run's figures as (name, value with unit), known ones only."""
    e, record = page.evidence, page.record
    rewards = e.series("reward")
    figures: list[tuple[str, str | None]] = [
        ("warm-up", _warmup_tile(page.evidence)),
        ("steps", str(record["steps"]) if record.get("steps") else str(len(rewards)) if rewards else None),
        ("reward, first → last", f"{rewards[0]:.2f} → {rewards[-1]:.2f}" if rewards else None),
        ("training time", duration(record.get("training_seconds"))),
        ("peak memory", size(record.get("peak_memory_bytes"))),
        ("tokens per second", _speed(e)),
        ("device", (record.get("device") or {}).get("name")),
    ]
    return [(name, value) for name, value in figures if value]


def _warmup_tile(e: Evidence) -> str | None:
    losses = e.warmup_series("loss")
    return f"{e.warmup_step} steps, loss {losses[0]:.2f} → {losses[-1]:.2f}" if losses else None


def _speed(e: Evidence) -> str | None:
    tokens, seconds = e.series("num_tokens"), e.series("step_time")
    if len(tokens) < 2 or not sum(seconds) or tokens[-1] < tokens[0]:
        return None
    return f"{(tokens[-1] - tokens[0]) / sum(seconds[1:]):,.0f}"


def phases(page: RunPage) -> list[dict[str, Any]]:
    """Return where the time went: `name`, `what`, `seconds`, `share`; empty before anything was timed."""
    e, record = page.evidence, page.record
    rollout, reward = (total_of(e.series(f"time/{name}_s")) for name in ("rollout", "reward"))
    stepped = sum(e.series("step_time"))
    seconds: dict[str, float] = {
        "warmup": float(e.warmup.get("seconds") or 0.0), "rollout": rollout, "reward": reward,
        "update": max(0.0, stepped - rollout - reward),
    }  # fmt: skip
    held_out = total_of(e.series("time/heldout_s"))  # between steps
    seconds["other"] = max(0.0, float(record.get("training_seconds") or 0.0) - stepped - held_out)
    seconds |= {name: float(record.get(f"{name}_seconds") or 0.0) for name in ("evaluation", "merge")}
    seconds["evaluation"] += held_out
    if not rollout:
        seconds |= {"rollout": 0.0, "reward": 0.0, "update": stepped}
    whole = sum(seconds.values())
    what = PHASES if rollout else PHASES | {"update": "training steps"}
    return [
        {"name": name, "what": what[name], "seconds": s, "text": duration(s), "share": s / whole}
        for name, s in seconds.items()
        if whole and s / whole >= 0.001
    ]


def total_of(counter: Sequence[float]) -> float:
    """Return a counter's total, also if a resumed run restarted it at 0."""
    total, before = 0.0, 0.0
    for value in counter:
        total += value - before if value >= before else value
        before = value
    return total


def not_measured(page: RunPage) -> list[str]:
    """Return what this run did not measure, as sentences."""
    recipe, scores = page.recipe, page.scores
    lines = [] if scores else ["The task itself: there is no score before or after."]
    if page.evidence.warmup and not page.evidence.warmup.get("done_at"):
        e = page.evidence
        lines.append(
            f"GRPO: the run paused in its warm-up, after step {e.warmup_step} of {e.warmup_total}. What is called "
            "trained is what the warm-up had reached; the same command resumes it."
        )
    elif page.record.get("paused_at") and not page.record.get("finished_at"):
        done, total = page.evidence.last_step, page.record.get("max_steps")
        lines.append(f"The rest of the run: it paused after step {done} of {total}; the same command resumes it.")
    if scores and not recipe.eval.strict:
        lines.append("The form of the answers: this recipe has no strict score of its own.")
    if scores and "honest" not in scores:
        lines.append("Agreement of the reward with a second, independent judge: this reward has none.")
    if scores:
        lines.append("Spread over seeds: this is one run, and the intervals are over prompts only.")
    if scores and "merged" not in scores:
        lines.append("The score of the merged 16-bit model.")
    if page.tasks:
        lines.append("Anything but this task and those of lm-evaluation-harness above: languages, safety and more.")
    else:
        lines.append("Anything but this task: other tasks, languages, safety, and what training may have unlearnt.")
    lines.append("Whether held-out prompts were in the base model's own training data.")
    if (page.record.get("device") or {}).get("kind") == "cpu":
        lines.append("Speed and memory on a GPU: this run used a CPU.")
    return lines


def completion_rows(run: RunDir) -> tuple[list[dict[str, Any]], int]:
    """Return rows for the browser of completions, at most MOST_ROWS, and how many there are in all.

    A longer run is sampled at evenly spaced steps, first and last included. A large step keeps its best, its worst and
    its first completions.
    """
    files = sorted((run.path / "completions").glob("step_*.jsonl"))
    per_step = max(4, MOST_ROWS // max(1, min(len(files), 60)))
    chosen = {files[round(i * (len(files) - 1) / 59)] for i in range(60)} if len(files) > 60 else set(files)
    rows: list[dict[str, Any]] = []
    count = 0
    for path in files:
        of_step = [row for row in read_json_lines(path) if "reward" in row] if path in chosen else []
        count += len(of_step) if path in chosen else path.read_bytes().count(b"\n")
        if len(of_step) > per_step:
            ranked = sorted(range(len(of_step)), key=lambda i: of_step[i]["reward"] or 0.0)
            chosen_rows = {ranked[0], ranked[1], ranked[-1], ranked[-2], *range(per_step - 4)}
            of_step = [row for i, row in enumerate(of_step) if i in chosen_rows]
        rows += [_browsable(row) for row in of_step]
    return rows, count


def latest_rows(run: RunDir) -> list[dict[str, Any]]:
    """Return the completions of the last steps as rows, the newest step first."""
    files = sorted((run.path / "completions").glob("step_*.jsonl"))[-LATEST_STEPS:]
    rows = [_browsable(row) for path in reversed(files) for row in read_json_lines(path) if "reward" in row]
    return rows[:MOST_LATEST]


def _browsable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": row["step"], "prompt": prompt_text(row["prompt"]), "text": shortened(row["completion"]),
        "reward": _finite(row["reward"]), "parts": {k: _finite(v) for k, v in row["rewards"].items()},
        "answer": _gold(row), **_episode(row),
        "tokens": row.get("tokens"), "cut": bool(row.get("truncated")),
    }  # fmt: skip


def _episode(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the turns of an episode as (kind, text); nothing for a single answer."""
    turns = row.get("turns")
    return {"turns": [[kind, shortened(text)] for kind, text in turns_of(turns)]} if turns else {}


def _gold(row: Mapping[str, Any]) -> str | None:
    return None if row.get("answer") is None else shortened(str(row["answer"]))


def _finite(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None


def held_out_rows(run: RunDir) -> tuple[list[dict[str, Any]], int]:
    """Return each model's answers to the held-out prompts, at most MOST_ROWS, and how many there are in all."""
    records = read_json_lines(run.evaluation / "records.jsonl")
    rows = [
        {
            "prompt": prompt_text(row["prompt"]), "answer": _gold(row),
            **{side: {"text": shortened(row[side]["completion"]), "right": row[side]["lenient"], **_episode(row[side]),
                      "strict": row[side]["strict"]} for side in columns_of(row)},
        }
        for row in records[:MOST_ROWS]
    ]  # fmt: skip
    return rows, len(records)


def prompt_text(prompt: Any) -> str:
    """Return a prompt as text; chat messages get their roles unless there is only one."""
    if isinstance(prompt, str):
        return shortened(prompt)
    if len(prompt) == 1:
        return shortened(str(prompt[0]["content"]))
    return shortened("\n\n".join(f"{message['role']}: {message['content']}" for message in prompt))


def shortened(text: str) -> str:
    """Return a text of at most LONGEST_TEXT characters, the middle left out."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def for_script(value: Any) -> str:
    """Return JSON that is safe inside a <script> element: `<`, `>`, `&` and line separators are escaped."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def versions(page: RunPage) -> Iterable[tuple[str, str]]:
    """Return hardware, versions and dates as (name, value), known ones only."""
    record = page.record
    device, faults = record.get("device") or {}, record.get("faults") or {}
    facts = {
        "device": device.get("name"), "memory of the device": size(device.get("memory_bytes")),
        "starts from": starts_from(page.recipe, record),
        "seed": record.get("seed"), "started": record.get("started_at"), "finished": record.get("finished_at"),
        "resumed": ", ".join(record.get("resumed_at") or []) or None,
        "left out": ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in faults.items()) or None,
        "grpo_lite": " ".join(str(v) for v in (record.get("grpo_lite"), record.get("git_commit")) if v),
        "python": record.get("python"), "platform": record.get("platform"), **(record.get("versions") or {}),
    }  # fmt: skip
    return [(name, str(value)) for name, value in facts.items() if value is not None and value != ""]
