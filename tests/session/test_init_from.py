"""`lora.init_from` in whole runs of the tiny model: the first policy, resuming, refusals, and what is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_lite.report.facts import read_page, versions
from grpo_lite.reproduce import differences
from grpo_lite.runs.run_dir import RunDir
from tests.command_line import grpo_lite, in_process
from tests.command_server import Server
from tests.killing import ALONE, FAST, outcome

WEIGHTS = "adapter_model.safetensors"
STILL = "grpo.learning_rate=1e-30"  # a step that changes no float32 weight


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, from whose adapter others start."""
    run = tmp_path_factory.mktemp("first") / "run"
    grpo_lite("train", "smoke", "--run", str(run), *FAST, *ALONE, "grpo.max_steps=2", "grpo.learning_rate=0.05")
    return run


def train(run: Path, address: Path, *overrides: str, expect: int = 0) -> str:
    own = [*FAST, *ALONE, "grpo.max_steps=1", f"lora.init_from={address}", *overrides]
    return grpo_lite("train", "smoke", "--run", str(run), *own, expect=expect)


@pytest.mark.parametrize("load_in", ["4bit", pytest.param("32bit", marks=pytest.mark.slow)])
def test_a_run_starts_with_exactly_the_weights_of_another(first: Path, tmp_path: Path, load_in: str) -> None:
    run = tmp_path / "run"
    text = train(run, first, STILL, "grpo.beta=0.01", f"model.load_in={load_in}")
    assert f"starts from the adapter {first} (rank 4, 28 tensors, sha256 " in text
    before, after = (load_file(folder / "adapter" / WEIGHTS) for folder in (first, run))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (step,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert step["kl"] > 1e-6  # a fresh adapter equals the base, and its KL is 0: the rollout had these weights


def test_run_json_report_and_reproduce_name_the_adapter(first: Path, tmp_path: Path) -> None:
    run, start = RunDir(tmp_path / "run"), Path(shutil.copytree(first / "adapter", tmp_path / "start"))
    train(run.path, start, STILL)
    record = run.read_run()["init_from"]
    assert record["address"] == str(start)
    assert record["base_revision"] is None
    assert ("starts from", f"the adapter {start} (sha256 {record['sha256'][:12]})") in list(versions(read_page(run)))
    assert "lora.init_from" not in str(differences(run))
    tensors = (start / WEIGHTS).read_bytes()
    (start / WEIGHTS).write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
    assert f"lora.init_from: {start} has changed since (sha256 {record['sha256'][:12]} then" in str(differences(run))
    shutil.rmtree(start)
    assert "the adapter it started from is not here" in str(differences(run))


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one_and_needs_the_adapter_only_at_its_start(
    server: Server, first: Path, tmp_path: Path
) -> None:
    start = Path(shutil.copytree(first / "adapter", tmp_path / "start"))
    log = tmp_path / "log"

    def command(run: Path) -> list[str]:
        own = [*FAST, *ALONE, "grpo.max_steps=5", "grpo.save_steps=2", f"lora.init_from={start}", "data.train.limit=14"]
        return ["train", "smoke", "--run", str(run), *own]

    assert server.run(command(tmp_path / "undisturbed"), log) == 0, log.read_text()
    run = tmp_path / "run"
    assert server.run(command(run), log, "backward", 2) == -9, log.read_text()  # before the first checkpoint
    assert server.run(command(run), log, "backward", 4) == -9, log.read_text()
    assert (run / "checkpoint-2").is_dir()
    shutil.rmtree(start)
    assert server.run(command(run), log) == 0, log.read_text()
    assert outcome(run) == outcome(tmp_path / "undisturbed")
    assert "resuming from step 2" in log.read_text()


@pytest.mark.slow
def test_a_run_that_lost_its_checkpoints_begins_from_the_adapter_again(
    server: Server, first: Path, tmp_path: Path
) -> None:
    run, log, start = tmp_path / "run", tmp_path / "log", Path(shutil.copytree(first / "adapter", tmp_path / "start"))
    own = [*FAST, *ALONE, "grpo.max_steps=3", "grpo.save_steps=1", f"lora.init_from={start}"]
    command = ["train", "smoke", "--run", str(run), *own]
    assert server.run(command, log, "backward", 2) == -9
    (run / "checkpoint-1" / WEIGHTS).write_bytes(b"")
    start.rename(tmp_path / "moved")
    assert server.run(command, log) == 1
    assert f"lora.init_from: '{start}' is given, but there is no such folder" in log.read_text()
    (tmp_path / "moved").rename(start)
    assert server.run(command, log) == 0, log.read_text()
    assert "no checkpoint is usable: training starts from the beginning" in log.read_text()
    undisturbed = [part.replace(str(run), str(tmp_path / "other")) for part in command]
    assert server.run(undisturbed, log) == 0
    assert outcome(run) == outcome(tmp_path / "other")


def test_the_run_itself_is_refused(first: Path, tmp_path: Path, root: Path) -> None:
    for address in (first, first / "adapter", f"{first}/../{first.name}"):
        text = in_process("train", "smoke", f"lora.init_from={address}", "--run", str(first), expect=1)
        assert f"lora.init_from: {address} is this run's own directory, and a run is not overwritten" in text
    own = ["lora.init_from=" + str(tmp_path / "new"), "--run", str(tmp_path / "new")]
    assert "is this run's own directory" in in_process("train", "smoke", *own, expect=1)
    assert not (tmp_path / "new" / "recipe.yaml").exists()


def test_a_finished_run_is_left_alone(first: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, first, STILL)
    assert "holds a finished run, and it is not overwritten" in train(run, first, STILL, expect=1)
    assert "was started with another recipe" in train(run, first / "adapter", STILL, expect=1)


def test_a_refused_start_can_be_corrected_in_the_same_directory(first: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "lora.r: the adapter has 4, the recipe 8. Set lora.r=4." in train(run, first, "lora.r=8", expect=1)
    train(run, first, STILL)


def test_check_validates_the_adapter_without_training(first: Path, tmp_path: Path, root: Path) -> None:
    text = in_process("check", "smoke", f"lora.init_from={first}")
    assert f"starts from the adapter {first} (rank 4" in text
    text = in_process("check", "smoke", f"lora.init_from={first}", "lora.lora_alpha=9", expect=1)
    assert "lora.lora_alpha: the adapter has 8, the recipe 9" in text
