"""A screen that is gone, and signals: a run ends with a checkpoint, whoever still watches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_lite import screen
from grpo_lite.cli import READER_LEFT
from grpo_lite.screen import progress_lines, quiet_on_broken_pipe
from grpo_lite.session.stop import StopCleanly
from tests.command_line import GRPO_LITE, ROOT
from tests.command_server import shared


def test_what_cannot_be_written_ends_nothing() -> None:
    """A pipe whose reader died: the first line fails, all further ones go to nowhere."""
    code = (
        "from grpo_lite.screen import quiet_on_broken_pipe\n"
        "import sys\n"
        "say = quiet_on_broken_pipe(lambda line: print(line, flush=True))\n"
        "say('one')\n"
        "sys.stdin.read()\n"
        "[say(f'line {n}') for n in range(3)]\n"
        "print('as well', flush=True)\n"
        "sys.exit(7)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"one\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 7
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("verb", [["recipes"], ["show", "smoke"], ["schema"], ["--help"], ["plan", "--all-gpus"]])
def test_a_reader_that_leaves_ends_a_command_quietly(verb: list[str], tmp_path: Path) -> None:
    """`grpo-lite recipes | head -1`, with a `head` that is gone before the first line."""
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "wb") as closed, open(tmp_path / "errors", "wb") as errors, open(os.devnull) as nothing:
        descriptors = [nothing.fileno(), closed.fileno(), errors.fileno()]
        status = shared().start(verb, descriptors, cwd=ROOT, environment=dict(os.environ)).wait(timeout=100)
    assert (tmp_path / "errors").read_text() == ""
    assert status in (0, 1, READER_LEFT)  # `--help` is click's own: 1


@pytest.mark.slow
def test_a_terminal_that_closes_costs_nothing(tmp_path: Path) -> None:
    """SSH drops: SIGHUP comes, and every write to the terminal fails from then on."""
    run = tmp_path / "run"
    master, slave = os.openpty()
    process = subprocess.Popen(
        [*GRPO_LITE, "train", "smoke", "--run", str(run), "grpo.max_steps=300", "grpo.save_steps=1000",
         "eval.enabled=false", "merge=false"],
        cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    seen = b""
    while b"3/300" not in seen:
        seen += os.read(master, 4096)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 130
    (checkpoint,) = run.glob("checkpoint-*")
    assert (checkpoint / "MANIFEST.sha256").is_file()


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopCleanly(print) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert stop.signal_name is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_middle_of_a_line_s_writing_is_kept() -> None:
    """Python refuses to enter a buffered writer twice; the signal must count all the same."""

    def writing(line: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with StopCleanly(writing) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal_name == "SIGTERM"


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_a_process_started_without_a_screen_works_and_no_file_takes_its_number(tmp_path: Path, closed: str) -> None:
    """`nothing` of fd 1 must not become the first file opened: what C code prints would land in it."""
    code = (
        "from grpo_lite.screen import ready_streams, quiet_on_broken_pipe; ready_streams()\n"
        "import sys, os, subprocess; opened = open(sys.argv[1], 'w'); assert opened.fileno() > 2\n"
        "quiet_on_broken_pipe(print)('x'); print('y', file=sys.stderr); assert not sys.stdout.isatty()\n"
        "subprocess.run(['sh', '-c', 'echo z; echo z >&2'], check=True); opened.write('done')"
    )
    command = f'exec "$0" -c "$1" "$2" {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, code, str(tmp_path / "f")], cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "f").read_text() == "done"


@pytest.mark.parametrize("coding", ["ascii", "latin-1", "cp1252"])
def test_what_a_narrow_locale_cannot_say_is_a_question_mark(coding: str) -> None:
    text = subprocess.run(
        [*GRPO_LITE, "rewards", "no-such", "é→שλ"], cwd=ROOT, capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": coding, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert text.returncode == 2
    assert b"Traceback" not in text.stderr + text.stdout
    code = "from grpo_lite.screen import *; ready_streams(); quiet_on_broken_pipe(print)('→ λ é 5')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": coding, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(coding) in ("? ? é 5\n", "? ? ? 5\n")


def test_no_line_steers_the_terminal() -> None:
    """Titles, colours, clipboards, links, hidden text: sequences that a completion or a row may hold."""
    lines: list[str] = []
    quiet_on_broken_pipe(lines.append)("a\x1b]0;title\x07b\x1b[2Jc\x9b31m\u202ed\r\n\te\x1b]52;c;aGk=\x1b\\")
    assert lines == ["a\\u001b]0;title\\u0007b\\u001b[2Jc\\u009b31m\\u202ed\\u000d\n\te\\u001b]52;c;aGk=\\u001b\\"]


def test_a_long_step_shows_how_far_it_is_every_ten_seconds_and_a_short_one_only_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, lines = [100.0], list[str]()
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    progress = progress_lines(lines.append, "evaluating merged, greedy")
    for done in range(1, 11):  # 4 s each: lines after 12 s and 24 s and 36 s
        clock[0] += 4
        progress(done, 10)
    assert lines == [
        "evaluating merged, greedy: 3/10 prompts, about 28 s left",
        "evaluating merged, greedy: 6/10 prompts, about 16 s left",
        "evaluating merged, greedy: 9/10 prompts, about 4 s left",
        "evaluating merged, greedy: 10/10 prompts",
    ]
    lines.clear()
    progress = progress_lines(lines.append, "merging", "MiB")
    progress(5, 10)
    progress(10, 10)
    assert lines == ["merging: 10/10 MiB"]
