"""train --budget: it measures once, chooses once, and a resumed run keeps what was chosen."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import GRPOLiteError
from grpo_lite.evaluation.probe import Probe
from grpo_lite.memory.times import keep_times, kept_times, time_line
from grpo_lite.models.device import detect_device
from grpo_lite.processes import Ranks
from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.session import budget
from grpo_lite.session.budget import fit_to_budget
from grpo_lite.session.stop import Deadline
from grpo_lite.session.views import grpo_ahead
from tests.command_line import grpo_lite, steps_of

SPEED = {"step_s": 10.0, "completion_s": 0.1, "held_out": 8, "steps": 400, "token_s": 0.01,
         "truncated": {4: 0.9, 8: 0.8}, "start_s": 5.0}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path / "cache"))


def fitted(
    run: RunDir, limit_s: float, *overrides: str, given: tuple[str, ...] = ()
) -> tuple[Any, dict[str, Any] | None, list[str]]:
    said: list[str] = []
    recipe = load_recipe("smoke", ["grpo.max_steps=400", *overrides])
    chosen, record = fit_to_budget(recipe, run, limit_s, given, time.monotonic(), said.append)
    return chosen, record, said


def test_a_known_speed_is_used_and_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_times(load_recipe("smoke"), detect_device().name, SPEED)
    monkeypatch.setattr(budget, "probe_base", lambda *_: pytest.fail("the model is probed"))
    run = RunDir(tmp_path / "run")
    # 1.2 × (5 + 30 + a little for 56 completions) are gone from 20 min: about 96 steps of 10 s
    chosen, record, said = fitted(run, 1200)
    assert record is not None
    assert 90 <= chosen.schedule.max_steps <= 97
    assert chosen.limits.max_minutes == 20
    assert record["steps"] == chosen.schedule.max_steps
    assert chosen.log.preflight is False
    assert any(line.startswith("evaluation: with 8 problems") for line in said)
    kept, _, _ = fitted(run, 1200, "log.preflight=true")
    assert kept.log.preflight is True


def test_all_that_is_said_of_a_step_before_the_training_is_one_figure(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", ["grpo.max_steps=400"])
    keep_times(recipe, detect_device().name, SPEED)
    _, _, said = fitted(RunDir(tmp_path / "run"), 7200)  # all 400 steps fit
    assert any("training: 400 steps of 10 s, 3,200 completions, 1 h 06 min" in line for line in said)
    assert time_line(recipe).startswith("time: a step about 10 s, 400 steps about 1 h 06 min")
    ahead = grpo_ahead(recipe, 400)
    assert ahead is not None
    assert "400 steps (about 1 h 06 min" in ahead.sentence()


def test_a_run_that_has_begun_keeps_its_numbers(tmp_path: Path) -> None:
    keep_times(load_recipe("smoke"), detect_device().name, SPEED)
    run = RunDir(tmp_path / "run")
    first, record, _ = fitted(run, 1200)
    assert run.prepare(first) == "new"
    run.update_run(budget=record, started_at="2026-11-29T00:00:00Z")
    keep_times(load_recipe("smoke"), detect_device().name, {**SPEED, "step_s": 90.0})  # slower by now
    again, none, said = fitted(run, 3600)
    assert none is None
    assert again.schedule.max_steps == first.schedule.max_steps
    assert again.limits.max_minutes == 60  # of this session
    assert run.prepare(again) == "new"  # no checkpoint yet, and not refused
    assert "this run has begun, so what was chosen stays: grpo.max_steps=" in said[0]
    changed, _, _ = fitted(run, 3600, "grpo.max_steps=7", given=("grpo.max_steps",))
    assert changed.schedule.max_steps == 7
    with pytest.raises(GRPOLiteError, match="was started with BUDGET=; give that again"):
        run.prepare(load_recipe("smoke", ["grpo.max_steps=400"]))


def test_the_deadline_keeps_the_time_that_the_plan_has_for_the_evaluation(tmp_path: Path) -> None:
    planned = {"budget": {"evaluation_s": 100.0}}
    recipe = load_recipe("smoke", ["limits.max_minutes=10", "merge_onto=original"])
    assert Deadline(recipe, 0.0, planned, 8, tmp_path, print).reserve_s(1e6) == pytest.approx(1.2 * (100 + 30))
    measured = {**planned, "evaluation_seconds": 10.0, "merge_seconds": 20.0}
    assert Deadline(recipe, 0.0, measured, 8, tmp_path, print).reserve_s(1e6) == pytest.approx(36)


def test_several_processes_and_unsloth_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GRPOLiteError, match=r"the backend unsloth is given.*limits.max_minutes=60"):
        fitted(RunDir(tmp_path), 3600, "model.backend=unsloth")
    monkeypatch.setattr(budget, "this_process", lambda: Ranks(world=2))
    with pytest.raises(GRPOLiteError, match="and GPUS=2 is given"):
        fitted(RunDir(tmp_path), 3600)


def test_an_unknown_speed_is_measured_on_whole_rounds_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def probe(*_: Any, **arguments: Any) -> tuple[Probe, float]:
        asked.update(arguments)
        made = Probe(
            prompts=2, samples=4, pass_at_1=0.3, pass_at_k=0.8, equal_groups=0.2, cap=8, truncated={4: 0.9, 8: 0.8},
            format_rate=None, rewarded=0.4, opened=None, tokens_per_s=100.0, step_s=10.0, steps=400,
            completion_s=0.1, held_out=8, token_s=0.01,
        )  # fmt: skip
        return made, 3.0

    monkeypatch.setattr(budget, "probe_base", probe)
    chosen, record, said = fitted(RunDir(tmp_path / "run"), 1200)
    assert asked == {"count": 2, "samples": 4}  # a round of smoke: 8 completions in groups of 4
    assert "is measured now: two rounds of 8 completions" in said[0]
    assert record is not None
    assert "measured by the probe" in record["source"]
    assert kept_times(chosen)["step_s"] == 10.0


MANY_STEPS = 100_000
REWARD = """
import os
from pathlib import Path

