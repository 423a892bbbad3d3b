"""Trackers are TRL's own, passed through: each gets the metrics of a real tiny run, locally, without a network."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_lite.cli import _explain
from grpo_lite.errors import GRPOLiteError
from grpo_lite.session.build import require_trackers
from tests.command_line import ROOT

TRACKERS = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name)]
SMALL = ["grpo.max_steps=2", "eval.enabled=false", "merge=false"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a fresh interpreter has trained with every tracker here: they read variables on import."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "grpo_lite.cli", "train", "smoke", "--run", str(folder / "run"), *SMALL,
         f"grpo.report_to=[{','.join(TRACKERS)}]"],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "HF_HOME": str(folder / "hf"),
             "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / "run" / "adapter").is_dir()
    return folder


@pytest.mark.slow
@pytest.mark.skipif("tensorboard" not in TRACKERS, reason="tensorboard is not installed")
def test_tensorboard_gets_the_metrics(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tracked.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"train/reward", "train/rewards/accuracy_reward/mean", "train/memory/peak_gib"} <= tags
    assert [event.step for event in found.Scalars("train/reward")] == [1, 2]


@pytest.mark.slow
@pytest.mark.skipif("wandb" not in TRACKERS, reason="wandb is not installed")
def test_wandb_offline_writes_the_metrics(tracked: Path) -> None:
    (record,) = tracked.rglob("*.wandb")
    assert b"train/rewards/accuracy_reward/mean" in record.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif("trackio" not in TRACKERS, reason="trackio is not installed")
def test_trackio_keeps_the_metrics_in_its_local_database(tracked: Path) -> None:
    kept = b"".join(path.read_bytes() for path in (tracked / "trackio").rglob("*.db*"))  # and its write-ahead log
    assert b"rewards/accuracy_reward/mean" in kept


@pytest.mark.parametrize("given", ["wandb", ["trackio", "wandb"]])
def test_a_tracker_that_is_not_installed_is_named_before_anything_loads(
    given: str | list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_lite.session.build.importlib.util.find_spec", lambda name: None if name == "wandb" else 1)
    with pytest.raises(GRPOLiteError, match=r"grpo.report_to: wandb is given, and it is not installed.*pip install"):
        require_trackers(given, "recipe.yaml")


@pytest.mark.parametrize("given", ["none", None, [], "all", ["tensorboard"]])
def test_other_trackers_are_upstream_s_to_judge(given: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_lite.session.build.importlib.util.find_spec", lambda name: 1)
    require_trackers(given, "recipe.yaml")


def test_wandb_without_a_login_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})
    text = _explain(fault("No API key configured. Use `wandb login` to log in."))
    assert text.startswith("wandb: No API key configured.")
    assert "WANDB_MODE=offline" in text


def run_with(tracker: str, tmp_path: Path, **environment: str) -> str:
    from tests.killing import ALONE, FAST

    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "grpo_lite.cli", "train", "smoke", "--run", str(tmp_path / "run"), *FAST,
         *ALONE, f"grpo.report_to={tracker}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if "WANDB" not in k}, "HOME": str(tmp_path), **environment},
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stderr


@pytest.mark.slow
@pytest.mark.skipif("wandb" not in TRACKERS, reason="wandb is not installed")
def test_wandb_without_a_key_is_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    text = run_with("wandb", tmp_path)
    assert "error: wandb:" in text
    assert "WANDB_MODE=offline" in text
    assert "bug in grpo_lite" not in text
