"""Exports of a run, as the command line orders them."""

from __future__ import annotations

from pathlib import Path

from grpo_lite.export.stages import RunInputs, export_run
from tests.finished_run import make_run


def test_a_merge_that_a_kill_left_aside_is_checked_and_not_made_again(tmp_path: Path) -> None:
    run, lines = make_run(tmp_path), list[str]()
    run.merged.rename(run.merged.with_name(".replaced-merged"))  # killed between the two renames
    assert export_run(run, lines.append, RunInputs(run.load_recipe())) > 5
    assert lines == []
    assert not list(run.path.glob(".replaced-*"))
