"""Data and reward files that change under a run: noted at its start, told on a resume and by reproduce."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.provenance import changed_files, environment_record, file_sums, keep_sums, outside_files
from grpo_lite.runs.run_dir import RunDir, dump_recipe
from tests.command_line import in_process
from tests.run_files import write_run


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / name for name in ("rows.jsonl", "held.jsonl", "mine.py", "score.py")}
    for name, path in made.items():
        path.write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n" if name.endswith("l") else "x = 1\n")
    return made


@pytest.fixture
def recipe(root: Path, files: dict[str, Path]) -> Recipe:
    return load_recipe(
        "smoke",
        [
            f"data.train.path={files['rows.jsonl']}", f"data.eval.path={files['held.jsonl']}", "data.holdout=0",
            f"rewards[0].function={files['mine.py']}:mine", "rewards[0].kwargs={}",
            f"eval.strict=[{{function: '{files['score.py']}:strict'}}]",
        ],
    )  # fmt: skip


def test_every_local_file_that_a_result_depends_on_is_summed(recipe: Recipe, files: dict[str, Path]) -> None:
    sums = file_sums(recipe)
    assert {key: Path(str(entry["path"])).name for key, entry in sums.items()} == {
        "data.train.path": "rows.jsonl", "data.eval.path": "held.jsonl", "rewards[0].function": "mine.py",
        "eval.strict[0].function": "score.py",
    }  # fmt: skip
    # printf 'x = 1\n' | sha256sum
    assert sums["rewards[0].function"]["sha256"] == sums["eval.strict[0].function"]["sha256"]
    assert str(sums["rewards[0].function"]["sha256"]).startswith("9e26bf369911")


def test_a_module_of_one_file_is_found_and_the_package_s_own_rewards_are_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lonely_rewards.py").write_text("raise RuntimeError('it is not run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = load_recipe("smoke", ["rewards[0].function=lonely_rewards.mine", "rewards[0].kwargs={}"])
    assert dict(outside_files(own)) == {"rewards[0].function": tmp_path / "lonely_rewards.py"}
    assert dict(outside_files(load_recipe("smoke"))) == {}


def test_what_changed_or_went_is_said_by_its_key(recipe: Recipe, files: dict[str, Path]) -> None:
    then = file_sums(recipe)
    assert changed_files(then, file_sums(recipe)) == []
    files["rows.jsonl"].write_text("{}\n")
    files["mine.py"].unlink()
    first, second = changed_files(then, file_sums(recipe))
    assert first.startswith(f"data.train.path: {files['rows.jsonl']} has changed since (sha256 ")
    assert second == f"rewards[0].function: {files['mine.py']} cannot be read any more"


@pytest.mark.parametrize("record", [None, [], "x", {"data.train.path": 7}, {"gone.key": {"sha256": "0"}}])
def test_a_run_of_another_version_says_nothing(recipe: Recipe, record: object) -> None:
    assert changed_files(record, file_sums(recipe)) == []


def test_a_session_that_goes_on_tells_and_the_run_keeps_it(
    tmp_path: Path, recipe: Recipe, files: dict[str, Path]
) -> None:
    run, lines = RunDir(tmp_path / "run"), list[str]()
    run.path.mkdir()
    keep_sums(run, recipe, False, lines.append)
    keep_sums(run, recipe, True, lines.append)
    assert lines == []
    files["held.jsonl"].write_text("{}\n")
    keep_sums(run, recipe, True, lines.append)
    keep_sums(run, recipe, True, lines.append)  # against the session before, not the first
    (line,) = lines
    assert line.startswith("data.eval.path: ")
    assert line.endswith("so this is not an exact resume")
    assert len(run.read_run()["changed_files"]) == 1


def test_reproduce_names_a_changed_file(tmp_path: Path, recipe: Recipe, files: dict[str, Path]) -> None:
    run = write_run(tmp_path / "run")
    run.recipe_file.write_text(dump_recipe(recipe))
    run.update_run(**environment_record(), files=file_sums(recipe))
    assert "has changed" not in in_process("reproduce", str(run.path), "--dry-run")
    files["rows.jsonl"].write_text("{}\n")
    text = in_process("reproduce", str(run.path), "--dry-run")
    assert f"reproduce: data.train.path: {files['rows.jsonl']} has changed since" in text
