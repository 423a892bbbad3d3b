"""Run the command line: in a process forked from the server, or within the test's."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from click.testing import CliRunner

from tests.command_server import Command, shared

ROOT = Path(__file__).resolve().parent.parent
GRPO_LITE = [sys.executable, "-W", "ignore", "-m", "grpo_lite.cli"]


def grpo_lite(*arguments: str, expect: int = 0, cwd: str | Path = ROOT, **environment: str) -> str:
    """Run a command in a forked process; return its output, then its errors.

    Args:
        environment: variables that are read after the imports.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        descriptors = [nothing.fileno(), out.fileno(), err.fileno()]
        command = shared().start(arguments, descriptors, cwd=cwd, environment={**os.environ, **environment})
        status = command.wait(timeout=500)
        out.seek(0)
        err.seek(0)
        text = out.read() + err.read()
    assert status == expect, text
    assert "Traceback" not in text, text
    return text


def in_process(*arguments: str, expect: int = 0) -> str:
    """Run a command that fails or ends before training, without a process of its own."""
    from grpo_lite.cli import main

    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback, where a user should have met a message
    assert result.exit_code == expect, result.output
    return result.output


def start(run: Path, *overrides: str) -> Command:
    """Start a training in a forked process; its output and errors come from `stdout`."""
    ours, theirs = os.pipe()
    with open(theirs, "wb") as output, open(os.devnull) as nothing:
        descriptors = [nothing.fileno(), output.fileno(), output.fileno()]
        return shared().start(["train", "smoke", "--run", str(run), *overrides], descriptors, stdout=open(ours))


def read_until(process: Command, text: str) -> str:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


def kill(process: Command) -> None:
    process.kill()
    process.communicate(timeout=60)


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
