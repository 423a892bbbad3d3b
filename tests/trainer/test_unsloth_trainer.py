"""The backend unsloth's trainer, tried with TRL's own in its place: saved whole, resumed, and never with NaN."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from trl import GRPOTrainer, SFTTrainer

from grpo_lite.errors import TrainingError
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_model, lora_config
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.checkpoints import last_usable
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.session import build as engine
from grpo_lite.train import train_run
from grpo_lite.trainer.finite import require_finite_adapter
from grpo_lite.trainer.unsloth import unsloth_trainer

REWARD = """
import os, signal

def mine(completion_ids, trainer_state=None, **_):
    if trainer_state.global_step + 1 == {step} and not os.path.exists({once!r}):
        open({once!r}, "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]
"""


@pytest.fixture
def as_unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of the backend unsloth without its package: its base is transformers' with the adapter on it."""

    def with_adapter(base: Base, recipe: Recipe, prompt_tokens: int) -> Any:
        from peft import get_peft_model

        return get_peft_model(load_model(base), lora_config(recipe))

    monkeypatch.setattr(engine, "uses_unsloth", lambda section: True)
    monkeypatch.setattr("grpo_lite.session.build.load_base", with_adapter)


@pytest.mark.slow
def test_a_run_by_the_backend_s_trainer_resumes_from_its_checkpoint(
    root: Path, tmp_path: Path, as_unsloth: None
) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text(REWARD.format(step=2, once=str(tmp_path / "once")))
    short = ["model.load_in=32bit", "eval.enabled=false", "check.enabled=false", "merge=false"]
    short += ["grpo.max_steps=4", "grpo.save_steps=100"]
    recipe = load_recipe("smoke", [f"rewards=[{{function: '{reward}:mine'}}]", *short])
    run, lines = RunDir(tmp_path / "run"), list[str]()
    assert train_run(recipe, run, lines.append).stopped_by == "SIGTERM"
    assert last_usable(run.path).folder == run.path / "checkpoint-2"
    assert train_run(recipe, run, lines.append).steps == 4
    assert any(line.startswith("resuming from step 2 ") for line in lines)
    assert len(run.metrics_file.read_text().splitlines()) == 4
    assert not list(run.path.glob(".*-*"))


def test_held_out_scores_on_the_way_are_logged_with_their_time(root: Path, tmp_path: Path, as_unsloth: None) -> None:
    short = ["model.load_in=32bit", "eval.enabled=true", "check.enabled=false", "merge=false", "grpo.max_steps=2"]
    recipe = load_recipe("smoke", [*short, "eval.every=1", "eval.limit=2", "eval.every_limit=2", "eval.samples=0"])
    run = RunDir(tmp_path / "run")
    train_run(recipe, run, lambda line: None)
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [record["step"] for record in records if "heldout/lenient" in record] == [1, 2]
    assert all(record["time/heldout_s"] > 0 for record in records)


def test_a_warm_up_by_the_backend_s_loss_goes_on_with_grpo(
    root: Path, tmp_path: Path, as_unsloth: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth gives SFTTrainer transformers' loss back, which leaves no metrics; layers and dtypes stay its own."""
    built = engine.load_base  # the stand-in, with the adapter on it
    monkeypatch.setattr("grpo_lite.session.warmup.uses_unsloth", lambda section: True)
    monkeypatch.setattr("grpo_lite.session.warmup.load_base", built)
    monkeypatch.setattr(SFTTrainer, "compute_loss", Trainer.compute_loss)
    layers: list[bool] = []
    monkeypatch.setattr("grpo_lite.trainer.warmup.shorten_lora", lambda model: layers.append(True))
    data = "data: {generator: sums, kwargs: {low: 1, high: 9}}, completion: '{answer}'"
    warmup = f"warmup={{{data}, steps: 4, learning_rate: 0.01, tokens_per_step: 200}}"
    short = ["model.load_in=32bit", "eval.enabled=false", "check.enabled=false", "merge=false", "grpo.max_steps=1"]
    run = RunDir(tmp_path / "run")
    train_run(load_recipe("smoke", [*short, warmup]), run, lambda line: None)
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [record["stage"] for record in records] == ["warmup"] * 4 + ["grpo"]
    assert records[3]["loss"] < records[0]["loss"]
    assert 0 < records[0]["num_tokens"] < records[3]["num_tokens"]
    assert "heldout_loss" in records[3]
    assert not layers
    assert run.warm_adapter.is_dir()
    assert (run.adapter / "adapter_model.safetensors").is_file()


class Accelerator:
    scaler = None
    num_processes = 1
    distributed_type = "NO"


class Fake:
    """As much of a trainer as saving and skipping look at."""

    def __init__(self, **kwargs: Any) -> None:
        self.model = torch.nn.Linear(2, 2)
        self.accelerator = Accelerator()
        self.args = type("Args", (), {"output_dir": "run", "max_grad_norm": 1.0})()
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}
        self.state = type("State", (), {"global_step": 3})()
        self.callback: Any = None

    def add_callback(self, callback: Any) -> None:
        self.callback = callback

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        raise AssertionError("saved")


def test_weights_that_are_not_finite_are_not_saved() -> None:
    trainer = unsloth_trainer(Fake, 2)()
    require_finite_adapter(trainer)
    trainer.model.weight.data[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"step 3: the adapter holds NaN or infinity \(weight\)"):
        trainer._save_checkpoint(trainer.model, None)


def test_a_gradient_that_is_not_finite_moves_nothing_and_two_in_a_row_stop() -> None:
    trainer = unsloth_trainer(Fake, 2)()

    def step(value: float) -> bool:
        trainer.model.weight.grad = torch.full((2, 2), value)
        trainer.callback.on_pre_optimizer_step(trainer.args, trainer.state, None)
        return trainer.model.weight.grad is not None

    assert [step(torch.nan), step(1.0), step(torch.inf)] == [False, True, False]
    assert trainer.faults.counts == {"skipped_steps": 2}
    with pytest.raises(TrainingError, match="in 2 steps in a row"):
        step(-torch.inf)


def test_it_is_still_the_trainer_that_it_was_made_of() -> None:
    assert issubclass(unsloth_trainer(GRPOTrainer, 5), GRPOTrainer)