def mine(completion_ids, trainer_state=None, **_):
    flag = Path(__file__).with_suffix(".stopped")
    if trainer_state is not None and trainer_state.global_step == 2 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), 15)
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]
"""


@pytest.mark.slow
def test_a_run_ends_within_its_budget_interrupted_or_not(root: Path, tmp_path: Path) -> None:
    """A recipe of 100,000 steps, which takes hours, in 40 s: the plan measures, and the deadline holds it."""
    (tmp_path / "mine.py").write_text(REWARD)
    recipe = tmp_path / "many.yaml"
    text = (
        (root / "recipes" / "smoke.yaml")
        .read_text(encoding="utf-8")
        .replace("max_steps: 3", f"max_steps: {MANY_STEPS}")
    )
    recipe.write_text(text)
    run = tmp_path / "run"
    line = [
        "train", str(recipe), "--run", str(run), "--budget", "40s", "merge=false", "check.enabled=false",
        f"rewards=[{{function: '{tmp_path / 'mine.py'}:mine'}}]",
    ]  # fmt: skip
    began = time.monotonic()
    first = grpo_lite(*line, expect=130)
    assert "is measured now" in first
    record = json.loads((run / "run.json").read_text())["budget"]
    assert 3 < record["steps"] < MANY_STEPS
    assert f"{record['steps']:,} of {MANY_STEPS:,} steps" in first
    second = grpo_lite(*line)  # the very same command
    taken = time.monotonic() - began
    assert f"this run has begun, so what was chosen stays: grpo.max_steps={record['steps']}" in second
    assert "is measured now" not in second
    assert "resuming from step 3" in second
    assert f"max_steps: {record['steps']}\n" in (run / "recipe.yaml").read_text()
    assert steps_of(run) == list(range(1, len(steps_of(run)) + 1))
    assert len(steps_of(run)) <= record["steps"]
    assert "budget: 40s given, " in second
    assert taken < 6 * 40  # two commands on a machine that others use; the whole recipe would take hours
