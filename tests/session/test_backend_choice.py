"""`model.backend: auto`: which of the two trains is raced once for a shape and card, kept, and stays with a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import RunDirError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir, dump_recipe
from grpo_lite.session import backend as backend_choice
from grpo_lite.session.backend import is_long, keep_race, kept_race, verdict, with_chosen_backend
from tests.command_line import in_process

CARD = "Tesla T4"
HF = {"step_s": 40.0, "token_s": 0.2, "peak_memory_bytes": 5 << 30}
LONG = ("grpo.max_steps=250",)


def faster(times: float) -> dict[str, Any]:
    return {**HF, "token_s": HF["token_s"] / times}


FAILED = {"fault": "error: model.backend: unsloth is given, but …"}
SLOW = {"fault": "it took more than 300 s", "slow": True}


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recipe, list[str]]]:
    """Settle a recipe's `auto` on a machine with a T4 and Unsloth, where unsloth wins every race by two."""
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backend_choice, "card_of_a_choice", lambda: CARD)
    monkeypatch.setattr(backend_choice, "imported_before", list)  # the other tests import them
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
    for change in (
        "grpo.max_completion_length=9", "lora.r=2", "model.load_in=16bit", "compute=plain", "grpo.num_iterations=2",
        "grpo.gradient_checkpointing=false", "memory.offload_activations=true",
    ):  # fmt: skip
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
    for ours, other in ((FAILED, FAILED), (SLOW, HF)):
        keep_race(recipe, CARD, {"hf": ours, "unsloth": other, "chosen": "hf", "why": "x"})
        assert kept_race(recipe, CARD) is None


def test_auto_is_ours_in_a_notebook_that_has_imported_transformers(
    auto: Callable[..., tuple[Recipe, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth could not train there any more, whatever a race had found."""
    assert auto(*LONG)[0].model.backend == "unsloth"
    monkeypatch.setattr(backend_choice, "imported_before", lambda: ["transformers", "trl"])
    recipe, lines = auto(*LONG)
    assert recipe.model.backend == "hf"
    assert lines[0].startswith("backend: hf; unsloth comes before transformers, trl, imported here already")


def test_auto_is_ours_where_unsloth_would_leave_out_what_a_recipe_asks_for(
    auto: Callable[..., tuple[Recipe, list[str]]],
) -> None:
    recipe, lines = auto(*LONG, "sampling.refill=2")
    assert recipe.model.backend == "hf"
    assert lines == ["backend: hf; unsloth's trainer has no sampling.refill", "0 races"]


@pytest.mark.parametrize(
    ("overrides", "long"),
    [
        (["grpo.max_steps=100"], True),
        (["grpo.max_steps=99"], False),
        (["grpo.max_steps=500", "limits.max_minutes=30"], False),
        (["grpo.max_steps=500", "limits.max_minutes=600"], True),
        # 40 rows × 4 completions × 3 epochs / 8 a step = 60 steps; 5 epochs: 100
        (["grpo.max_steps=-1", "data.train.path=rows.jsonl", "grpo.num_train_epochs=3"], False),
        (["grpo.max_steps=-1", "data.train.path=rows.jsonl", "grpo.num_train_epochs=5"], True),
        (["grpo.max_steps=-1", "data.train.path=rows.jsonl", "grpo.num_train_epochs=5", "data.train.limit=9"], False),
        (["grpo.max_steps=-1", "data.train.hub=openai/gsm8k", "grpo.num_train_epochs=3"], True),
        (["grpo.max_steps=-1", "data.train.hub=openai/gsm8k", "data.train.limit=40"], False),
        (["grpo.max_steps=-1", "data.train.path=missing.jsonl"], True),
    ],
)
def test_epochs_are_counted_in_steps_where_the_rows_are_known(
    overrides: list[str], long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ["grpo.num_generations=4", "grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=2"]
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n' * 40)
    recipe = load_recipe("smoke", [*shape, *overrides])
    monkeypatch.chdir(tmp_path)
    assert is_long(recipe) is long


def test_a_run_whose_checkpoints_are_elsewhere_keeps_its_backend(
    auto: Callable[..., tuple[Recipe, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new machine has neither the run nor the race; another backend would be refused as another recipe."""
    begun = dump_recipe(load_recipe("smoke", [*LONG, "model.backend=hf"]))

    def fetched(run: RunDir, address: str, show: Any) -> None:
        run.recipe_file.write_text(begun)

    monkeypatch.setattr("grpo_lite.runs.remote.fetch_checkpoint", fetched)
    recipe, lines = auto(*LONG, f"push_checkpoints={tmp_path}", run=tmp_path / "new")
    assert recipe.model.backend == "hf"
    assert lines == ["0 races"]


def test_a_damaged_recipe_of_a_run_names_no_backend(
    auto: Callable[..., tuple[Recipe, list[str]]], tmp_path: Path
) -> None:
    for damage in ("", "model: {backend: vllm}", "model: [", "[]"):
        (tmp_path / "recipe.yaml").write_text(damage)
        assert auto(*LONG, run=tmp_path)[0].model.backend == "auto"


def test_a_directory_that_another_process_works_in_is_refused_before_a_race(
    auto: Callable[..., tuple[Recipe, list[str]]], tmp_path: Path
) -> None:
    with RunDir(tmp_path / "run").locked(), pytest.raises(RunDirError, match="another process is working in it"):
        auto(*LONG, run=tmp_path / "run")
    assert auto("grpo.max_steps=20")[1][-1] == "0 races"


def test_a_run_begun_with_unsloth_goes_on_only_where_it_is_but_needs_it_no_more_once_trained(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.recipe_file.write_text(dump_recipe(load_recipe("smoke", ["model.backend=unsloth"])))
    assert "this run was begun with unsloth" in in_process("train", "smoke", "--run", str(run.path), expect=1)
    run.update_run(trained_at="then", finished_at="then")
    run.report_file.touch()
    assert "holds a finished run" in in_process("train", "smoke", "--run", str(run.path), expect=1)


def test_the_minutes_of_a_race_count_in_max_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raced_at: list[float] = []

    def chosen(recipe: Recipe, run: RunDir, show: Any) -> Recipe:
        raced_at.append(time.monotonic())
        return recipe

    def trained(recipe: Recipe, run: RunDir, show: Any, view: str, begun: float) -> Any:
        assert begun < raced_at[0]
        raise RunDirError("seen")

    monkeypatch.setattr(backend_choice, "with_chosen_backend", chosen)
    monkeypatch.setattr("grpo_lite.train.train_run", trained)
    assert "error: seen" in in_process("train", "smoke", "--run", str(tmp_path / "run"), expect=1)
