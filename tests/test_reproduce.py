"""reproduce: the same recipe again, what differs from then, and whether it came to the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_lite.reproduce import differences, result_lines
from grpo_lite.runs.provenance import environment_record
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.train import train_run
from tests.command_line import in_process
from tests.run_files import write_run


def test_what_differs_is_said_line_by_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.update_run(**environment_record())
    run.update_run(
        versions={**environment_record()["versions"], "trl": "1.13.0", "unsloth": "2026.10.9"},
        device={"kind": "cuda", "name": "Tesla T4", "compute_capability": [7, 5], "bfloat16": False},
        git_commit="0123456789ab-dirty",
    )
    lines = differences(run)
    assert any(line.startswith("trl: 1.13.0 then, ") for line in lines)
    assert "unsloth: 2026.10.9 then, not installed now" in lines
    assert any(line.startswith("device kind: cuda then, ") for line in lines)
    assert any("Tesla T4" in line for line in lines)
    assert any("uncommitted" in line for line in lines)
    assert not any(line.startswith("torch:") for line in lines)


def test_a_run_without_a_record_cannot_be_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.run_file.unlink()
    assert "has no record of its versions" in in_process("reproduce", str(run.path), "--dry-run", expect=1)


def test_results_are_compared_step_by_step(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", solved=(5, 14))
    assert result_lines(one, one)[0] == "reward: the same in all 12 steps"
    records = [json.loads(line) for line in two.metrics_file.read_text().splitlines()]
    records[4]["reward"] += 0.25
    two.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = result_lines(one, two)
    assert "the same for 4 steps, then apart by up to 0.250 (step 5:" in lines[0]
    assert lines[1] == "held-out lenient: 0.250 → 0.750 then, 0.250 → 0.700 now: differs"


@pytest.mark.slow
def test_the_same_machine_comes_to_the_same_result(tmp_path: Path, root: Path) -> None:
    from grpo_lite.recipe.load import load_recipe

    run = RunDir(tmp_path / "run")
    small = ["grpo.max_steps=2", "eval.samples=0", "merge=false"]
    train_run(load_recipe("smoke", small), run, lambda line: None)
    text = in_process("reproduce", str(run.path))
    assert "reproduce: " in text
    assert "reward: the same in all 2 steps" in text
    assert text.count(": the same") >= 3
    assert RunDir(tmp_path / "run-again").read_run()["finished_at"]
    assert "holds a finished run" in in_process("reproduce", str(run.path), expect=1)


@pytest.mark.parametrize("option", ["--dry-run"])
def test_a_dry_run_trains_nothing(tmp_path: Path, option: str) -> None:
    run = write_run(tmp_path / "run")
    assert "reproduce: " in in_process("reproduce", str(run.path), option)
    assert not (tmp_path / "run-again").exists()


def test_a_run_given_as_the_folder_one_stands_in_is_repeated_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_run(tmp_path / "run").path)
    begun: list[RunDir] = []

    def train(recipe: object, run: RunDir, show: object) -> object:
        begun.append(run)
        return type("Result", (), {"stopped_by": None})()

    monkeypatch.setattr("grpo_lite.train.train_run", train)
    in_process("reproduce", ".")
    assert begun[0].path == tmp_path / "run-again"


def test_a_run_of_unsloth_s_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.update_run(**environment_record())
    begun = run.recipe_file.read_text()
    run.recipe_file.write_text(begun.replace("backend: auto", "backend: unsloth"))
    assert run.recipe_file.read_text() != begun
    text = in_process("reproduce", str(run.path), expect=1)
    assert "this run was started with unsloth" in text
    assert not (tmp_path / "run-again").exists()
