"""How a run is watched: the board, plain lines in logs, a terminal's live view, a notebook's cell, another terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from grpo_lite.memory.times import keep_times
from grpo_lite.recipe.load import load_recipe
from grpo_lite.report.board import Board, GRPOAhead, describe_sample, rendered, sparkline
from grpo_lite.report.evidence import Finding
from grpo_lite.report.watch import read_board, state_of, watch_lines
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.session.views import as_html, grpo_ahead, make_view
from tests.command_line import ROOT, in_process, kill, start
from tests.command_server import shared
from tests.run_files import write_run

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def as_text(board: Board, width: int = 100) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    console.print(rendered(board, "a run"))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_board_shows_progress_parts_a_sample_and_findings(tmp_path: Path) -> None:
    board = read_board(write_run(tmp_path / "run"))
    board.findings = [Finding("x", "Something is wrong.", "grpo.beta=0.04")]
    text = as_text(board)
    assert "step 12/12" in text
    assert re.search(r"accuracy_reward +\d\.\d{3} +[▁-█]+", text)
    assert re.search(r"held-out +60\.0% +[▁-█]{4}", text)  # every third of 12 steps; the last one 12/20
    assert "250 tokens/s · peak 2.5 GiB" in text  # 500 tokens in 2 s
    assert "[accuracy_reward 1, soft_overlong_punishment 0]" in text
    assert 'ARGS="grpo.beta=0.04"' in text


def test_an_empty_board_is_drawn_too() -> None:
    assert "step 0/?" in as_text(Board(load_recipe(str(ROOT / "recipes" / "smoke.yaml"))))


def test_markup_in_a_completion_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    board = read_board(run)
    board.rows = [{**board.rows[0], "completion": "[red]x[/red] [/nothing] <b>"}]
    assert "[red]x[/red] [/nothing]" in as_text(board, 200)
    assert "<b>" not in as_html(board)


def test_time_left_follows_the_pace_since_a_resume() -> None:
    recipe = load_recipe(str(ROOT / "recipes" / "smoke.yaml"))
    board = Board(recipe, total=20, steps=[{"step": 12, "reward": 0.0}], seconds=30.0, begun_at=10)
    assert board.seconds_left == 15.0 * 8  # 2 steps in 30 s, 8 to go
    assert Board(recipe, total=20, begun_at=10).seconds_left is None


def test_a_long_series_is_drawn_in_the_width_given() -> None:
    assert sparkline(list(range(1000)), 8) == "▁▂▃▄▅▆▇█"


def test_a_notebook_s_board_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, html: Any) -> None:
            shown.append("update")

    def display(html: Any, display_id: bool) -> Handle:
        shown.append(html.data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    view = make_view("notebook", load_recipe(str(ROOT / "recipes" / "smoke.yaml")), print)
    for step in (1, 2):
        view.board.steps.append({"step": step, "reward": 0.5})
        view.draw()
    assert "reward" in shown[0]
    assert shown[1:] == ["update"]


def test_a_view_of_the_warmup_follows_its_losses_and_one_of_grpo_its_rewards() -> None:
    recipe, shown = load_recipe(str(ROOT / "recipes" / "smoke.yaml")), []
    loss, reward = {"loss": 2.0}, {"loss": 0.1, "reward": 0.5, "reward_std": 0.1}
    for stage, other, logs in (("warmup", {"train_loss": 1.0}, loss), ("grpo", loss, reward)):
        view = make_view("plain", recipe, shown.append, stage)  # type: ignore[arg-type]
        view.on_train_begin(None, TrainerState(max_steps=20), None)
        view.on_log(None, TrainerState(global_step=1), None, logs=other)
        view.on_log(None, TrainerState(global_step=1), None, logs=logs)
    assert [line.split(" · ")[:2] for line in shown] == [
        ["warm-up 1/20", "loss 2.000"],
        ["step 1/20", "reward 0.500 ± 0.100"],
    ]


def test_the_time_of_grpo_after_the_warmup_is_that_of_the_last_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    recipe = load_recipe(str(ROOT / "recipes" / "smoke.yaml"))
    assert grpo_ahead(recipe, 60) == GRPOAhead(60)
    assert grpo_ahead(recipe, 0) is None  # the warm-up alone
    probe = {"step_s": 3.0, "steps": 50, "eta_s": 150.0, "evaluation_s": 1.0, "tokens_per_s": 9.0}
    keep_times(recipe, "a CPU", probe)
    ahead = grpo_ahead(recipe, 60)
    assert ahead is not None
    assert ahead.seconds == 180.0  # 60 steps of 3 s
    assert ahead.sentence().startswith("then GRPO: 60 steps (about 3 min 00 s, measured 20")


def test_in_a_terminal_the_board_is_live_and_the_screen_is_left_clean(tmp_path: Path) -> None:
    options = ("grpo.max_steps=6", "eval.enabled=false", "merge=false")
    output = in_terminal("train", "smoke", "--run", str(tmp_path / "run"), *options)
    assert b"\x1b[?25l" in output  # the cursor is hidden while the board is redrawn …
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")  # … and shown again
    lines = screen_after(output.decode(), 100, 40)
    (top,) = [i for i, line in enumerate(lines) if line.startswith("╭")]  # one board, and no rest of an older one
    assert lines[top + 1].startswith("│ step 6/6")
    assert any(line.startswith("doctor: ") for line in lines[:top])  # at step 4
    assert any(line.startswith("mean reward") for line in lines[top:])  # the summary comes after it


def test_a_library_s_log_lines_scroll_by_above_the_live_board(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    for name, value in (("COLUMNS", "80"), ("LINES", "25"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rich._console", None)  # it remembers the stream that it was made with
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    log, handler = logging.getLogger("a library"), logging.StreamHandler()  # as transformers' own, made at its import
    monkeypatch.setattr(log, "handlers", [handler])
    with make_view("live", load_recipe(str(ROOT / "recipes" / "smoke.yaml")), print) as view:
        for step in (1, 2, 3):
            view.board.steps.append({"step": step, "reward": 0.5})
            view.draw()
            log.warning("one\ntwo")
        view.draw()
    log.warning("three")
    lines = screen_after(terminal.getvalue(), 80, 25)
    assert [line[:8] for line in lines[:8]] == ["one", "two"] * 3 + ["╭─ smoke", "│ step 3"]
    assert sum(line.startswith("╭") for line in lines) == 1
    assert lines[-1] == "three"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen_after(output: str, columns: int, rows: int) -> list[str]:
    """Return the lines that a terminal of this size shows in the end, with those that have scrolled out of it."""
    import pyte

    screen = pyte.HistoryScreen(columns, rows, history=1000)
    screen.set_mode(pyte.modes.LNM)  # a line feed is a new line
    pyte.Stream(screen).feed(output)
    past = ["".join(line[x].data for x in range(columns)) for line in screen.history.top]
    lines = [line.rstrip() for line in [*past, *screen.display]]
    return "\n".join(lines).rstrip("\n").split("\n")


@pytest.mark.slow
def test_plain_is_plain_in_a_terminal_too(tmp_path: Path) -> None:
    output = in_terminal(
        "train", "smoke", "--plain", "--run", str(tmp_path / "run"), "eval.enabled=false", "merge=false"
    )
    assert b"\x1b" not in output
    assert b"step 3/3 \xc2\xb7 reward" in output


def in_terminal(*arguments: str) -> bytes:
    """Run the command line with a terminal as its output."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    process = shared().start(arguments, [theirs] * 3, environment=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        output += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0, output.decode(errors="replace")
    return output


