"""The last lines of a run: what comes next."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from grpo_lite.cli import main
from grpo_lite.report.summary import run_summary
from tests.run_files import write_run


def next_steps(text: str) -> list[str]:
    return [re.split("  +", line.strip())[0] for line in text.partition("\nnext:\n")[2].splitlines()]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is no checkout: hints are commands of grpo-lite."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_after_a_run_come_its_report_a_chat_and_an_export(elsewhere: Path) -> None:
    run = write_run(Path("runs/x"))
    assert next_steps(run_summary(run)) == ["grpo-lite report runs/x", "grpo-lite chat runs/x --compare"]
    run.merged.mkdir()
    assert next_steps(run_summary(run))[2:] == ["grpo-lite export runs/x --gguf q8_0"]


def test_each_step_is_a_command_that_grpo_lite_takes(elsewhere: Path) -> None:
    run = write_run(Path("runs/x"))
    run.merged.mkdir()
    for step in next_steps(run_summary(run)):
        _, verb, *arguments = shlex.split(step)
        main.commands[verb].make_context(verb, arguments)  # raises for an unknown option


def test_in_a_checkout_the_steps_are_make_s(tmp_path: Path, root: Path) -> None:
    first = next_steps(run_summary(write_run(tmp_path / "x")))
    assert [step.split(" RUN=")[0] for step in first] == ["make report", "make chat"]
    assert first[1].endswith(("ARGS=--compare", 'ARGS="--compare"'))


def test_a_paused_run_says_what_paused_it(elsewhere: Path) -> None:
    run = write_run(Path("runs/x"))
    run.update_run(trained_at=None, steps=1)
    assert "trained 1 step in" in run_summary(run)
    assert "paused by limits.max_minutes; to resume, run the same command again" in run_summary(run)
    run.update_run(budget={"limit_s": 60})
    assert "paused to stay within the budget; to resume, run the same command again" in run_summary(run)
