"""How the warm-up is watched and judged: its records, its board, `watch` and the doctor's findings; no model."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.board import GRPOAhead, Progress, WarmupBoard, rendered
from grpo_lite.report.evidence import read_steps, read_warmup_steps
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


def as_text(board: Progress) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(rendered(board, "a run"))
    return console.file.getvalue()  # type: ignore[attr-defined]
