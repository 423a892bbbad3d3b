"""push_checkpoints: a folder or the Hub keeps what a new machine needs to go on; faults there never stop training."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grpo_lite.errors import RunDirError, TrainingError
from grpo_lite.runs import checkpoints
from grpo_lite.runs.checkpoints import last_usable, rotate, saving
from grpo_lite.runs.remote import fetch_checkpoint, remote_of
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.session.records import PushCheckpoints
from tests.command_line import in_process, steps_of
from tests.command_server import Server
from tests.export.hub_server import Bucket, Hub, hub_in_place
from tests.killing import ALONE, FAST

BUCKET = "me/checkpoints"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_in_place(monkeypatch, tmp_path / "hub-cache") as state:
        yield state


class State:
    def __init__(self, step: int) -> None:
        self.global_step = step


def train_until(run: RunDir, address: str, show: Callable[[str], None], *steps: int) -> None:
    """Save checkpoints as training does, and let the callback copy them."""
    run.path.mkdir(exist_ok=True)
    run.recipe_file.write_text("name: x\n")
    push = PushCheckpoints(run, remote_of(address, run), show)
    for step in steps:
        run.metrics_file.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, step + 1)))
        with saving(run.path, step) as scratch:
            folder = scratch / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "adapter_model.safetensors").write_bytes(bytes(str(step), "ascii") * 1000)
            (folder / checkpoints.FACTS_FILE).write_text(json.dumps({"step": step, "reward": None}))
        rotate(run.path, 2, step)
        push.on_save(None, State(step), None)


def places(tmp_path: Path) -> dict[str, str]:
    return {"folder": str(tmp_path / "drive"), "hub": BUCKET}


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_a_new_machine_gets_the_newest_checkpoint_and_what_goes_with_it(hub: Hub, tmp_path: Path, kind: str) -> None:
    address, lines = places(tmp_path)[kind], []
    train_until(RunDir(tmp_path / "run"), address, lines.append, 1, 2, 3)
    shutil.rmtree(tmp_path / "run")
    run = RunDir(tmp_path / "run")
    fetch_checkpoint(run, address, lines.append)
    found = last_usable(run.path)
    assert (found.folder, found.skipped) == (run.path / "checkpoint-3", ())
    assert (run.path / "checkpoint-3" / "adapter_model.safetensors").read_bytes() == b"3" * 1000
    assert steps_of(run.path) == [1, 2, 3]
    assert run.recipe_file.is_file()
    assert remote_of(address, run).steps() == [2, 3]  # as many as are kept here
    assert f"fetched checkpoint-3 from {remote_of(address, run).name}" in lines[-1]


def test_a_run_on_the_hub_may_have_a_name_that_reads_as_a_pattern(hub: Hub, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run [1-3] *")
    train_until(run, BUCKET, lambda line: None, 1, 2, 3)
    shutil.rmtree(run.path)
    fetch_checkpoint(run, BUCKET, lambda line: None)
    assert last_usable(run.path).folder == run.path / "checkpoint-3"


def test_a_bucket_for_checkpoints_is_private(hub: Hub, tmp_path: Path) -> None:
    train_until(RunDir(tmp_path / "run"), BUCKET, lambda line: None, 1)
    assert hub.buckets[BUCKET].private


def test_checkpoints_are_not_put_into_a_public_bucket(hub: Hub, tmp_path: Path) -> None:
    lines: list[str] = []
    hub.buckets[BUCKET] = Bucket(private=False)
    train_until(RunDir(tmp_path / "run"), BUCKET, lines.append, 1)
    assert "it exists and is public" in lines[0]
    assert hub.buckets[BUCKET].files == {}


def test_what_goes_to_a_bucket_ends_with_the_manifest_and_old_files_are_deleted_after_it(
    hub: Hub, tmp_path: Path
) -> None:
    """A bucket has no transactions and no history: a batch that breaks must leave the last whole checkpoint."""
    train_until(RunDir(tmp_path / "run"), BUCKET, lambda line: None, 1, 2, 3)
    names = ["adapter_model.safetensors", checkpoints.FACTS_FILE, "MANIFEST.sha256"]
    assert [[(line["type"], line["path"]) for line in batch] for batch in hub.buckets[BUCKET].batches[-2:]] == [
        [("addFile", f"run/{name}") for name in ("recipe.yaml", "metrics.jsonl")]
        + [("addFile", f"run/checkpoint-3/{name}") for name in names],
        [("deleteFile", f"run/checkpoint-1/{name}") for name in names],
    ]
    assert not any("checkpoint-1/" in name for name in hub.buckets[BUCKET].files)


def test_runs_whose_names_begin_alike_share_a_bucket(hub: Hub, tmp_path: Path) -> None:
    train_until(RunDir(tmp_path / "run2"), BUCKET, lambda line: None, 7)
    train_until(RunDir(tmp_path / "run"), BUCKET, lambda line: None, 1, 2, 3)
    assert remote_of(BUCKET, RunDir(tmp_path / "run")).steps() == [2, 3]
    assert remote_of(BUCKET, RunDir(tmp_path / "run2")).steps() == [7]


@pytest.mark.parametrize("name", ["../../escaped", "a/../../../escaped"])
def test_names_in_a_bucket_that_lead_outside_are_left_out(hub: Hub, tmp_path: Path, name: str) -> None:
    train_until(RunDir(tmp_path / "run"), BUCKET, lambda line: None, 1)
    files = hub.buckets[BUCKET].files
    secret = dict(files["run/checkpoint-1/adapter_model.safetensors"], path=f"run/checkpoint-1/{name}")
    files[str(secret["path"])] = secret
    shutil.rmtree(tmp_path / "run")
    fetch_checkpoint(RunDir(tmp_path / "run"), BUCKET, lambda line: None)
    assert last_usable(tmp_path / "run").folder == tmp_path / "run" / "checkpoint-1"
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_a_damaged_copy_is_passed_over_for_the_one_before(hub: Hub, tmp_path: Path, kind: str) -> None:
    address, lines = places(tmp_path)[kind], []
    train_until(RunDir(tmp_path / "run"), address, lines.append, 1, 2)
    shutil.rmtree(tmp_path / "run")
    if kind == "folder":
        (tmp_path / "drive" / "run" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"2")
    else:
        files, name = hub.buckets[BUCKET].files, "adapter_model.safetensors"
        files[f"run/checkpoint-2/{name}"] = dict(files[f"run/checkpoint-1/{name}"], path=f"run/checkpoint-2/{name}")
    run = RunDir(tmp_path / "run")
    fetch_checkpoint(run, address, lines.append)
    assert last_usable(run.path).folder == run.path / "checkpoint-1"
    assert any(("checkpoint-2" in line and "corrupted" in line) or "truncated" in line for line in lines)


def test_what_lies_here_is_never_replaced_from_there(hub: Hub, tmp_path: Path) -> None:
    train_until(RunDir(tmp_path / "run"), BUCKET, lambda line: None, 1)
    asked = len(hub.requests)
    fetch_checkpoint(RunDir(tmp_path / "run"), BUCKET, lambda line: None)
    assert len(hub.requests) == asked


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_nothing_there_yet_means_a_run_from_the_beginning(hub: Hub, tmp_path: Path, kind: str) -> None:
    run = RunDir(tmp_path / "run")
    fetch_checkpoint(run, places(tmp_path)[kind], lambda line: None)
    assert last_usable(run.path).folder is None


def test_a_copy_that_fails_is_told_and_training_goes_on(hub: Hub, tmp_path: Path) -> None:
    lines: list[str] = []
    hub.status["/batch"] = 403
    train_until(RunDir(tmp_path / "run"), BUCKET, lines.append, 1)
    hub.status.clear()
    assert "checkpoint-1 was not copied to me/checkpoints on the Hub: your token may not write" in lines[0]
    train_until(RunDir(tmp_path / "run"), BUCKET, lines.append, 2)
    assert remote_of(BUCKET, RunDir(tmp_path / "run")).steps() == [2]


def test_a_folder_that_goes_away_midway_is_told_and_is_filled_again(hub: Hub, tmp_path: Path) -> None:
    """An unmounted drive leaves something else under its name; the next checkpoint is copied once it is back."""
    run, drive, lines = RunDir(tmp_path / "run"), tmp_path / "drive", list[str]()
    train_until(run, str(drive), lines.append, 1)
    drive.rename(tmp_path / "unmounted")
    drive.write_text("not a folder")
    train_until(run, str(drive), lines.append, 2)
    assert len(lines) == 1
    assert lines[0].startswith(f"push_checkpoints: checkpoint-2 was not copied to {drive / 'run'}: NotADirectoryError")
    drive.unlink()
    (tmp_path / "unmounted").rename(drive)
    train_until(run, str(drive), lines.append, 3)
    assert remote_of(str(drive), run).steps() == [3]  # 1 is not kept here any more either


def test_a_full_drive_gives_up_what_is_not_kept_any_more_and_goes_on(tmp_path: Path) -> None:
    """2 MiB for checkpoints of 0.8: two fit. The third takes the first one's room; one that is too large is told."""
    drive, run, lines = tmp_path / "drive", RunDir(tmp_path / "run"), list[str]()
    drive.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(drive)], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (not root)")
    try:
        remote = remote_of(str(drive), run)
        for step, size in ((1, 800_000), (2, 800_000), (3, 800_000), (4, 3_000_000), (5, 800_000)):
            train_until(run, str(tmp_path / "unused"), lines.append, step)
            checkpoint = run.path / f"checkpoint-{step}"
            (checkpoint / "adapter_model.safetensors").write_bytes(b"w" * size)
            checkpoints.seal(checkpoint)
            PushCheckpoints(run, remote, lines.append).on_save(None, State(step), None)
            if step == 3:
                assert (remote.steps(), lines) == ([2, 3], [])
            if step == 4:
                assert remote.steps() == [3]
                assert "checkpoint-4 was not copied" in lines[-1]
                assert "the disk is full" in lines[-1]
        assert (remote.steps(), len(lines)) == ([5], 1)
        train_until(run, str(tmp_path / "unused"), lines.append, 6)
        (run.path / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"w" * 3_000_000)
        checkpoints.seal(run.path / "checkpoint-6")
        with pytest.raises(TrainingError):
            remote.push(run, run.path / "checkpoint-6", [6])  # save_total_limit=1: the only one there stays
        assert remote.steps() == [5]
        assert [path.name for path in (drive / "run").glob(".*")] == []
    finally:
        subprocess.run(["umount", "-l", str(drive)], check=True)


