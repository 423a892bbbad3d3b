"""Two processes train the adapter that one trains with the same global batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_lite.errors import GRPOLiteError
from grpo_lite.ranks import share_of_batch
from grpo_lite.recipe_load import load_recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "rows, accumulation, world, expected",
    [
        (8, 4, 1, {}),
        (8, 4, 2, {"gradient_accumulation_steps": 2}),
        (16, 1, 2, {"per_device_train_batch_size": 8}),
        (4, 8, 4, {"gradient_accumulation_steps": 2}),
    ],
)
def test_the_batch_is_shared_so_that_all_together_train_the_recipe_s(
    rows: int, accumulation: int, world: int, expected: dict[str, int]
) -> None:
    keys = [f"grpo.per_device_train_batch_size={rows}", f"grpo.gradient_accumulation_steps={accumulation}"]
    assert share_of_batch(load_recipe("gsm8k", keys), world) == expected


@pytest.mark.parametrize("rows, accumulation, world", [(8, 1, 2), (8, 3, 2), (8, 4, 3)])
def test_a_batch_that_cannot_be_shared_in_whole_groups_is_refused(rows: int, accumulation: int, world: int) -> None:
    keys = [f"grpo.per_device_train_batch_size={rows}", f"grpo.gradient_accumulation_steps={accumulation}"]
    with pytest.raises(GRPOLiteError, match=f"GPUS={world}"):
        share_of_batch(load_recipe("gsm8k", keys), world)


def launch(processes: int, *arguments: str) -> None:
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_two_processes_train_what_one_does(loss_type: str, tmp_path: Path) -> None:
    adapters = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.pt"
        launch(processes, str(ROOT / "tests" / "parallel_step.py"), str(file), loss_type)
        adapters.append(torch.load(file))
    one, two = adapters
    assert one.keys() == two.keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-6)
    moved = max(float((one["weights"][name] - start).abs().max()) for name, start in one["start"].items())
    assert moved > 1e-3, "nothing was trained"
    assert two["packed"], "packed compute was off in the parallel run"
    assert two["reward"] == pytest.approx(one["reward"], abs=1e-6)


@pytest.mark.slow
def test_a_whole_run_by_two_processes_ends_as_one_s_does(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch(2, str(ROOT / "tests" / "parallel_run.py"), str(run), "smoke", "grpo.max_steps=2")
    assert (run / "merged" / "model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((run / "completions" / "step_000001.jsonl").read_text().splitlines()) == 8
