"""Where recipes are found: the shipped ones from anywhere, those in ./recipes beside them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from grpo_lite.errors import RecipeError
from grpo_lite.recipe import find
from grpo_lite.recipe.find import find_recipe, recipe_names, shipped_dir
from grpo_lite.recipe.load import load_all, load_recipe
from tests.command_line import in_process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    find._say_which.cache_clear()
    return tmp_path


@pytest.fixture
def local(empty: Path) -> Path:
    (empty / "recipes").mkdir()
    return empty / "recipes"


def test_shipped_recipes_are_found_from_an_empty_folder(empty: Path) -> None:
    assert shipped_dir() == ROOT / "recipes"
    assert load_recipe("gsm8k").name == "gsm8k"
    assert "quickstart" in recipe_names()


def test_a_local_folder_adds_recipes_and_hides_none(local: Path) -> None:
    shutil.copy(ROOT / "recipes" / "smoke.yaml", local / "mine.yaml")
    assert set(recipe_names()) - {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == {"mine"}
    assert load_recipe("mine").name == "mine"
    assert load_recipe("gsm8k").name == "gsm8k"
    assert "mine " in in_process("recipes")


def test_a_local_recipe_of_a_shipped_name_is_used_and_said_once(local: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (ROOT / "recipes" / "smoke.yaml").read_text(encoding="utf-8")
    (local / "smoke.yaml").write_text(text.replace("max_steps: 3", "max_steps: 5"), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert load_recipe("smoke").grpo["max_steps"] == 5
        load_recipe("smoke")
    assert [record.getMessage() for record in caplog.records] == [
        "recipes/smoke.yaml is used, not the shipped recipe of the same name."
    ]


def test_a_copy_of_a_shipped_recipe_is_not_worth_a_word(local: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(ROOT / "recipes" / "smoke.yaml", local)
    with caplog.at_level(logging.WARNING):
        assert find_recipe("smoke") == Path("recipes/smoke.yaml")
    assert caplog.records == []


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml"])
def test_an_unknown_recipe_is_answered_with_all_that_there_are(local: Path, name: str) -> None:
    (local / "mine.yaml").touch()
    with pytest.raises(
        RecipeError,
        match=r"Shipped recipes: code, .*wordle\. In \./recipes: mine\. Beside a published result: anchors/",
    ):
        load_recipe(name)


def test_in_a_checkout_the_recipes_are_named_once(root: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("nothing")
    assert "In ./recipes" not in str(caught.value)
    assert find_recipe("smoke") == Path("recipes/smoke.yaml")


def test_a_file_that_is_no_recipe_does_not_spoil_the_list(local: Path) -> None:
    (local / "pancakes.yaml").write_text("flour: 200 g\n", encoding="utf-8")
    recipes, faults = load_all()
    assert len(recipes) == len(list((ROOT / "recipes").glob("*.yaml")))
    assert len(faults) == 1
    assert "recipes/pancakes.yaml: flour: unknown key" in faults[0]
    text = in_process("recipes")
    assert "quickstart" in text
    assert "not listed:" in text


def test_the_printed_recipe_is_a_recipe(empty: Path) -> None:
    (empty / "my.yaml").write_text(in_process("show", "gsm8k"), encoding="utf-8")
    assert load_recipe("my.yaml") == load_recipe("gsm8k")
