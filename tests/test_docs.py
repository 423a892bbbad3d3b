"""docs/: commands run, links lead somewhere, named files and metrics exist, generated pages are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from grpo_lite.recipe.load import recipe_names
from tests.test_readme import shell, workplace

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NAMES = ("how-grpo-works", "your-own-reward", "your-own-data", "choosing-a-recipe", "troubleshooting", "results")
OWN = [ROOT / "docs" / f"{name}.md" for name in NAMES]

__all__ = ["workplace"]  # a fixture


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.stem)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:grpo_lite|rewards|tests|bench)/[\w./]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in OWN:
        assert f"docs/{page.name}" in readme, page.name


def test_make_targets_and_recipes_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in OWN:
        for command in commands(page):
            if command.startswith("make "):
                assert command.split()[1] in targets, command
            for recipe in re.findall(r"RECIPE=(\S+)", command):
                assert recipe in recipe_names(), command


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.stem)
def test_yaml_of_a_page_is_part_of_a_valid_recipe(page: Path) -> None:
    from grpo_lite.recipe.load import build_recipe, read_yaml

    for block in blocks(page, "yaml"):
        raw = {**read_yaml(ROOT / "recipes" / "gsm8k.yaml"), "name": "page", **yaml.safe_load(block)}
        build_recipe(raw, page.name)


def test_the_metrics_that_the_page_explains_are_ones_that_are_logged() -> None:
    text = (ROOT / "docs" / "how-grpo-works.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "grpo_lite").glob("*.py"))
    for name in re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE):
        assert name.replace("<name>/mean", "") in sources, name


def test_the_commands_of_your_own_data_run_as_written(workplace: Path) -> None:
    page = ROOT / "docs" / "your-own-data.md"
    small = "model.id=tiny/random-llama data.max_prompt_tokens=null grpo.max_completion_length=8 eval.samples=0"
    for command in commands(page):
        if command.startswith("make train"):
            command = command.replace('ARGS="', f'ARGS="{small} grpo.max_steps=1 grpo.gradient_accumulation_steps=2 ')
        elif command.startswith("make check"):
            command = command.replace('ARGS="', 'ARGS="model.id=tiny/random-llama data.max_prompt_tokens=null ')
        shell(workplace, command)
    assert (workplace / "runs" / "mine" / "report.html").is_file()


def test_the_reward_of_the_page_passes_its_own_check(workplace: Path, tmp_path: Path) -> None:
    page = ROOT / "docs" / "your-own-reward.md"
    (code,) = blocks(page, "python")
    (command,) = [c for c in commands(page) if c.startswith("make check-rewards")]
    (workplace / "my_rewards.py").write_text(code)
    (workplace / "data").mkdir(exist_ok=True)
    rows = [("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Lima"), ("Kenya", "Nairobi")]
    (workplace / "data" / "train_prompts.jsonl").write_text(
        "".join(f'{{"prompt": "Capital of {land}?", "answer": "{city}"}}\n' for land, city in rows)
    )
    assert "gold" in shell(workplace, f'{command} ARGS="data.holdout=1 model.id=tiny/random-llama"')


@pytest.mark.slow
def test_the_commands_of_the_results_and_of_choosing_a_recipe_run(workplace: Path) -> None:
    tiny = "model.id=tiny/random-llama grpo.max_steps=1 eval.limit=4 eval.samples=0 merge=false"
    for name in ("choosing-a-recipe", "results"):
        for command in commands(ROOT / "docs" / f"{name}.md"):
            assert "ARGS" not in command
            shell(workplace, f'{command} ARGS="{tiny}"' if command.startswith("make train") else command)
    assert (workplace / "runs" / "results" / "report.html").is_file()
