"""How the warm-up is watched and judged: its records, its board, `watch` and the doctor's findings; no model."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.board import GRPOAhead, Progress, WarmupBoard, rendered
from grpo_lite.report.evidence import read_steps, read_warmup_steps
from grpo_lite.report.follow import read_board, state_of, watch_lines
from grpo_lite.runs.run_dir import RunDir
from tests.run_files import ROOT, write_run


def warmup_record(step: int, loss: float, **figures: Any) -> dict[str, Any]:
    """Return a record as the warm-up logs it."""
    return {"step": step, "stage": "warmup", "loss": loss, "mean_token_accuracy": 0.9, "step_time": 2.0, **figures}


def test_records_of_the_warmup_and_of_grpo_are_read_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    older = run.metrics_file.read_text()  # no stage field: GRPO's
    warm = [warmup_record(step, 2.0 / step) for step in (1, 2)]
    new = json.dumps({"step": 4, "stage": "grpo", "reward": 0.5, "loss": 0.0}) + "\n"
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in warm) + older + new)
    assert [record["step"] for record in read_steps(run)] == [1, 2, 3, 4]
    assert read_warmup_steps(run) == warm


def recipe() -> Recipe:
    return load_recipe(str(ROOT / "recipes" / "smoke.yaml"))


def test_the_warmup_s_line_says_how_far_it_is_and_what_follows() -> None:
    first = warmup_record(4, 0.9, num_tokens=1000)
    last = warmup_record(5, 0.42, num_tokens=2624, mean_token_accuracy=0.912, heldout_loss=0.55)
    board = WarmupBoard(recipe(), 20, [first, last], seconds=10.0, ahead=GRPOAhead(60, 180.0, "2026-11-02T10:20:30Z"))
    assert board.line() == (
        "warm-up 5/20 · loss 0.420 · held-out loss 0.550 · token accuracy 91% · 812 tokens/s · ETA 30 s · "
        "then GRPO: 60 steps (about 3 min 00 s, measured 2026-11-02)"  # 1624 tokens in 2 s; 15 steps of 2 s
    )


def test_the_warmup_s_line_leaves_out_what_is_not_known() -> None:
    assert WarmupBoard(recipe(), 0, [{"step": 1, "loss": 2.0}]).line() == "warm-up 1/? · loss 2.000"
    assert WarmupBoard(recipe(), 20, [{"step": 1, "loss": None}], begun_at=1).line() == "warm-up 1/20"
    alone = WarmupBoard(recipe(), 20, [{"step": 1, "loss": 2.0}], seconds=2.0, ahead=GRPOAhead(60))
    assert alone.line().endswith("ETA 38 s · then GRPO: 60 steps")
    assert alone.seconds_left_in_all is None


def test_the_warmup_s_board_draws_losses_and_the_time_of_both_stages() -> None:
    steps = [warmup_record(step, 1.0 / step, num_tokens=100 * step) for step in range(1, 6)]
    steps[2]["heldout_loss"] = 0.5
    text = as_text(WarmupBoard(recipe(), 20, steps, seconds=10.0, ahead=GRPOAhead(60, 180.0, "2026-11-02T10:20:30Z")))
    assert re.search(r"warm-up 5/20 +10 s elapsed · 30 s left", text)
    assert re.search(r"loss +0\.200 +█▄▂▁▁", text)
    assert re.search(r"held-out loss +0\.500", text)  # of an earlier step: the latest that is known
    assert "both stages 3 min 30 s left" in text
    assert "warm-up 0/?" in as_text(WarmupBoard(recipe()))


def write_warm_run(folder: Path, warm_steps: int = 3, grpo_steps: int = 0, **facts: Any) -> RunDir:
    """Write a run with a recipe without warm-up whose files say that it had one; `facts` are of run.json's warmup."""
    run = write_run(folder, steps=max(1, grpo_steps))
    lines = [json.dumps(warmup_record(step, 2.0 / step)) for step in range(1, warm_steps + 1)]
    lines += run.metrics_file.read_text().splitlines()[:grpo_steps]
    run.metrics_file.write_text("".join(line + "\n" for line in lines))
    record = run.read_run()
    for key in ("trained_at", "finished_at", *(() if grpo_steps else ("max_steps", "first_step"))):
        del record[key]
    warmup = {"began_at": record["started_at"], "done_at": None, "max_steps": 5, **facts}
    run.run_file.write_text(json.dumps({**record, "warmup": warmup}))
    return run


def test_watch_follows_a_run_from_the_warmup_into_grpo(tmp_path: Path) -> None:
    run = write_warm_run(tmp_path / "run", ahead={"steps": 2, "seconds": None, "measured_at": ""})
    warm = run.metrics_file.read_text()
    rest = write_run(tmp_path / "other", steps=2).metrics_file.read_text()
    board = read_board(run)
    assert board.line() == "warm-up 3/5 · loss 0.667 · token accuracy 90% · ETA 4.0 s · then GRPO: 2 steps"

    def later(_: float) -> None:
        run.metrics_file.write_text(warm + json.dumps(warmup_record(4, 0.5)) + "\n" + rest)
        run.update_run(warmup={"done_at": "x", "max_steps": 5}, max_steps=2, first_step=0, finished_at="y")

    shown = [line.split(" · ")[0] for line in watch_lines(run, sleep=later)]
    assert shown == [*(f"warm-up {step}/5" for step in (1, 2, 3, 4)), "step 1/2", "step 2/2", f"{run.path}: finished"]
    assert read_board(run).line().startswith("step 2/2 · reward ")


def test_before_the_first_step_of_grpo_the_board_is_grpo_s(tmp_path: Path) -> None:
    assert read_board(write_warm_run(tmp_path / "run", done_at="2026-01-01T00:00:30Z")).count() == "step 0/3"


def test_a_pause_in_the_warmup_is_a_pause_until_the_run_is_resumed(tmp_path: Path) -> None:
    run = write_warm_run(tmp_path / "run", paused_at="2026-01-01T00:00:30Z")
    assert state_of(run) == "paused"
    run.update_run(warmup={**run.read_run()["warmup"], "paused_at": None})
    assert state_of(run) == "running"


def test_watch_of_a_warmup_that_was_made_alone_says_how_grpo_follows(tmp_path: Path) -> None:
    run = write_warm_run(tmp_path / "run", done_at="2026-01-01T00:00:30Z")
    run.warm_adapter.mkdir(parents=True)
    with run.locked():
        pass
    for file in (run.recipe_file, run.run_file, run.metrics_file):
        os.utime(file, (1e9, 1e9))
    *_, last = watch_lines(run)
    assert last == f"{run.path}: stopped, its warm-up is complete; `train` continues with GRPO"


def as_text(board: Progress) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(rendered(board, "a run"))
    return console.file.getvalue()  # type: ignore[attr-defined]