HONEST = {"base_revision": "0123456789abcdef0123456789abcdef01234567", "seed": 1, "resumed_at": ["x"], "files": {}}


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (HONEST, HONEST),
        ({"trained_at": "x", "finished_at": "x", "steps": 9, "merge": {"passed": True}}, {}),
        ({"base_revision": "../../x", "resumed_at": 3, "changed_files": [1], "other": 1, "merge_seconds": "x"}, {}),
        ([1], {}), ("[" * 5000, {}), ("{", {}),
    ],
    ids=["honest", "finished", "other kinds", "list", "depth", "broken"],
)  # fmt: skip
def test_of_a_run_json_from_there_only_its_beginning_is_taken(tmp_path: Path, there: object, here: object) -> None:
    """A run that says it is trained would be evaluated and merged with no adapter, and its checkpoint left alone."""
    run, drive, lines = RunDir(tmp_path / "run"), tmp_path / "drive", list[str]()
    train_until(run, str(drive), lines.append, 1)
    (drive / "run" / "run.json").write_text(there if isinstance(there, str) else json.dumps(there))
    shutil.rmtree(run.path)
    fetch_checkpoint(run, str(drive), lines.append)
    assert run.read_run() == here
    assert last_usable(run.path).folder == run.path / "checkpoint-1"


