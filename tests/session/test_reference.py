"""`reference: start` in whole runs: KL against the adapter that training started from, kept in checkpoints only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from grpo_lite.errors import RecipeError
from grpo_lite.memory.job import recipe_job
from grpo_lite.memory.phases import kept_items, trained_parameters
from grpo_lite.models.config import KNOWN
from grpo_lite.models.shape import read_shape
from grpo_lite.models.unsloth import lacks
from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir
from tests.command_line import grpo_lite
from tests.command_server import Server
from tests.killing import ALONE, FAST, outcome

WEIGHTS = "adapter_model.safetensors"
STILL = "grpo.learning_rate=1e-30"  # a step that changes no float32 weight
START = ("grpo.beta=0.1", "reference=start")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, from whose adapter others start."""
    run = tmp_path_factory.mktemp("first") / "run"
    grpo_lite("train", "smoke", "--run", str(run), *FAST, *ALONE, "grpo.max_steps=2", "grpo.learning_rate=0.05")
    return run


def kl_of(run: Path) -> list[float]:
    return [json.loads(line)["kl"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("compute", ["packed", pytest.param("plain", marks=pytest.mark.slow)])
def test_kl_to_the_start_is_0_at_first_and_that_to_the_base_is_not(first: Path, tmp_path: Path, compute: str) -> None:
    kl = {}
    for reference in ("base", "start"):
        own = [*FAST, *ALONE, "grpo.max_steps=1", STILL, f"lora.init_from={first}", f"compute={compute}"]
        run = tmp_path / reference
        grpo_lite("train", "smoke", "--run", str(run), *own, "grpo.beta=0.1", f"reference={reference}")
        (kl[reference],) = kl_of(run)
    assert kl["base"] > 1e-6
    assert abs(kl["start"]) < 1e-9


@pytest.mark.slow
def test_a_whole_run_keeps_the_start_in_its_checkpoints_and_exports_the_trained_adapter(
    first: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    own = ["grpo.max_steps=3", "grpo.save_steps=1", "eval.every=2", "grpo.learning_rate=0.01", "model.load_in=4bit"]
    grpo_lite("train", "smoke", "--run", str(run), *FAST, *own, *START, f"lora.init_from={first}")
    start = load_file(first / "adapter" / WEIGHTS)
    held, trained = (load_file(run / "checkpoint-3" / place / WEIGHTS) for place in ("ref", "."))
    assert all(torch.equal(held[name], start[name]) for name in start)
    assert not any(torch.equal(trained[name], start[name]) for name in start)
    assert not (run / "adapter" / "ref").exists()
    assert (run / "merged" / "model.safetensors").is_file()
    assert "KL to the start" in (run / "report.html").read_text()
    assert kl_of(run)[0] < 1e-6 < kl_of(run)[2]


@pytest.mark.slow
def test_a_killed_run_measures_against_the_same_start_without_its_folder(
    server: Server, first: Path, tmp_path: Path
) -> None:
    start, log = Path(shutil.copytree(first / "adapter", tmp_path / "start")), tmp_path / "log"

    def command(run: Path) -> list[str]:
        own = [*FAST, *ALONE, "grpo.max_steps=5", "grpo.save_steps=2", "data.train.limit=14", f"lora.init_from={start}"]
        return ["train", "smoke", "--run", str(run), *own, *START, "grpo.learning_rate=0.01"]

    assert server.run(command(tmp_path / "undisturbed"), log) == 0, log.read_text()
    run = tmp_path / "run"
    assert server.run(command(run), log, "backward", 4) == -9, log.read_text()
    shutil.rmtree(start)
    assert server.run(command(run), log) == 0, log.read_text()
    assert "resuming from step 2" in log.read_text()
    assert outcome(run) == outcome(tmp_path / "undisturbed")
    assert kl_of(run)[-1] > 1e-6


@pytest.mark.slow
def test_a_fresh_adapter_equals_the_base_so_none_is_held(tmp_path: Path) -> None:
    own = [*FAST, *ALONE, "grpo.max_steps=2", "grpo.save_steps=1", "grpo.learning_rate=0.01"]
    texts = {}
    for reference in ("base", "start"):
        run = tmp_path / reference
        more = ["grpo.beta=0.1", f"reference={reference}"]
        texts[reference] = grpo_lite("train", "smoke", "--run", str(run), *own, *more)
    assert "a fresh adapter equals the base, and KL is measured against it" in texts["start"]
    assert not (tmp_path / "start" / "checkpoint-2" / "ref").exists()
    base, start = (outcome(tmp_path / reference) for reference in ("base", "start"))
    assert start["metrics"] == base["metrics"]
    assert start["adapter"] == base["adapter"]


def test_an_adapter_that_begins_elsewhere_than_the_base_is_held(root: Path) -> None:
    keys = ["grpo.beta=0.1", "reference=start"]
    held = {init: load_recipe("smoke", [*keys, f"lora.init_lora_weights={init}"]).holds_reference
            for init in ("true", "gaussian", "false", "pissa")}  # fmt: skip
    assert held == {"true": False, "gaussian": False, "false": True, "pissa": True}


def test_a_start_without_kl_is_refused(root: Path) -> None:
    with pytest.raises(RecipeError, match=r"reference: start is given, but grpo.beta is 0, .* Set grpo.beta=0.02"):
        load_recipe("smoke", ["reference=start", "grpo.beta=0"])
    with pytest.raises(RecipeError, match="reference: 'begin' is given"):
        load_recipe("smoke", ["reference=begin"])


def test_unsloth_does_not_serve_it(root: Path) -> None:
    assert lacks(load_recipe("smoke", START)) == (
        "unsloth's trainer measures KL against the base, not against the start (reference)"
    )
    assert lacks(load_recipe("smoke")) is None


def test_the_plan_counts_the_second_adapter(root: Path) -> None:
    shape = read_shape(KNOWN["qwen2.5-1.5b"], "qwen2.5-1.5b")
    own = ["lora.init_from=runs/x", "grpo.beta=0.1"]
    recipes = [load_recipe("gsm8k", [*own, f"reference={reference}"]) for reference in ("base", "start")]
    jobs = [recipe_job(recipe, shape)[0] for recipe in recipes]
    without, with_it = (dict(kept_items(job)) for job in jobs)
    assert with_it.pop("reference adapter, float32") == 4 * trained_parameters(jobs[0])
    assert with_it == without


def test_a_run_of_an_earlier_version_resumes(root: Path, tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path / "run"), load_recipe("smoke")
    run.prepare(recipe)
    run.update_run(started_at="2026-01-01")
    old = yaml.safe_load(run.recipe_file.read_text())
    assert old.pop("reference") == "base"
    run.recipe_file.write_text(yaml.safe_dump(old))
    assert run.prepare(recipe) == "new"
