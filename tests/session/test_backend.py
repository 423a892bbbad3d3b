"""`model.backend: auto` is hf unless a measurement on this card says otherwise; a run keeps what it started with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir, dump_recipe
from grpo_lite.session import backend
from grpo_lite.session.backend import choose, measure_backends, stored_outcome, with_chosen_backend
from tests.command_line import in_process

CARD = "Tesla T4"
FAULT = {"fault": "error: unsloth needs CUDA"}


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recipe, list[str]]]:
    """Settle a recipe's `auto` on a machine with a T4 and Unsloth."""
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backend, "card_with_both", lambda: CARD)
    monkeypatch.setattr(backend, "imported_before", list)  # the other tests import them

    def settle(*overrides: str, run: Path = tmp_path / "none") -> tuple[Recipe, list[str]]:
        lines: list[str] = []
        return with_chosen_backend(load_recipe("smoke", overrides), RunDir(run), lines.append), lines

    return settle


def measured(monkeypatch: pytest.MonkeyPatch, hf: dict[str, Any], unsloth: dict[str, Any]) -> dict[str, Any]:
    figures = {"hf": hf, "unsloth": unsloth}
    monkeypatch.setattr(backend, "_measure", lambda recipe, name, steps, limit_s: figures[name])
    return measure_backends(load_recipe("smoke"), CARD, lambda line: None, 4, 60.0)


def test_auto_is_hf_until_the_card_was_measured(
    auto: Callable[..., tuple[Recipe, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, lines = auto()
    assert recipe.model.backend == "hf"
    assert lines == ["backend: hf; nothing was measured on this card yet (make backends RECIPE=smoke)"]
    measured(monkeypatch, {"step_s": 40.0}, {"step_s": 20.0})
    recipe, lines = auto()
    assert recipe.model.backend == "unsloth"
    assert lines[0].startswith("backend: unsloth; unsloth measured 2.00x as fast as hf")
    assert auto("model.load_in=16bit")[0].model.backend == "hf"  # another key
    assert stored_outcome(load_recipe("smoke"), "RTX 4090") == {}


@pytest.mark.parametrize(
    ("hf", "unsloth", "chosen"),
    [
        ({"step_s": 10.0}, {"step_s": 8.0}, "unsloth"),  # 1.25x
        ({"step_s": 10.0}, {"step_s": 8.1}, "hf"),
        ({"step_s": 10.0}, FAULT, "hf"),
        (FAULT, {"step_s": 10.0}, "unsloth"),
        (FAULT, FAULT, "hf"),
    ],
)
def test_unsloth_is_taken_where_it_is_clearly_faster(hf: dict[str, Any], unsloth: dict[str, Any], chosen: str) -> None:
    assert choose(hf, unsloth)[0] == chosen


def test_nothing_is_stored_where_neither_trained_and_a_damaged_record_counts_as_none(
    auto: Callable[..., tuple[Recipe, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, FAULT, FAULT)
    assert not (tmp_path / "cache" / "backends").exists()
    measured(monkeypatch, {"step_s": 40.0}, {"step_s": 20.0})
    (file,) = (tmp_path / "cache" / "backends").iterdir()
    for damage in ('{"chosen": "', "[]", '{"chosen": "vllm"}', ""):
        file.write_text(damage)
        assert auto()[0].model.backend == "hf"


def test_auto_is_hf_where_unsloth_cannot_train_this_recipe_or_this_process(
    auto: Callable[..., tuple[Recipe, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, {"step_s": 40.0}, {"step_s": 20.0})
    assert auto("sampling.refill=2")[1] == ["backend: hf; unsloth's trainer has no sampling.refill"]
    monkeypatch.setattr(backend, "imported_before", lambda: ["transformers", "trl"])
    assert auto()[1][0].startswith("backend: hf; unsloth must be imported before transformers, trl")


def test_without_cuda_or_unsloth_or_with_several_processes_there_is_no_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("smoke")
    assert with_chosen_backend(recipe, RunDir(tmp_path / "none"), pytest.fail) is recipe
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(backend.importlib.util, "find_spec", pytest.fail)
    assert backend.card_with_both() is None


@pytest.mark.parametrize("first", ["auto", "hf", "unsloth"])
def test_a_run_keeps_the_backend_that_it_started_with(
    auto: Callable[..., tuple[Recipe, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    measured(monkeypatch, {"step_s": 40.0}, {"step_s": 20.0})
    recipe = load_recipe("smoke", [f"model.backend={first}"])
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.recipe_file.write_text(dump_recipe(recipe))
    assert auto(run=run.path) == (recipe, [])
    for damage in ("", "model: {backend: vllm}", "model: [", "[]"):
        run.recipe_file.write_text(damage)
        assert auto(run=run.path)[0].model.backend == "auto"


def test_a_run_whose_checkpoints_are_elsewhere_keeps_its_backend_on_a_new_machine(
    auto: Callable[..., tuple[Recipe, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = dump_recipe(load_recipe("smoke", ["model.backend=hf"]))
    monkeypatch.setattr(
        "grpo_lite.runs.start.fetch_checkpoint", lambda run, address, show: run.recipe_file.write_text(text)
    )
    recipe, lines = auto(f"push_checkpoints={tmp_path}", run=tmp_path / "new")
    assert (recipe.model.backend, lines) == ("hf", [])


def test_each_backend_is_announced_before_its_minutes_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path / "cache"))
    lines: list[str] = []

    def measure(recipe: Recipe, name: str, steps: int, limit_s: float) -> dict[str, Any]:
        lines.append(f"measure {name}")
        return {"step_s": 40.0}

    monkeypatch.setattr(backend, "_measure", measure)
    measure_backends(load_recipe("smoke"), CARD, lines.append, 4, 300.0)
    assert lines == [
        "  hf: training 4 steps, within 5 min 00 s",
        "measure hf",
        "  hf: 40 s a step",
        "  unsloth: training 4 steps, within 5 min 00 s",
        "measure unsloth",
        "  unsloth: 40 s a step",
    ]


@pytest.mark.slow
def test_a_backend_is_measured_by_a_real_training(tmp_path: Path, root: Path) -> None:
    recipe = load_recipe("smoke")
    assert 0 < backend._measure(recipe, "hf", 3, 300.0)["step_s"] < 60
    assert backend._measure(recipe, "unsloth", 3, 300.0)["fault"].startswith("error: ")  # no CUDA here


def test_a_measurement_over_its_limit_leaves_no_process_behind() -> None:
    child = "import time; time.sleep(77.7)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '{child}']); time.sleep(77)"
    assert backend._output([sys.executable, "-c", code], 1.5) is None
    time.sleep(0.2)
    assert "time.sleep(77.7)" not in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout


def test_a_run_started_with_unsloth_resumes_only_where_it_is_but_needs_it_no_more_once_trained(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.recipe_file.write_text(dump_recipe(load_recipe("smoke", ["model.backend=unsloth"])))
    assert "this run was started with unsloth" in in_process("train", "smoke", "--run", str(run.path), expect=1)
    run.update_run(trained_at="then", finished_at="then")
    run.report_file.touch()
    assert "holds a finished run" in in_process("train", "smoke", "--run", str(run.path), expect=1)
