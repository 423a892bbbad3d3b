"""The run directory: begun, resumed, refused, never overwritten."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import yaml

from grpo_lite.errors import RecipeError, RunDirError
from grpo_lite.files.atomic import write_atomic
from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir, dump_recipe


def checkpoint(run: RunDir, step: int) -> Path:
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_a_new_run_keeps_its_resolved_recipe(root: Path, tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path / "a" / "b"), load_recipe("smoke")
    assert run.prepare(recipe) == "new"
    assert run.load_recipe() == recipe


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\ufeff", "\x00", "é", "a\n\n b", " x "])
def test_any_character_of_a_recipe_comes_back_from_its_yaml(root: Path, mark: str) -> None:
    """PyYAML writes U+0085 as it is and reads a line end: such a run could not have been resumed."""
    for text in (mark, f"a{mark}b", f"{mark}\n- b: '{mark}"):
        recipe = load_recipe("smoke").model_copy(update={"description": text})
        assert yaml.safe_load(dump_recipe(recipe))["description"] == text


def test_an_interrupted_run_is_resumed_from_its_newest_checkpoint(root: Path, tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path / "r"), load_recipe("smoke")
    run.prepare(recipe)
    assert run.prepare(recipe) == "new"  # nothing was saved yet
    checkpoint(run, 2)
    last = checkpoint(run, 10)
    (run.path / "checkpoint-12").mkdir()  # half-written: no trainer_state.json
    assert run.prepare(recipe) == "resume"
    assert run.last_checkpoint() == last


def test_a_run_of_an_earlier_release_resumes_without_the_keys_that_were_removed(root: Path, tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path / "r"), load_recipe("smoke")
    run.prepare(recipe)
    checkpoint(run, 2)
    old = run.recipe_file.read_text().replace("  refill: 0\n", "  refill: 0\n  difficulty: false\n")
    assert "difficulty" in old
    run.recipe_file.write_text(old)
    run.recipe_file.write_text(old.replace("difficulty: false", "difficulty: true"))
    assert run.load_recipe() == recipe  # to score, merge and export it
    with pytest.raises(RunDirError, match=r"cannot be continued\. sampling\.difficulty: removed"):
        run.prepare(recipe)
    run.recipe_file.write_text(old)
    assert run.prepare(recipe) == "resume"
    assert run.load_recipe() == recipe


def test_a_run_of_before_tools_resumes(root: Path, tmp_path: Path) -> None:
    recipe, run = load_recipe("smoke"), RunDir(tmp_path / "run")
    run.prepare(recipe)
    run.update_run(started_at="2026-01-01T00:00:00Z")
    raw = yaml.safe_load(run.recipe_file.read_text())
    assert (raw.pop("tools"), raw.pop("environment"), raw["model"].pop("chat_template")) == ([], None, None)
    raw["sampling"] = {"refill": raw["sampling"]["refill"]}
    run.recipe_file.write_text(yaml.safe_dump(raw))
    assert run.prepare(recipe) == "new"  # no checkpoint yet
    with pytest.raises(RunDirError, match="was started with another recipe"):
        run.prepare(load_recipe("smoke", ["model.chat_template=smollm2-tools"]))


def test_a_run_of_before_further_held_out_rows_resumes(root: Path, tmp_path: Path) -> None:
    recipe, run = load_recipe("smoke"), RunDir(tmp_path / "run")
    run.prepare(recipe)
    run.update_run(started_at="2026-01-01T00:00:00Z")
    raw = yaml.safe_load(run.recipe_file.read_text())
    assert raw["eval"].pop("also") == {}
    run.recipe_file.write_text(yaml.safe_dump(raw))
    assert run.prepare(recipe) == "new"  # no checkpoint yet
    with pytest.raises(RunDirError, match="was started with another recipe"):
        run.prepare(load_recipe("smoke", ["eval.also={hard: {generator: sums}}"]))


def test_what_a_merge_goes_onto_may_change_and_earlier_runs_do_not_say(root: Path, tmp_path: Path) -> None:
    recipe, run = load_recipe("smoke"), RunDir(tmp_path / "run")
    run.prepare(recipe)
    run.update_run(started_at="2026-01-01T00:00:00Z")
    raw = yaml.safe_load(run.recipe_file.read_text())
    assert raw.pop("merge_onto") == "auto"
    run.recipe_file.write_text(yaml.safe_dump(raw))
    assert run.prepare(recipe) == "new"  # no checkpoint yet
    assert run.prepare(load_recipe("smoke", ["merge_onto=trained"])) == "new"
    assert run.load_recipe().merge_onto == "trained"


def test_a_finished_run_is_never_overwritten(root: Path, tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path / "r"), load_recipe("smoke")
    run.prepare(recipe)
    run.update_run(trained_at="2026-01-01")
    assert run.prepare(recipe) == "finish"  # killed while it was evaluated or merged
    run.update_run(finished_at="2026-01-01")
    assert run.prepare(recipe) == "report"  # killed before it was written
    run.report_file.write_text("<html>")
    with pytest.raises(RunDirError, match=r"holds a finished run, and it is not overwritten"):
        run.prepare(recipe)


def test_a_changed_recipe_is_refused_with_the_difference(root: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    run.prepare(load_recipe("smoke"))
    run.update_run(started_at="2026-01-01")
    with pytest.raises(RunDirError) as caught:
        run.prepare(load_recipe("smoke", ["grpo.beta=0.5"]))
    assert "-  beta: 0.01" in str(caught.value)
    assert "+  beta: 0.5" in str(caught.value)


def test_a_run_that_was_refused_before_it_began_takes_the_corrected_recipe(root: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    run.prepare(load_recipe("smoke"))
    corrected = load_recipe("smoke", ["grpo.beta=0.5"])
    assert run.prepare(corrected) == "new"
    assert run.load_recipe() == corrected


def test_a_folder_of_other_files_is_not_taken(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunDirError, match=r"is not empty \(thesis.tex\)"):
        RunDir(tmp_path).prepare(load_recipe("smoke"))


def test_a_path_that_cannot_be_written_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=r"not writable \(Not a directory\)"):
        RunDir(tmp_path / "file" / "run").prepare(load_recipe("smoke"))
    with pytest.raises(RunDirError, match="not writable"), RunDir(tmp_path / "file" / "run").locked():
        pass


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="is not a run"):
        RunDir(tmp_path).load_recipe()


def _try_lock(path: Path, answers: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    try:
        with RunDir(path).locked():
            answers.put("taken")
    except RunDirError as error:
        answers.put(str(error))


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with RunDir(tmp_path).locked():
        process = context.Process(target=_try_lock, args=(tmp_path, answers))
        process.start()
        assert "another process is working in it" in answers.get(timeout=60)
        process.join()
    with RunDir(tmp_path).locked():
        pass


def test_run_json_merges_values_and_names_damage(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.update_run(a=1)
    run.update_run(b=2)
    assert run.read_run() == {"a": 1, "b": 2}
    for text, fault in (("{", "is not valid JSON"), ("[1]", "holds a list"), ("[" * 99_999, "is not valid JSON")):
        run.run_file.write_text(text)
        with pytest.raises(RunDirError, match=fault):
            run.read_run()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")  # a lone surrogate cannot be encoded
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("text", [b"[", b"- a list", b"\xff", b"a: &a [*a]", b""])
def test_a_damaged_recipe_in_a_run_is_named(root: Path, tmp_path: Path, text: bytes) -> None:
    run = RunDir(tmp_path / "run")
    run.prepare(load_recipe("smoke"))
    run.recipe_file.write_bytes(text)
    with pytest.raises(RecipeError, match=re.escape(str(run.recipe_file))):
        run.prepare(load_recipe("smoke"))


def test_limits_may_change_between_sessions(root: Path, tmp_path: Path) -> None:
    """Nine hours today, twelve tomorrow: it is the same run."""
    run = RunDir(tmp_path / "r")
    run.prepare(load_recipe("smoke", ["limits.max_minutes=500"]))
    run.prepare(load_recipe("smoke", ["limits.max_minutes=700", "push_checkpoints=me/x", "log.sample_every=1"]))
    assert run.load_recipe().limits.max_minutes == 700


def test_a_fetch_that_was_killed_is_no_stranger(root: Path, tmp_path: Path) -> None:
    (tmp_path / "r" / ".saving-fetched" / "checkpoint-3").mkdir(parents=True)
    assert RunDir(tmp_path / "r").prepare(load_recipe("smoke")) == "new"


def test_scraps_of_killed_writes_are_cleared_and_files_in_use_are_not(root: Path, tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path / "r"), load_recipe("smoke")
    run.prepare(recipe)
    (run.path / "completions").mkdir()
    gone = multiprocessing.get_context("spawn").Process()
    gone.start()
    gone.join()
    scraps = [run.path / f".run.json.{gone.pid}.tmp", run.path / "completions" / f".step_000001.jsonl.{gone.pid}.tmp"]
    used = run.path / f".report.html.{os.getppid()}.tmp"
    for path in (*scraps, used):
        path.touch()
    run.prepare(recipe)
    assert not any(path.exists() for path in scraps)
    assert used.exists()


def test_a_drive_without_locks_can_hold_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("grpo_lite.files.lock.fcntl.flock", no_locks)
    with RunDir(tmp_path / "r").locked():
        pass
