"""Trackers are TRL's own, passed through: each gets the metrics of a real tiny run, locally, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT

SMALL = ["grpo.max_steps=2", "eval.enabled=false", "merge=false"]


def train(folder: Path, tracker: str, **environment: str) -> str:
    """Train in a process of its own: trackers keep global state and threads."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "grpo_lite.cli", "train", "smoke", "--run", str(folder / "run"), *SMALL,
         f"grpo.report_to={tracker}"],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "HF_HOME": str(folder / "hf"), **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / "run" / "adapter").is_dir()
    return result.stdout


@pytest.fixture
def recipes_here(tmp_path: Path) -> Path:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def test_tensorboard_gets_the_metrics(recipes_here: Path) -> None:
    pytest.importorskip("tensorboard")
    train(recipes_here, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = recipes_here.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"train/reward", "train/rewards/accuracy_reward/mean", "train/entropy"} <= tags
    assert [event.step for event in found.Scalars("train/reward")] == [1, 2]


def test_wandb_offline_writes_the_metrics(recipes_here: Path) -> None:
    pytest.importorskip("wandb")
    train(recipes_here, "wandb", WANDB_MODE="offline", WANDB_DIR=str(recipes_here))
    (record,) = recipes_here.rglob("*.wandb")
    assert b"train/rewards/accuracy_reward/mean" in record.read_bytes()


def test_trackio_keeps_the_metrics_in_its_local_database(recipes_here: Path) -> None:
    pytest.importorskip("trackio")
    import sqlite3

    train(recipes_here, "trackio", TRACKIO_DIR=str(recipes_here / "trackio"))
    databases = [path for path in recipes_here.rglob("*.db") if path.stat().st_size]
    assert databases
    text = ""
    for path in databases:
        with sqlite3.connect(path) as connection:
            text += "\n".join(connection.iterdump())
    assert "rewards/accuracy_reward/mean" in text
