"""Two processes train the adapter that one trains with the same global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from grpo_lite.errors import GRPOLiteError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.schedule import share_of_batch
from tests.killing import ALONE, FAST, train

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# Two processes on a GPU each are not affected.
resumes_on_cpus = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="transformers before 5.20 cannot restore the random states of several processes on a CPU",
)


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
    assert share_of_batch(load_recipe("gsm8k", keys).grpo, world) == expected


@pytest.mark.parametrize("rows, accumulation, world", [(8, 1, 2), (8, 3, 2), (8, 4, 3)])
def test_a_batch_that_cannot_be_shared_in_whole_groups_is_refused(rows: int, accumulation: int, world: int) -> None:
    keys = [f"grpo.per_device_train_batch_size={rows}", f"grpo.gradient_accumulation_steps={accumulation}"]
    with pytest.raises(GRPOLiteError, match=f"GPUS={world}"):
        share_of_batch(load_recipe("gsm8k", keys).grpo, world)


def launch(processes: int, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("grpo", marks=pytest.mark.matrix)])
def test_two_processes_train_what_one_does(loss_type: str, tmp_path: Path) -> None:
    adapters = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.pt"
        launch(processes, str(HERE / "parallel_step.py"), str(file), loss_type)
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
@pytest.mark.parametrize(
    "overflows",
    [
        pytest.param(["1:1"], id="the first backward", marks=pytest.mark.matrix),
        pytest.param(["1:2"], id="after the collectives"),
        pytest.param(["0:3", "1:2"], id="several", marks=pytest.mark.matrix),
        pytest.param(["0:1", "1:1"], id="both at once", marks=pytest.mark.matrix),
    ],
)
def test_memory_that_runs_out_in_one_process_holds_up_the_other_and_changes_nothing(
    overflows: list[str], tmp_path: Path
) -> None:
    found = []
    for name, given in (("whole", []), ("overflows", overflows)):
        file = tmp_path / f"{name}.pt"
        launch(2, str(HERE / "parallel_step.py"), str(file), "dapo", *given)
        found.append(torch.load(file))
    whole, disturbed = found
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(disturbed["weights"][name], weight, rtol=1e-4, atol=1e-6)
    for before, after in zip(whole["logged"], disturbed["logged"], strict=True):
        assert after == pytest.approx(before, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_whole_run_by_two_processes_ends_as_one_s_does(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch(2, str(HERE / "parallel_run.py"), str(run), "smoke", "grpo.max_steps=2")
    assert (run / "merged" / "model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((run / "completions" / "step_000001.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
def test_two_processes_play_episodes_of_different_lengths(tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [text for text in train(run, "environment")[1:] if text not in ("--run", str(run))]
    launch(
        2,
        str(HERE / "parallel_run.py"),
        str(run),
        *overrides,
        "grpo.max_completion_length=2000",
        "grpo.steps_per_generation=null",
        "grpo.max_steps=1",
    )
    rows = [json.loads(line) for line in (run / "completions" / "step_000001.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    results = [sum(turn["role"] == "tool" for turn in row.get("turns", ())) for row in rows]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["tools/calls"] == sum(results) > max(results)
    assert first["rewards/Ledger/mean"] == pytest.approx(sum(row["rewards"]["Ledger"] for row in rows) / 8)


@pytest.mark.slow
@pytest.mark.matrix
def test_two_processes_start_from_the_same_adapter(tmp_path: Path) -> None:
    """A step too small to change a float32 weight: what is saved is what both started from."""
    overrides = ["smoke", *FAST, *ALONE, "grpo.beta=0.01", "grpo.max_steps=2"]
    first, run = tmp_path / "first", tmp_path / "run"
    launch(1, str(HERE / "parallel_run.py"), str(first), *overrides, "grpo.learning_rate=0.05")
    still = [f"lora.init_from={first}", "grpo.learning_rate=1e-30"]
    launch(2, str(HERE / "parallel_run.py"), str(run), *overrides, *still)
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, run))
    assert all(torch.equal(before[name], after[name]) for name in before)
    first_step = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first_step["kl"] > 1e-6  # of a fresh adapter it is 0
    run = tmp_path / "to the start"
    moving = [f"lora.init_from={first}", "reference=start", "grpo.learning_rate=0.05"]
    launch(2, str(HERE / "parallel_run.py"), str(run), *overrides, *moving)
    kl = [json.loads(line)["kl"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert abs(kl[0]) < 1e-9 < 1e-6 < kl[1]


@pytest.mark.slow
@pytest.mark.matrix
@resumes_on_cpus
def test_two_processes_resumed_inside_a_round_end_as_undisturbed_ones(tmp_path: Path) -> None:
    """A round serves two steps; the first session stops after one, by a clock that only one process need have seen."""
    outcomes = []
    overrides = ["smoke", "grpo.max_steps=4", "grpo.num_iterations=2", "grpo.gradient_accumulation_steps=2",
                 "grpo.save_steps=10", "model.load_in=32bit", "eval.enabled=false", "merge=false"]  # fmt: skip
    for name, sessions in (("whole", [[]]), ("paused", [["limits.max_minutes=0.0001"], []])):
        run = tmp_path / name
        for limit in sessions:
            launch(2, str(HERE / "parallel_run.py"), str(run), *overrides, *limit)
            if limit:
                assert (run / "checkpoint-1" / "grpo_lite_state_1.pt").is_file()
                assert (run / "checkpoint-1" / "rng_state_1.pth").is_file()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [
            {k: v for k, v in line.items() if not k.startswith(("step_time", "time/", "memory/"))} for line in lines
        ]
        outcomes.append(((run / "adapter" / "adapter_model.safetensors").read_bytes(), kept))
    assert outcomes[1][1] == outcomes[0][1]
    assert outcomes[1][0] == outcomes[0][0]


@pytest.mark.slow
@pytest.mark.matrix
def test_a_checkpoint_of_two_processes_goes_on_in_one(tmp_path: Path) -> None:
    """Two cards yesterday, one today: told, and not exact."""
    run = tmp_path / "run"
    arguments = [str(HERE / "parallel_run.py"), str(run), "smoke", "grpo.max_steps=3", "merge=false",
                 "grpo.num_iterations=2", "grpo.gradient_accumulation_steps=2", "eval.enabled=false"]  # fmt: skip
    launch(2, *arguments, "limits.max_minutes=0.0001")
    text = launch(1, *arguments)
    assert "it was saved with GPUS=2: the random states differ now, so this is not an exact resume" in text
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def stop_the_second_at(shown: str, *arguments: str) -> str:
    """Run two processes, send the second a signal once a line says `shown`, and return what comes after that."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*command, str(HERE / "parallel_run.py"), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if shown in line:
            break
    workers = [int(child.name) for child in Path("/proc").glob("[0-9]*") if _parent(child) == process.pid]
    os.kill(max(workers), signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    return out


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["grpo.max_steps=200", "merge=false", "grpo.save_steps=1000", "eval.enabled=false"]
    out = stop_the_second_at("step 3/200", str(run), "smoke", *more)
    assert "interrupted by SIGTERM after step" in out
    (checkpoint,) = run.glob("checkpoint-*")
    assert (checkpoint / "grpo_lite_state_1.pt").is_file()
    assert not (run / "adapter").exists()


@pytest.mark.slow
def test_faults_in_one_process_leave_both_with_the_same_weights(tmp_path: Path) -> None:
    """What is not finite in one is skipped in both; a reward that fails in one costs its groups, counted in both."""
    out = tmp_path / "out"
    launch(2, str(HERE / "parallel_faults.py"), str(out))
    first, second = (torch.load(f"{out}.{rank}") for rank in (0, 1))
    assert first["faults"] == second["faults"] == {"skipped_steps": 2, "excluded_groups": 6}  # 2 groups × 3 rewards
    moved = []
    for step, (one, two) in enumerate(zip(first["trail"], second["trail"], strict=True)):
        assert torch.equal(one, two), f"the processes are apart after step {step}"
        assert torch.isfinite(one).all()
        moved.append(step == 0 or not torch.equal(one, first["trail"][step - 1]))
    assert moved == [True, False, False, True, True, True, True]  # NaN gradient, infinite loss; the rest trained on


ODD = """
import os
def mine(completion_ids, trainer_state=None, **_):
    if os.environ.get("RANK") == "1" and trainer_state.global_step >= 1 and not os.path.exists({mended!r}):
        raise ValueError("in the second process only")
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]
"""
PLAIN = ["model.load_in=32bit", "eval.enabled=false", "merge=false", "check.enabled=false", "grpo.save_steps=1"]


@pytest.mark.slow
@pytest.mark.matrix
@resumes_on_cpus
def test_a_reward_that_keeps_failing_in_one_process_ends_both_and_the_run_goes_on_once_it_is_mended(
    tmp_path: Path,
) -> None:
    reward, mended, run = tmp_path / "mine.py", tmp_path / "mended", tmp_path / "run"
    reward.write_text(ODD.format(mended=str(mended)))
    command = [str(HERE / "parallel_run.py"), str(run), "smoke", *PLAIN, "grpo.max_steps=5",
               f"rewards=[{{function: '{reward}:mine'}}]", "limits.reward_failures=2"]  # fmt: skip
    with pytest.raises(AssertionError) as caught:  # by `launch`, with what was said; a deadlock would be a timeout
        launch(2, *command)
    said = str(caught.value)
    assert "process 2: reward failed: rewards[0]" in said
    assert "in the second process only. It has now failed in 2 batches in a row" in said
    assert "bug in grpo_lite" not in said  # the first one says why it stops, too
    mended.touch()
    assert "resuming from step 2" in launch(2, *command)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.slow
@resumes_on_cpus
@pytest.mark.parametrize(
    "which",
    [pytest.param(min, id="the first", marks=pytest.mark.matrix), pytest.param(max, id="the second")],
)
def test_a_process_that_is_killed_ends_the_other_and_the_run_is_resumed(tmp_path: Path, which: Any) -> None:
    run = tmp_path / "run"
    arguments = [str(HERE / "parallel_run.py"), str(run), "smoke", *PLAIN]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen([*command, *arguments, "grpo.max_steps=300"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "step 3/300" in line:
            break
    workers = [int(child.name) for child in Path("/proc").glob("[0-9]*") if _parent(child) == process.pid]
    os.kill(which(workers), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    step = max(int(folder.name.partition("-")[2]) for folder in run.glob("checkpoint-*"))
    assert step >= 2
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 300", f"max_steps: {step + 2}"))
    text = launch(2, *arguments, f"grpo.max_steps={step + 2}")
    assert f"resuming from step {step}" in text
    assert len((run / "metrics.jsonl").read_text().splitlines()) == step + 2


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return -1
