"""Held-out scores while training, and what the trainer logs beside TRL's metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import RecipeError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.report.evidence import read_metrics
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.train import train_run

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["eval.enabled=true", "merge=false", "eval.samples=0", "grpo.gradient_checkpointing=true", "grpo.max_steps=4"]


def metrics(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    run = RunDir(folder)
    train_run(load_recipe(str(ROOT / "recipes" / "smoke.yaml"), [*QUICK, *overrides]), run, lambda line: None)
    return read_metrics(run)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return metrics(tmp_path_factory.mktemp("scored") / "run", "eval.every=3", "eval.every_limit=4")


def test_scores_come_every_few_steps_and_at_the_last_one(scored: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in scored if "heldout/lenient" in record] == [3, 4]
    assert all(record["heldout/lenient"] in (0, 0.25, 0.5, 0.75, 1) for record in scored if "heldout/lenient" in record)


@pytest.mark.slow
def test_they_do_not_change_the_training(scored: list[dict[str, Any]], tmp_path: Path) -> None:
    without = metrics(tmp_path / "run")
    for key in ("reward", "grad_norm", "entropy", "num_tokens", "completions/mean_length", "kl"):
        assert [record[key] for record in scored] == [record[key] for record in without], key


def test_time_and_memory_are_logged_and_grow(scored: list[dict[str, Any]]) -> None:
    for key in ("time/rollout_s", "time/reward_s", "memory/peak_gib"):
        values = [record[key] for record in scored]
        assert values == sorted(values), key
        assert values[0] > 0, key
    held = [record["time/heldout_s"] for record in scored if "time/heldout_s" in record]
    assert len(held) == 2  # from the first score on
    assert held == sorted(held)
    spent = scored[-1]["time/rollout_s"] + scored[-1]["time/reward_s"]
    assert spent <= sum(record["step_time"] for record in scored)


def test_scores_without_held_out_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match="every is given, but enabled is false"):
        load_recipe(str(ROOT / "recipes" / "smoke.yaml"), ["eval.every=2", "eval.enabled=false"])
