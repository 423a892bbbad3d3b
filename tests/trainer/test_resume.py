"""Interrupted, killed, broken off: what was saved is kept, and the same command goes on from there."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from grpo_lite.runs.run_dir import RunDir
from tests.command_line import grpo_lite, in_process, kill, read_until, start, steps_of


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_the_next_train_resumes_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    many = ("grpo.max_steps=8", "grpo.save_steps=100", "eval.enabled=false", "merge=false")
    process = start(run, *many)
    seen = read_until(process, "step 2/8")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    seen += out
    assert process.returncode == 130, seen
    assert "interrupted by SIGINT after step" in seen
    assert "run the same command again" in seen
    stopped = steps_of(run)[-1]
    assert (run / f"checkpoint-{stopped}").is_dir()
    text = grpo_lite("train", "smoke", "--run", str(run), *many)
    assert f"resuming from step {stopped}" in text
    assert steps_of(run) == list(range(1, 9))


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    many = ("grpo.max_steps=7", "grpo.save_steps=2", "eval.enabled=false", "merge=false")
    process = start(run, *many)
    read_until(process, "step 5/7")
    kill(process)
    text = grpo_lite("train", "smoke", "--run", str(run), *many)
    assert "resuming from step 4" in text
    assert steps_of(run) == list(range(1, 8))
    assert RunDir(run).read_run()["steps"] == 7


@pytest.mark.slow
def test_a_run_killed_after_training_is_evaluated_and_merged_by_the_next_train(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run)
    read_until(process, "evaluating base, greedy")
    kill(process)
    assert not (run / "merged").exists()
    text = grpo_lite("train", "smoke", "--run", str(run))
    assert "training has ended" in text
    assert "verified on 8 held-out prompts" in text
    assert RunDir(run).read_run()["finished_at"]


def test_a_second_process_in_the_same_folder_is_refused(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "grpo.max_steps=60", "eval.enabled=false", "merge=false")
    read_until(process, "step 1/60")
    arguments = ("grpo.max_steps=60", "eval.enabled=false", "merge=false")
    text = in_process("train", "smoke", "--run", str(run), *arguments, expect=1)
    kill(process)
    assert "another process is working in it" in text


@pytest.mark.slow
def test_the_run_goes_on_after_a_mended_reward(tmp_path: Path) -> None:
    """A reward that broke at step 3 cost nothing that was saved."""
    reward = tmp_path / "mine.py"
    broken = (
        "def mine(completions, trainer_state=None, **kwargs):\n"
        "    return [1.0] if trainer_state and trainer_state.global_step == 2 else [float(len(c[0]['content']) % 3) "
        "for c in completions]\n"
    )
    reward.write_text(broken)
    arguments = ["train", "smoke", f"rewards[0].function={reward}:mine", "rewards[0].kwargs={}", "eval.enabled=false"]
    arguments += ["check.enabled=false", "merge=false", "limits.reward_failures=1", "--run", str(tmp_path / "r")]
    assert "returned 1 rewards" in grpo_lite(*arguments, expect=1)
    reward.write_text(broken.replace("[1.0] if", "[0.5] * 8 if"))
    text = grpo_lite(*arguments)
    assert "resuming from step 2" in text
    assert f"rewards[0].function: {reward} has changed since" in text
    assert steps_of(tmp_path / "r") == [1, 2, 3]
