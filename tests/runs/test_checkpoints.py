"""Checkpoint folders: whole or absent, checksummed, the newest usable one found, the best and the last kept."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_lite.errors import TrainingError
from grpo_lite.runs import checkpoints
from grpo_lite.runs.checkpoints import (
    best_checkpoint,
    checkpoint_folders,
    last_usable,
    publishing,
    require_room,
    rotate,
    saving,
)


def save(run: Path, step: int, reward: float | None = None, size: int = 10) -> Path:
    with saving(run, step) as scratch:
        folder = scratch / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"w" * size)
        (folder / checkpoints.FACTS_FILE).write_text(json.dumps({"step": step, "reward": reward}))
    return run / f"checkpoint-{step}"


def test_the_newest_by_number_is_used_not_by_name_or_time(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save(tmp_path, step)
    assert last_usable(tmp_path).folder == tmp_path / "checkpoint-100"
    assert last_usable(tmp_path).skipped == ()


DAMAGE = {
    "truncated": lambda folder: os.truncate(folder / "weights", 3),
    "corrupted": lambda folder: (folder / "weights").write_bytes(b"x" * 10),
    "missing": lambda folder: (folder / "weights").unlink(),
    "has no MANIFEST": lambda folder: (folder / "MANIFEST.sha256").unlink(),
    "MANIFEST.sha256: line 4": lambda folder: os.truncate(folder / "MANIFEST.sha256", 150),
    "extra": lambda folder: (folder / "more").write_bytes(b""),
}


@pytest.mark.parametrize("named", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, named: str) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGE[named](newest)
    found = last_usable(tmp_path)
    assert found.folder == before
    assert len(found.skipped) == 1
    assert "checkpoint-2" in found.skipped[0]
    assert named in found.skipped[0]


def test_a_renamed_checkpoint_is_not_taken_for_a_later_step(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-7")
    assert last_usable(tmp_path).folder is None


def break_off(run: Path, step: int, error: BaseException) -> None:
    with saving(run, step) as scratch:
        (scratch / f"checkpoint-{step}").mkdir()
        raise error


def test_an_interrupted_save_leaves_the_one_before_and_no_scraps(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        break_off(tmp_path, 2, KeyboardInterrupt())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".replaced-checkpoint-1")
    (tmp_path / ".saving-123").mkdir()
    checkpoints.clear_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_pickles_that_nobody_loads_are_not_kept(tmp_path: Path) -> None:
    with publishing(tmp_path / "adapter") as folder:
        (folder / "training_args.bin").write_bytes(b"pickle")
        (folder / "adapter_model.safetensors").write_bytes(b"")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "MANIFEST.sha256", "adapter_model.safetensors",
    ]  # fmt: skip


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    for step, reward in ((1, 0.1), (2, 0.9), (3, 0.3), (4, 0.2), (5, None)):
        save(tmp_path, step, reward)
        rotate(tmp_path, 2, step)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert best_checkpoint(checkpoint_folders(tmp_path)) == tmp_path / "checkpoint-2"


def test_damaged_checkpoints_of_later_steps_do_not_push_the_new_one_out(tmp_path: Path) -> None:
    """Two newer ones were passed over: with save_total_limit = 2 they would otherwise be all that is kept."""
    for step, reward in ((3, 0.1), (9, 0.9), (12, 0.2)):
        save(tmp_path, step, reward)
    for step in (9, 12):
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"x" * 10)
    assert last_usable(tmp_path).folder == tmp_path / "checkpoint-3"
    save(tmp_path, 6, 0.05)
    rotate(tmp_path, 2, 6)
    assert last_usable(tmp_path).folder == tmp_path / "checkpoint-6"
    save(tmp_path, 9, 0.3)
    rotate(tmp_path, 2, 9)
    save(tmp_path, 12, 0.2)
    rotate(tmp_path, 2, 12)
    assert last_usable(tmp_path) == checkpoints.LastUsable(tmp_path / "checkpoint-12", ())
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-9", "checkpoint-12"]


@pytest.mark.parametrize(
    ("facts", "left"),
    [
        ({"processes": "two", "reward": "much", "seconds_trained": None, "faults": [1], "budget": 7}, {}),
        ({"processes": -1, "reward": True, "faults": {"x": None}, "budget": {"rollout_kv_tokens": "9" * 9}}, {}),
        ({"reward": float("inf"), "seconds_trained": float("nan"), "budget": {"rollout_kv_tokens": 0}}, {}),
        ({"reward": None, "other": 1, "faults": {"x": 2}}, {"reward": None, "faults": {"x": 2}}),
    ],
)
def test_facts_of_another_kind_are_not_taken(tmp_path: Path, facts: dict[str, object], left: dict[str, object]) -> None:
    """A checkpoint of a shared drive comes with a right manifest, and anything in its files."""
    folder = save(tmp_path, 1)
    (folder / checkpoints.FACTS_FILE).write_text(json.dumps({"step": 1, **facts}))
    checkpoints.seal(folder)
    assert checkpoints.read_facts(folder) == {"step": 1, **left}
    assert last_usable(tmp_path).folder == folder
    assert (checkpoints.processes_of(folder), best_checkpoint([folder])) == (1, None)


def test_a_manifest_with_an_absurd_size_is_a_fault_and_no_traceback(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "checkpoint-1" / "MANIFEST.sha256"
    manifest.write_text(manifest.read_text().replace("# 10 bytes", f"# {'9' * 5000} bytes"))
    assert last_usable(tmp_path).folder is None


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "quota"),
                                   RuntimeError("I/O error: No space left on device (os error 28)")],
                         ids=["ENOSPC", "EDQUOT", "safetensors"])  # fmt: skip
def test_a_full_disk_is_told_with_the_checkpoint_that_is_whole(tmp_path: Path, error: Exception) -> None:
    save(tmp_path, 1)
    with pytest.raises(TrainingError, match=r"the disk is full .* checkpoint-2 was not saved\..*checkpoint-1 is whole"):
        break_off(tmp_path, 2, error)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; skips where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here (not root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_while_a_checkpoint_is_written_keeps_the_one_before(small_disk: Path) -> None:
    save(small_disk, 1, size=300_000)
    with pytest.raises(TrainingError, match="checkpoint-2 was not saved"):
        save(small_disk, 2, size=3 << 20)
    assert last_usable(small_disk).folder == small_disk / "checkpoint-1"
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-1"]


def test_a_disk_too_full_for_the_next_checkpoint_is_noticed_before_anything_is_written(small_disk: Path) -> None:
    save(small_disk, 1, size=900_000)
    (small_disk / "other").write_bytes(b"x" * 1_000_000)
    with pytest.raises(TrainingError, match="MiB free"):
        break_off(small_disk, 2, AssertionError("it was begun"))


def test_a_run_that_would_not_fit_on_the_disk_is_refused_before_it_begins(small_disk: Path) -> None:
    """The arithmetic of 2 MiB: no room for three checkpoints of 16 MiB and what is spare."""
    with pytest.raises(TrainingError, match=r"0\.00 GiB of disk are free, and this run needs 0\.05 GiB: 3 checkpoints"):
        require_room(small_disk, trained=100_000, kept=2, merge_bytes=1 << 20)


def test_a_run_that_fits_is_let_begin(tmp_path: Path) -> None:
    require_room(tmp_path, trained=1000, kept=1, merge_bytes=0)