def test_links_on_a_shared_drive_are_not_followed(tmp_path: Path) -> None:
    """Whoever can write there knows the sum of a file of this machine: it must not end up in the run, and be pushed."""
    run, drive, lines = RunDir(tmp_path / "run"), tmp_path / "drive", list[str]()
    train_until(run, str(drive), lines.append, 1)
    secret = tmp_path / "id_rsa"
    weights = drive / "run" / "checkpoint-1" / "adapter_model.safetensors"
    weights.rename(secret)
    weights.symlink_to(secret)
    shutil.rmtree(run.path)
    fetch_checkpoint(run, str(drive), lines.append)
    assert "is skipped, as it is damaged" in lines[0]
    assert "adapter_model.safetensors: missing" in lines[0]
    assert last_usable(run.path).folder is None


def test_a_place_that_cannot_be_asked_stops_before_it_could_be_overwritten(hub: Hub, tmp_path: Path) -> None:
    hub.status["/tree"] = 500
    with pytest.raises(RunDirError, match="set push_checkpoints=null"):
        fetch_checkpoint(RunDir(tmp_path / "run"), BUCKET, lambda line: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["drive/my/run", "", "user/", "a b/c"])
def test_an_address_is_a_path_or_a_bucket(root: Path, address: str) -> None:
    assert "push_checkpoints" in in_process("show", "smoke", f"push_checkpoints='{address}'", expect=1)


@pytest.mark.slow
def test_training_goes_on_from_a_mounted_folder_on_a_new_machine(server: Server, tmp_path: Path) -> None:
    """Two sessions, as on a free GPU: the first is over after its minutes, and its disk is gone."""
    log = tmp_path / "log"
    command = ["train", "smoke", "--run", str(tmp_path / "run"), *FAST, *ALONE, "grpo.max_steps=3",
               "limits.max_minutes=0.0001", f"push_checkpoints={tmp_path / 'drive'}"]  # fmt: skip
    assert server.run(command, log) == 0, log.read_text()
    assert "training pauses after step 1 of 3" in log.read_text()
    assert "paused by limits.max_minutes; to resume, run the same command again" in log.read_text()
    shutil.rmtree(tmp_path / "run")
    assert server.run(command, log) == 0, log.read_text()
    assert "fetched checkpoint-1" in log.read_text()
    assert "resuming from step 1" in log.read_text()
    assert steps_of(tmp_path / "run") == [1, 2]