def test_watch_follows_a_run_by_its_files_until_it_is_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    record = run.read_run()
    unfinished = {k: v for k, v in record.items() if k not in ("finished_at", "trained_at")}
    run.run_file.write_text(json.dumps(unfinished))
    run.metrics_file.write_text(lines[0] + lines[1][:20])  # the second line is being written

    def later(_: float) -> None:
        run.metrics_file.write_text("".join(lines))
        run.update_run(trained_at="x", finished_at="y")

    shown = list(watch_lines(run, sleep=later))
    assert [line.split(" · ")[0] for line in shown] == ["step 1/3", "step 2/3", "step 3/3", f"{run.path}: finished"]
    assert not any("\r" in line for line in shown)


def test_a_run_without_a_step_for_long_is_quiet(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record = {k: v for k, v in run.read_run().items() if k not in ("finished_at", "trained_at")}
    run.run_file.write_text(json.dumps(record))
    assert state_of(run) == "running"
    last_change(run, 3600)
    assert state_of(run) == "quiet"
    run.update_run(resumed_at=["2026-01-01T00:06:00Z"])
    assert state_of(run) == "running"  # it loads, and its first step is yet to come


def test_a_run_paused_by_its_time_budget_is_paused_until_it_is_resumed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record = {k: v for k, v in run.read_run().items() if k not in ("finished_at", "trained_at")}
    run.run_file.write_text(json.dumps({**record, "paused_at": "2026-01-01T00:05:00Z"}))
    assert state_of(run) == "paused"
    run.update_run(resumed_at=["2026-01-01T00:06:00Z"])
    assert state_of(run) == "running"


def test_the_board_names_the_time_budget(tmp_path: Path) -> None:
    board = read_board(write_run(tmp_path / "run", overrides=("limits.max_minutes=90",)))
    assert "budget 1 h 30 min" in as_text(board)


def test_watch_of_a_finished_run_and_of_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = in_process("watch", str(run.path))
    assert text.count("step ") == 12
    assert text.splitlines()[-1].endswith(": finished")
    assert "is not a run" in in_process("watch", str(tmp_path), expect=1)


@pytest.mark.slow
def test_watch_in_another_process_sees_a_real_run_s_steps(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "grpo.max_steps=6")
    try:
        while not (tmp_path / "run" / "recipe.yaml").is_file():
            time.sleep(0.1)
        text = in_process("watch", str(tmp_path / "run"))
    finally:
        kill(process)
    assert "step 6/6" in text
    assert "finished" in text


def group(prompt: str, *rewards: float | None) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": f"{prompt}{r}", "rewards": {"r": r}, "reward": r} for r in rewards]


def test_the_sample_is_the_prompt_whose_rewards_differ_most() -> None:
    rows = [*group("a", 0.0, 0.2), *group("b", 0.0, 1.0, 0.5), *group("c", 1.0, 1.0)]
    lines = describe_sample(rows).splitlines()
    assert [line.strip() for line in lines] == ['prompt "b"', 'best   (+1.00) "b1.0"', 'worst  (+0.00) "b0.0"']


def test_an_episode_is_shown_with_its_calls_and_results_and_a_long_one_without_its_middle() -> None:
    call = {"function": {"name": "guess", "arguments": {"word": "claim"}}}
    turn = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "C L\nG G\x1b[2J"}]
    row = {"prompt": "Play.", "rewards": {"Wordle": 1.0}, "reward": 1.0, "completion": "Found it."}
    said = {"role": "assistant", "content": "Found it."}
    _, line = describe_sample([{**row, "turns": [*turn, said]}]).splitlines()
    assert line.startswith('  all    (+1.00) → guess(word="claim") ← C L G G')
    assert line.endswith('"Found it."')
    assert "\x1b" not in line
    _, line = describe_sample([{**row, "turns": [*turn * 30, said]}]).splitlines()
    assert len(line) < 360
    assert " … " in line
    assert line.endswith('"Found it."')
    assert 'prompt "c"' in describe_sample([*group("a", 0.0, 0.0), *group("c", 1.0, 1.0)])  # none differs: the last


