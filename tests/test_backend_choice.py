"""`model.backend: auto`: which of the two trains is raced once for a shape and card, kept, and stays with a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_lite import backend_choice
from grpo_lite.backend_choice import describe, keep_race, kept_race, race, verdict, with_chosen_backend
from grpo_lite.recipe import Recipe
from grpo_lite.recipe_load import load_recipe
from grpo_lite.run_dir import RunDir, dump_recipe

CARD = "Tesla T4"
HF = {"step_s": 40.0, "token_s": 0.2, "peak_memory_bytes": 5 << 30}
LONG = ("grpo.max_steps=250",)


def faster(times: float) -> dict[str, Any]:
    return {**HF, "token_s": HF["token_s"] / times}


FAILED = {"fault": "error: model.backend: unsloth is given, but …"}


@pytest.mark.parametrize(
    ("ours", "other", "chosen", "why"),
    [
        (HF, faster(2.0), "unsloth", "0.50 of hf's time"),
        (HF, faster(1.3), "unsloth", "no exact resume"),
        (HF, faster(1.2), "hf", "1.20x as fast; 1.25x would outweigh"),
        (HF, faster(0.5), "hf", "0.50x"),
        (HF, FAILED, "hf", "unsloth did not run"),
        (FAILED, HF, "unsloth", "hf did not run"),
        (FAILED, FAILED, "hf", "nor did hf"),
    ],
)
def test_the_verdict_of_a_race(ours: dict[str, Any], other: dict[str, Any], chosen: str, why: str) -> None:
    found, reason = verdict(ours, other)
    assert found == chosen
    assert why in reason


def test_a_race_is_told_in_one_line_a_backend() -> None:
    assert describe(HF) == "40 s a step, 200 ms a token, peak 5.00 GiB"
    assert describe(FAILED).startswith("did not run: error: model.backend")


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recipe, list[str]]]:
    """Settle a recipe's `auto` on a machine with a T4 and Unsloth, where unsloth wins every race by two."""
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backend_choice, "card_of_a_choice", lambda: CARD)
    races: list[Recipe] = []

    def fake_race(recipe: Recipe, show: Any) -> dict[str, Any]:
        races.append(recipe)
        chosen, why = verdict(HF, faster(2.0))
        return {"hf": HF, "unsloth": faster(2.0), "chosen": chosen, "why": why, "at": "now"}

    monkeypatch.setattr(backend_choice, "race", fake_race)

    def settle(*overrides: str, run: Path = tmp_path / "none") -> tuple[Recipe, list[str]]:
        lines: list[str] = []
        recipe = with_chosen_backend(load_recipe("smoke", overrides), RunDir(run), lines.append)
        return recipe, [*lines, f"{len(races)} races"]

    return settle


def test_a_long_run_is_raced_once_for_its_shape(auto: Callable[..., tuple[Recipe, list[str]]]) -> None:
    recipe, lines = auto(*LONG)
    assert recipe.model.backend == "unsloth"
    assert "at most 10 minutes (model.backend=hf leaves it out)" in lines[0]
    assert "unsloth; it took 0.50 of hf's time" in lines[1]
    assert lines[-1] == "1 races"
    again, lines = auto(*LONG, "grpo.learning_rate=1e-4", "seed=3")
    assert again.model.backend == "unsloth"
    assert lines[-1] == "1 races"
    for change in ("grpo.max_completion_length=9", "lora.r=2", "model.load_in=16bit", "compute=plain"):
        before = int(auto(*LONG)[1][-1].split()[0])
        assert auto(*LONG, change)[1][-1] == f"{before + 1} races", change


def test_a_short_run_is_not_worth_a_race_but_takes_one_that_is_there(
    auto: Callable[..., tuple[Recipe, list[str]]],
) -> None:
    recipe, lines = auto("grpo.max_steps=20")
    assert recipe.model.backend == "hf"
    assert lines == ["backend: hf; the two were never raced here for this shape (grpo-lite backends smoke)", "0 races"]
    auto(*LONG)
    assert auto("grpo.max_steps=20")[0].model.backend == "unsloth"


@pytest.mark.parametrize("begun_with", ["auto", "hf", "unsloth"])
def test_a_run_keeps_the_backend_that_it_was_begun_with(
    auto: Callable[..., tuple[Recipe, list[str]]], tmp_path: Path, begun_with: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    begun = load_recipe("smoke", [*LONG, f"model.backend={begun_with}"])
    RunDir(run).recipe_file.write_text(dump_recipe(begun))
    recipe, lines = auto(*LONG, run=run)
    assert recipe == begun
    assert lines == ["0 races"]


def test_what_is_given_is_taken(auto: Callable[..., tuple[Recipe, list[str]]]) -> None:
    for given in ("hf", "unsloth"):
        assert auto(*LONG, f"model.backend={given}")[1] == ["0 races"]


def test_without_cuda_or_unsloth_nothing_is_chosen(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", LONG)
    assert with_chosen_backend(recipe, RunDir(tmp_path / "none"), pytest.fail) is recipe


def test_several_processes_train_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(backend_choice.importlib.util, "find_spec", pytest.fail)
    assert backend_choice.card_of_a_choice() is None


def test_a_race_is_kept_for_one_card_and_a_damaged_file_is_raced_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    recipe = load_recipe("smoke")
    keep_race(recipe, CARD, {"hf": HF, "unsloth": FAILED, "chosen": "hf", "why": "x"})
    assert (kept_race(recipe, CARD) or {})["chosen"] == "hf"
    assert kept_race(recipe, "RTX 4090") is None
    (file,) = (tmp_path / "backends").iterdir()
    for damage in ('{"chosen": "', "[]", '{"chosen": "vllm"}', ""):
        file.write_text(damage)
        assert kept_race(recipe, CARD) is None
    file.unlink()
    keep_race(recipe, CARD, {"hf": FAILED, "unsloth": FAILED, "chosen": "hf", "why": "x"})
    assert kept_race(recipe, CARD) is None


@pytest.mark.slow
def test_a_real_race_where_only_ours_can_run() -> None:
    """Two real processes; the second says why it cannot train here, and nothing is left of either."""
    lines: list[str] = []
    recipe = load_recipe("smoke", ["eval.every=2", "limits.max_minutes=1"])
    found = race(recipe, lines.append, steps=3)
    assert found["chosen"] == "hf"
    assert found["hf"]["step_s"] > 0
    assert found["hf"]["peak_memory_bytes"] > 1 << 20
    assert "model.backend: unsloth is given, but" in found["unsloth"]["fault"]
    assert "s a step" in lines[0]
    assert "  unsloth: did not run: error: model.backend" in lines[1]


@pytest.mark.slow
def test_a_race_that_takes_too_long_is_ended() -> None:
    found = race(load_recipe("smoke"), lambda line: None, limit_s=1.0)
    assert found["hf"] == {"fault": "it took more than 1 s"}
    assert found["chosen"] == "hf"
