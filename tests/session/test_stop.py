"""limits.max_minutes: training stops in time for evaluation and merge."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.session import stop as limits
from grpo_lite.session.stop import Deadline, sampled_per_warmup_step
from grpo_lite.task.traces import Trace


def recipe(root: Path, *overrides: str) -> Recipe:
    """Return smoke with one merge: `auto` may make a second one."""
    return load_recipe("smoke", ["merge_onto=original", *overrides])


def test_training_pauses_when_the_next_step_would_eat_the_time_reserved(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 minutes, 60 s a step, of which evaluation and merge took 100 s and 50 s before: 180 s are reserved.

    After 6 steps 240 s are left: 60 more than reserved, less than 1.2 steps.
    """
    clock = [1000.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: clock[0])
    told: list[str] = []
    earlier = {"evaluation_seconds": 100.0, "merge_seconds": 50.0}
    deadline = Deadline(recipe(root, "limits.max_minutes=10"), 1000.0, earlier, 8, tmp_path, told.append)
    state = SimpleNamespace(global_step=0, max_steps=100)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    deadline.on_train_begin(None, state, control)
    while not control.should_training_stop:
        clock[0] += 60
        state.global_step += 1
        deadline.on_step_end(None, state, control)
    assert state.global_step == 6
    assert control.should_save
    assert deadline.reached
    assert "3.0 min are kept for evaluation and merge" in told[0]


def test_the_last_step_is_no_pause(root: Path, tmp_path: Path) -> None:
    deadline = Deadline(recipe(root, "limits.max_minutes=0.001"), time.monotonic() - 60, {}, 8, tmp_path, print)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    deadline.on_train_begin(None, None, control)
    deadline.on_step_end(None, SimpleNamespace(global_step=3, max_steps=3), control)
    assert not control.should_training_stop


def test_the_reserve_counts_every_completion_of_the_evaluation(root: Path, tmp_path: Path) -> None:
    # 8 prompts × (2 × (1 + 2 samples) + 1 merged) = 56 completions at 8 a step of 2 s: 14 s; merge 30 s + 50 / 25 MB/s
    (tmp_path / "model.safetensors").write_bytes(b"")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(50_000_000)
    deadline = Deadline(recipe(root, "limits.max_minutes=10"), 0.0, {}, 8, tmp_path, print)
    assert deadline.reserve_s(2.0) == pytest.approx(1.2 * (14 + 32))
    # A second merge, and 8 more completions: 2 s.
    twice = Deadline(recipe(root, "limits.max_minutes=10", "merge_onto=auto"), 0.0, {}, 8, tmp_path, print)
    assert twice.reserve_s(2.0) == pytest.approx(1.2 * (14 + 2 + 2 * 32))
    silent = Deadline(recipe(root, "eval.enabled=false", "merge=false"), 0.0, {}, 8, tmp_path, print)
    assert silent.reserve_s(2.0) == 0


def test_a_step_of_the_warm_up_tells_what_generating_takes_by_its_tokens(root: Path, tmp_path: Path) -> None:
    warmed = recipe(
        root, "limits.max_minutes=10", "warmup={source: self, tokens_per_step: 600}", "eval.max_new_tokens=10"
    )
    rows = [Trace([3] * 10, [4] * 10) for _ in range(100)]
    # A generated token as long as 3 trained ones: 600 / 3 = 200 generated tokens a step, 20 completions.
    assert sampled_per_warmup_step(warmed, rows) == pytest.approx(20)
    assert sampled_per_warmup_step(warmed, rows[:3]) == pytest.approx(2)  # 60 tokens are all there are
    deadline = Deadline(warmed, 0.0, {}, 8, tmp_path, print, "the warm-up", 20.0)
    # 3 models × 8 prompts × (1 + 2 samples) + 8 merged = 80 completions at 20 a step of 2 s: 8 s; merge 30 s
    assert deadline.reserve_s(2.0) == pytest.approx(1.2 * (8 + 30))


def test_the_reserve_counts_the_warm_up_s_column_and_further_rows(root: Path, tmp_path: Path) -> None:
    # 3 models × (8 prompts × (1 + 2 samples) + 20 further rows) + 8 merged = 140 completions at 8 a step of 2 s: 35 s
    also = "eval.also={large: {generator: sums, kwargs: {low: 20, high: 40}, limit: 20}}"
    warmed = recipe(root, "limits.max_minutes=10", "warmup={source: self}", also)
    deadline = Deadline(warmed, 0.0, {}, 8, tmp_path, print)
    assert deadline.reserve_s(2.0) == pytest.approx(1.2 * (35 + 30))