def test_a_sample_without_any_reward_is_shown_too() -> None:
    assert "all    (no reward)" in describe_sample(group("a", None, None))
    assert "worst  (+0.00)" in describe_sample(group("a", None, 1.0, 0.0))


def test_control_characters_of_a_completion_do_not_reach_the_terminal() -> None:
    row = {"prompt": "p", "completion": "\x1b[2J\x9b31m\u202eevil\u2028", "rewards": {"r": 1.0}, "reward": 1.0}
    text = describe_sample([row])
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\\u009b31m\\u202eevil" in text


def test_a_step_without_any_reward_is_shown_as_that() -> None:
    recipe = load_recipe(str(ROOT / "recipes" / "smoke.yaml"))
    board = Board(recipe, total=2, steps=[{"step": 1, "reward": None, "completions/mean_length": 4.0}])
    assert board.line().startswith("step 1/2 · no reward · ")
    assert "step 1/2" in as_text(board)


def test_a_run_that_nobody_works_in_any_more_is_stopped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record = {k: v for k, v in run.read_run().items() if k not in ("finished_at", "trained_at")}
    run.run_file.write_text(json.dumps(record))
    with run.locked():
        assert state_of(run) == "running"
    assert state_of(run) == "running"  # perhaps on another machine: it has just moved
    last_change(run, 60)
    with run.locked():
        assert state_of(run) == "running"  # a slow step
    assert state_of(run) == "stopped"  # Ctrl-C, a kill
    (last,) = [line for line in watch_lines(run) if "stopped" in line]
    assert "the same `train` command resumes it" in last
    run.update_run(finished_at="x")
    assert state_of(run) == "finished"


def test_a_run_that_was_refused_before_its_first_step_is_stopped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for file in (run.metrics_file, run.run_file):
        file.unlink()
    with run.locked():
        pass
    last_change(run, 60)
    assert state_of(run) == "stopped"


def last_change(run: RunDir, seconds_ago: float) -> None:
    then = time.time() - seconds_ago
    for file in (run.recipe_file, run.run_file, run.metrics_file):
        if file.is_file():
            os.utime(file, (then, then))
