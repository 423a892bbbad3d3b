"""watch: follow a run from another terminal, through the warm-up and GRPO. It only reads the run's files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpo_lite.files.records import read_json_lines
from grpo_lite.report.board import MOST_FINDINGS, Board, GRPOAhead, WarmupBoard, rendered
from grpo_lite.report.doctor import (
    KEYS,
    diagnose_grpo,
    diagnose_warmup,
    event_line,
    finding_events,
    stated_findings,
)
from grpo_lite.report.evidence import GRPO, WARMUP, Finding, read_evidence, read_steps, read_warmup_steps
from grpo_lite.runs.run_dir import RunDir

ENDED = ("finished", "paused", "stopped", "quiet")
STOPPED_AFTER_S = 30.0
QUIET_AFTER_S = 600.0
_NOTES = {
    "stopped": ", no process on this machine is training it; the same `train` command resumes it",
    "quiet": ", no step for ten minutes",
}


def read_board(run: RunDir) -> Board | WarmupBoard:
    """Return the board of the stage that a run is in, as its files are now.

    Raises:
        RunDirError: the folder is not a run.
    """
    return _warmup_board(run) if _in_warmup(run.read_run()) else _grpo_board(run)


def state_of(run: RunDir) -> str:
    """Return the state of a run in one word.

    Returns:
        "running"; "evaluating" (trained, not finished); "finished"; "paused" (limits.max_minutes); "stopped" (its lock
        is free, as after Ctrl-C, a kill or an error, and no file has changed for half a minute: the locks of another
        machine may be invisible here); or "quiet" (no step for ten minutes).
    """
    idle = run.in_use() is False  # read first: a run that ends meanwhile then counts as finished
    record = run.read_run()
    if record.get("finished_at"):
        return "finished"
    begun = max([record.get("started_at") or "", *(record.get("resumed_at") or [])])
    paused = record["warmup"] if _in_warmup(record) else record
    if (paused.get("paused_at") or "") > begun:
        return "paused"
    files = (run.recipe_file, run.run_file, run.metrics_file)  # run.json: a resume writes it long before its first step
    still_s = time.time() - max(file.stat().st_mtime for file in files if file.is_file())
    if idle and still_s > STOPPED_AFTER_S:
        return "stopped"
    if record.get("trained_at"):
        return "evaluating"
    return "quiet" if still_s > QUIET_AFTER_S else "running"


def watch_lines(run: RunDir, every_s: float = 1.0, sleep: Callable[[float], Any] = time.sleep) -> Iterator[str]:
    """Yield a line for every new step of either stage and what the doctor says to it, until the run has ended."""
    shown = {WARMUP: 0, GRPO: 0}
    stated = 0
    while True:
        state = state_of(run)
        lines: list[tuple[str, int, bool, str]] = []  # stage, step, whether it is the doctor's, the line
        for stage, board in ((WARMUP, _warmup_board(run)), (GRPO, _grpo_board(run))):
            whole = board.steps
            for count in range(shown[stage] + 1, len(whole) + 1):
                steps = whole[:count]
                line = replace(board, steps=steps, rows=(), seconds=_seconds(steps, board.begun_at)).line()
                lines.append((stage, steps[-1]["step"], False, line))
            shown[stage] = len(whole)  # a resumed run repeats steps
        events = finding_events(run)
        lines += [(event.get("stage", GRPO), event["step"], True, event_line(event)) for event in events[stated:]]
        stated = len(events)
        for *_, line in sorted(lines, key=lambda item: (item[0] == GRPO, *item[1:3])):
            yield line
        if state in ENDED:
            yield f"{run.path}: {state}{_note(run, state)}"
            return
        sleep(every_s)


def watch_live(run: RunDir, every_s: float = 1.0) -> str:
    """Draw the run's board in the terminal until it is finished; return the last state."""
    from rich.live import Live

    board = read_board(run)
    with Live(rendered(board, str(run.path)), refresh_per_second=2) as live:
        while (state := state_of(run)) not in ENDED:
            live.update(rendered(read_board(run), f"{run.path}: {state}"))
            time.sleep(every_s)
        live.update(rendered(read_board(run), f"{run.path}: {state}"))
    return state


def _in_warmup(record: Mapping[str, Any]) -> bool:
    warmup = record.get("warmup") or {}
    return bool(warmup) and not warmup.get("done_at")


def _warmup_board(run: RunDir) -> WarmupBoard:
    warmup, steps = run.read_warmup(), read_warmup_steps(run)
    ahead = GRPOAhead(**warmup["ahead"]) if warmup.get("ahead") else None
    total, seconds = int(warmup.get("max_steps") or 0), _seconds(steps, 0)
    return WarmupBoard(run.load_recipe(), total, [*steps], (), _findings(run, WARMUP), seconds, ahead=ahead)


def _grpo_board(run: RunDir) -> Board:
    recipe, record, steps = run.load_recipe(), run.read_run(), read_steps(run)
    files = sorted((run.path / "completions").glob("step_*.jsonl"))
    rows = read_json_lines(files[-1]) if files else []
    begun = int(record.get("first_step") or 0)
    total = int(record.get("max_steps") or recipe.grpo.get("max_steps") or 0)
    return Board(recipe, total, [*steps], rows, _findings(run, GRPO), _seconds(steps, begun), begun)


def _findings(run: RunDir, stage: str) -> list[Finding]:
    """Return what the doctor finds in a stage at present, and what other parts of the run reported in it."""
    present = (diagnose_warmup if stage == WARMUP else diagnose_grpo)(read_evidence(run))
    others = [record for record in stated_findings(run) if record["key"] not in KEYS]
    return [*present, *(_dated(record) for record in others if record.get("stage", GRPO) == stage)][:MOST_FINDINGS]


def _dated(record: Mapping[str, Any]) -> Finding:
    finding = Finding.from_record(record)
    return replace(finding, sentence=f"At step {record['step']}: {finding.sentence}")


def _seconds(steps: Sequence[Mapping[str, Any]], begun: int) -> float:
    return sum(record.get("step_time") or 0.0 for record in steps if record["step"] > begun)


def _note(run: RunDir, state: str) -> str:
    if state == "stopped" and run.warm_adapter.is_dir() and not read_steps(run):
        return ", its warm-up is complete; `train` continues with GRPO"
    return _NOTES.get(state, "")
