"""`grpo-lite init`: the project is complete, is not written over another, and trains."""

from __future__ import annotations

import doctest
import importlib.util
import json
from pathlib import Path

import pytest

from grpo_lite.recipe.load import load_recipe
from tests.command_line import grpo_lite, in_process


@pytest.fixture
def project(tmp_path: Path) -> Path:
    in_process("init", str(tmp_path / "my task"))
    return tmp_path / "my task"


def test_the_project_has_a_recipe_a_reward_rows_and_a_readme(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in project.iterdir()) == ["README.md", "recipe.yaml", "reward.py", "rows.jsonl"]
    monkeypatch.chdir(project)
    recipe = load_recipe("recipe.yaml")
    assert (recipe.name, recipe.model.id) == ("my-task", "embedded/SmolLM2-135M-Instruct")


def test_the_rows_are_distinct_and_right(project: Path) -> None:
    rows = [json.loads(line) for line in (project / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["question"] for row in rows}) == 200
    assert all(sum(map(int, row["question"].split("+"))) == int(row["answer"]) for row in rows)


def test_the_reward_does_what_its_example_says(project: Path) -> None:
    spec = importlib.util.spec_from_file_location("project_reward", project / "reward.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module) == (0, 1)
    assert module.right_number([[{"role": "assistant", "content": "12\n3"}]], ["12"]) == [1.0]


def test_the_output_names_the_next_commands(tmp_path: Path) -> None:
    text = in_process("init", str(tmp_path / "a b"))
    assert f"cd '{tmp_path / 'a b'}'\n  grpo-lite check recipe.yaml\n  grpo-lite train recipe.yaml\n" in text


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("mine", encoding="utf-8")
    text = in_process("init", str(tmp_path), expect=1)
    assert "holds reward.py already, and nothing is overwritten" in text
    assert [path.name for path in tmp_path.iterdir()] == ["reward.py"]


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written (Not a directory)" in in_process("init", str(tmp_path / "file" / "x"), expect=1)


@pytest.mark.slow
@pytest.mark.weights
def test_the_project_trains(project: Path) -> None:
    grpo_lite("rewards", "check", "recipe.yaml", cwd=project)
    short = ["grpo.max_steps=2", "grpo.gradient_accumulation_steps=1", "grpo.per_device_train_batch_size=16"]
    text = grpo_lite("train", "recipe.yaml", *short, "eval.limit=8", "merge=false", cwd=project)
    assert "trained 2 steps" in text
    assert (project / "runs" / "my-task" / "report.html").is_file()
