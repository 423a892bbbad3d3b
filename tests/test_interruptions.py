"""Interruptions at awkward moments of a real run: a signal in its last step, a disk that fills while it logs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_lite.errors import TrainingError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs import checkpoints
from grpo_lite.runs.checkpoints import checkpoint_folders, last_usable
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.train import train_run

# Called before the step's end, in the process that trains.
REWARD = """
import os, signal

def mine(completion_ids, trainer_state=None, **_):
    step = trainer_state.global_step + 1
    {action}
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]
"""


def recipe_of(folder: Path, action: str, *overrides: str) -> Recipe:
    path = folder / "mine.py"
    path.write_text(REWARD.format(action=action))
    own = [f"rewards=[{{function: '{path}:mine'}}]", "model.load_in=32bit", "check.enabled=false", "grpo.save_steps=1"]
    return load_recipe("smoke", [*own, *overrides])


ALL = ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP"))]


@pytest.mark.parametrize("name", ALL)
def test_a_signal_while_it_trains_saves_a_checkpoint_at_the_end_of_the_step(
    root: Path, tmp_path: Path, name: str
) -> None:
    action = f"step == 2 and os.kill(os.getpid(), signal.{name})"
    recipe = recipe_of(tmp_path, action, "grpo.max_steps=4", "grpo.save_steps=100")
    run = RunDir(tmp_path / "run")
    result = train_run(recipe, run, lambda line: None)
    assert (result.stopped_by, result.steps) == (name, 2)
    assert last_usable(run.path).folder == run.path / "checkpoint-2"
    assert not run.adapter.exists()
    assert run.prepare(recipe) == "resume"


@pytest.mark.slow
def test_a_signal_in_the_preflight_stops_after_the_first_step(root: Path, tmp_path: Path) -> None:
    action = "trainer_state is None and os.kill(os.getpid(), signal.SIGTERM)"
    recipe = recipe_of(tmp_path, action, "grpo.max_steps=4", "grpo.save_steps=100", "log.preflight=true")
    path = tmp_path / "mine.py"  # the probe, unlike TRL, has no state to give
    path.write_text(path.read_text().replace("trainer_state.global_step", "getattr(trainer_state, 'global_step', 0)"))
    run, lines = RunDir(tmp_path / "run"), list[str]()
    result = train_run(recipe, run, lines.append)
    assert any(line.startswith("preflight: 32 prompts") for line in lines)
    assert (result.stopped_by, result.steps) == ("SIGTERM", 1)
    assert last_usable(run.path).folder == run.path / "checkpoint-1"


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True], ids=["SIGTERM", "Ctrl-C twice"])
def test_a_signal_while_a_checkpoint_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    """Once: that checkpoint is finished, and the step behind it saved. Twice: it is given up, the one before stays."""
    seal = checkpoints.seal

    def signalled(folder: Path) -> None:
        if folder.name == "checkpoint-2":
            os.kill(os.getpid(), signal.SIGINT if twice else signal.SIGTERM)
            if twice:
                os.kill(os.getpid(), signal.SIGINT)
        seal(folder)

    monkeypatch.setattr(checkpoints, "seal", signalled)
    run = RunDir(tmp_path / "run")
    recipe = recipe_of(tmp_path, "pass", "grpo.max_steps=5")
    if twice:
        with pytest.raises(KeyboardInterrupt):
            train_run(recipe, run, lambda line: None)
        assert last_usable(run.path).folder == run.path / "checkpoint-1"
        assert not list(run.path.glob(".saving-*"))
    else:
        result = train_run(recipe, run, lambda line: None)
        assert (result.stopped_by, result.steps) == ("SIGTERM", 3)
        assert {folder.name for folder in checkpoint_folders(run.path)} >= {"checkpoint-2", "checkpoint-3"}
        assert last_usable(run.path).skipped == ()
    assert run.prepare(recipe) == "resume"


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_a_signal_in_the_last_step_leaves_the_evaluation_to_the_next_train(
    root: Path, tmp_path: Path, name: str
) -> None:
    """The session ends in seconds: what is trained is saved, and nothing is begun that would be cut off."""
    recipe = recipe_of(tmp_path, f"step == 2 and os.kill(os.getpid(), signal.{name})", "grpo.max_steps=2")
    run, lines = RunDir(tmp_path / "run"), list[str]()
    result = train_run(recipe, run, lines.append)
    assert (result.stopped_by, result.steps) == (name, 2)
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert not any("evaluating" in line for line in lines)
    assert not run.scores_file.exists()
    assert run.read_run()["steps"] == 2
    assert run.prepare(recipe) == "finish"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB: room for a run and what it asks to have spare; skips where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (not root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_in_the_middle_of_a_step_ends_with_a_usable_checkpoint(
    root: Path, tmp_path: Path, disk: Path
) -> None:
    """Somebody else's file, written while a reward is computed: what fails first is a log, not a checkpoint."""
    filler = disk / "of somebody else"
    action = f"step == 3 and not os.path.exists({str(filler)!r}) and os.system('cat /dev/zero > \"{filler}\" 2>&-')"
    recipe = recipe_of(tmp_path, action, "grpo.max_steps=4", "eval.enabled=false", "merge=false")
    run = RunDir(disk / "run")
    with pytest.raises(TrainingError, match=r"the disk is full \(0 MiB free\)") as caught:
        train_run(recipe, run, lambda line: None)
    assert f"{run.path / 'checkpoint-2'} is whole" in str(caught.value)
    assert last_usable(run.path).folder == run.path / "checkpoint-2"
    assert not list(run.path.rglob(".*.tmp"))
    filler.unlink()
    filler.touch()  # tells the reward that it has been
    lines: list[str] = []
    train_run(recipe, run, lines.append)
    assert any(line.startswith("resuming from step 2") for line in lines)
    assert [line.count('"step"') for line in run.metrics_file.read_text().splitlines()] == [1, 1, 1, 1]
