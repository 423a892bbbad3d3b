"""Run the command line: as a process of its own, or within the test's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
GRPO_LITE = [sys.executable, "-W", "ignore", "-m", "grpo_lite.cli"]


def grpo_lite(*arguments: str, expect: int = 0, **environment: str) -> str:
    result = subprocess.run(
        [*GRPO_LITE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    text = result.stdout + result.stderr
    assert result.returncode == expect, text
    assert "Traceback" not in text, text
    return text


def in_process(*arguments: str, expect: int = 0) -> str:
    """Run a command that fails or ends before training, without paying a new interpreter's imports."""
    from grpo_lite.cli import main

    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback, where a user should have met a message
    assert result.exit_code == expect, result.output
    return result.output


def start(run: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*GRPO_LITE, "train", "smoke", "--run", str(run), *overrides],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=60)


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
