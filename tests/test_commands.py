"""What commands messages name: `make …` in a checkout, `grpo-lite …` elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from grpo_lite import commands
from grpo_lite.commands import hint, hint_overrides, hint_processes, hint_run, hint_setup, speaks_make
from grpo_lite.report.evidence import Finding


@pytest.fixture
def make(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKELEVEL", "1")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


BOTH = {
    "a run": (("eval",), {"run": "runs/x"}, "make eval RUN=runs/x", "grpo-lite eval runs/x"),
    "a run with a blank": (("eval",), {"run": "a b"}, "make eval RUN='a b'", "grpo-lite eval 'a b'"),
    "a switch": (
        ("merge",),
        {"run": "runs/x", "overwrite": True},
        'make merge RUN=runs/x ARGS="--overwrite"',
        "grpo-lite merge runs/x --overwrite",
    ),
    "an option that make has as a variable": (
        ("export",),
        {"run": "runs/x", "gguf": "q8_0"},
        "make export RUN=runs/x GGUF=q8_0",
        "grpo-lite export runs/x --gguf q8_0",
    ),
    "a recipe with overrides": (
        ("train", "seed=1", "merge=false"),
        {"recipe": "gsm8k", "run": "runs/x"},
        'make train RECIPE=gsm8k RUN=runs/x ARGS="seed=1 merge=false"',
        "grpo-lite train gsm8k seed=1 merge=false --run runs/x",
    ),
    "a recipe that the reader knows": (
        ("train",),
        {"run": "runs/x"},
        "make train RECIPE=… RUN=runs/x",
        "grpo-lite train RECIPE --run runs/x",
    ),
    "two words": (
        ("rewards check",),
        {"recipe": "gsm8k"},
        "make check-rewards RECIPE=gsm8k",
        "grpo-lite rewards check gsm8k",
    ),
    "a repository": (
        ("push",),
        {"run": "runs/x", "repo": "me/x", "force": True},
        "make push RUN=runs/x REPO=me/x FORCE=1",
        "grpo-lite push runs/x me/x --force",
    ),
}


@pytest.mark.parametrize("words, options, expected, _", BOTH.values(), ids=BOTH)
@pytest.mark.usefixtures("make")
def test_a_hint_in_a_checkout_is_a_make_target(words: tuple, options: dict, expected: str, _: str) -> None:
    assert hint(*words, **options) == expected


@pytest.mark.parametrize("words, options, _, expected", BOTH.values(), ids=BOTH)
@pytest.mark.usefixtures("elsewhere")
def test_a_hint_elsewhere_is_a_command(words: tuple, options: dict, _: str, expected: str) -> None:
    assert hint(*words, **options) == expected


@pytest.mark.usefixtures("elsewhere")
def test_pieces_of_commands_follow_the_reader_s_command() -> None:
    assert hint_overrides("a=1 b=2") == "a=1 b=2"
    assert hint_run("runs/x") == "--run runs/x"
    assert hint_setup("unsloth") == "pip install --upgrade 'grpo-lite[unsloth]'"
    assert hint_processes(2).startswith("accelerate launch --multi_gpu --num_processes 2")
    assert Finding("key", "Something.", "a=1").line() == "doctor: Something. Try: a=1"


@pytest.mark.usefixtures("make")
def test_pieces_of_make_commands_are_variables() -> None:
    assert hint_overrides("a=1 b=2") == 'ARGS="a=1 b=2"'
    assert hint_overrides("data.prompt={a} $b") == "ARGS='data.prompt={a} $b'"  # the shell would replace $b
    assert hint_run("runs/x") == "RUN=runs/x"
    assert hint_setup("unsloth") == "make setup BACKEND=unsloth"
    assert hint_processes(2) == "make train GPUS=2"


def test_grpo_lite_typed_in_a_checkout_is_answered_with_grpo_lite(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAKELEVEL", raising=False)
    monkeypatch.setattr(sys, "argv", [str(root / ".venv" / "bin" / "grpo-lite"), "eval", "runs/x"])
    assert not speaks_make()
    monkeypatch.setenv("MAKELEVEL", "1")  # make has started the same program
    assert speaks_make()


def test_an_installed_package_has_no_makefile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setenv("MAKELEVEL", "1")
    assert not speaks_make()
    (tmp_path / "Makefile").touch()
    assert speaks_make()


def test_a_current_directory_that_is_gone_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert not speaks_make()
    os.chdir(tmp_path)
