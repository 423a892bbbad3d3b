"""The command line where PyTorch is not installed: it says so, and lists and shows recipes all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_TORCH = """
import importlib.machinery as machinery, sys
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = staticmethod(lambda name, *rest: None if name == "torch" else find(name, *rest))
sys.argv[0] = "grpo-lite"
from grpo_lite.cli import main
main()
"""


@pytest.mark.parametrize(
    "arguments, expect, text",
    [
        (
            ["doctor"],
            0,
            "device: unknown, because PyTorch is not installed. Install it: pip install --upgrade grpo-lite",
        ),
        (["doctor"], 0, "sandbox for model-written code:"),
        (["recipes"], 0, "quickstart"),
        (["merge", "."], 1, "error: "),
        (["train", "smoke"], 1, "error: the Python package torch is not installed. Install it: pip install --upgrade"),
    ],
    ids=["the device", "the sandbox", "recipes", "a folder that is no run", "training"],
)
def test_what_needs_no_torch_works_and_the_rest_says_what_is_missing(
    tmp_path: Path, arguments: list[str], expect: int, text: str
) -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    assert text in done.stdout + done.stderr
    assert "is a bug in grpo_lite" not in done.stderr
