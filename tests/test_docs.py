"""The pages: commands run, links lead somewhere, named files and functions exist, generated parts are up to date."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from grpo_lite.recipe.find import anchor_names, recipe_names
from tests.test_readme import shell, workplace

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", ROOT / "recipes" / "README.md"]
PAGES = [*FRONT, *DOCS]

__all__ = ["workplace"]  # a fixture


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_functions_that_a_page_names_are_there(page: Path) -> None:
    """`path` and `path.py:function`, `path.py:Class.method`; and test files by their path, not by their name alone."""
    text = page.read_text(encoding="utf-8")
    folders = "grpo_lite|rewards|tests|bench|docs|launch|notebooks"
    for path, member in re.findall(rf"`((?:{folders})/[\w./-]+?)(?::([\w.]+))?`", text):
        assert (ROOT / path).exists(), path
        assert not member or member in members(ROOT / path), f"{path}:{member}"
    assert re.findall(r"`test_\w+\.py`", text) == []


@cache
def members(path: Path) -> set[str]:
    """Return the functions and classes of a module, and the methods of its classes as `Class.method`."""
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name for node in top} | {
        f"{node.name}.{method.name}"
        for node in top
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef)
    }


def test_every_page_is_in_the_index_which_the_readme_links() -> None:
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in {*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "README.md"}:
        assert f"({page.name})" in index, page.name


def test_the_glossary_is_in_alphabetical_order() -> None:
    words = re.findall(
        r"^\*\*(.+?)\.\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(words) > 20
    assert words == sorted(words, key=str.lower)


def test_the_worked_example_is_right() -> None:
    import statistics

    rewards = [1.0] * 5 + [0.0] * 3
    advantages = [(reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-4) for reward in rewards]
    text = (ROOT / "docs" / "how-grpo-works.md").read_text(encoding="utf-8")
    assert f"+{advantages[0]:.3f}" in text
    assert f"−{-advantages[-1]:.3f}" in text
    assert f"{statistics.variance(rewards):.3f}" in text


def test_make_targets_and_recipes_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for command in commands(page):
            if command.startswith("make "):
                assert command.split()[1] in targets, command
            for recipe in re.findall(r"RECIPE=(\S+)", command):
                assert recipe in [*recipe_names(), *anchor_names()], command
        inline = re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))
        assert set(inline) <= targets, page.name


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name_of)
def test_yaml_of_a_page_is_part_of_a_valid_recipe(page: Path) -> None:
    from grpo_lite.recipe.load import build_recipe, read_yaml

    for block in blocks(page, "yaml"):
        raw = {**read_yaml(ROOT / "recipes" / "gsm8k.yaml"), "name": "page", **yaml.safe_load(block)}
        build_recipe(raw, page.name)


def test_the_metrics_that_the_page_explains_are_ones_that_are_logged() -> None:
    text = (ROOT / "docs" / "how-grpo-works.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "grpo_lite").rglob("*.py"))
    names = re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE)
    assert len(names) > 8
    for name in names:
        phase = re.fullmatch(r"time/(\w+)_s", name)  # logged as f"time/{phase}_s"
        assert (f'spending("{phase[1]}")' if phase else name.replace("<name>/mean", "")) in sources, name


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
    command = next(command for command in commands(page) if command.startswith("make check-rewards"))
    assert "ARGS" not in command
    (workplace / "my_rewards.py").write_text(code)
    (workplace / "data").mkdir(exist_ok=True)
    rows = [("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Lima"), ("Kenya", "Nairobi")]
    (workplace / "data" / "train_prompts.jsonl").write_text(
        "".join(f'{{"prompt": "Capital of {land}?", "answer": "{city}"}}\n' for land, city in rows)
    )
    assert "gold" in shell(workplace, f'{command} ARGS="data.holdout=1 model.id=tiny/random-llama"')


def test_the_walk_through_of_ones_own_task_runs_as_written(workplace: Path) -> None:
    (block,) = [text for text in blocks(ROOT / "docs" / "your-own-reward.md", "bash") if "my_rewards.py" in text]
    small = " model.id=tiny/random-llama grpo.max_steps=1 eval.samples=0 grpo.max_completion_length=8"
    block = re.sub(r'(ARGS="data\.holdout=1[^"]*)"', rf'\1{small}"', block).replace("make ", "make VENV=env ")
    shell(workplace, block)
    assert (workplace / "runs" / "custom" / "metrics.json").is_file()


@pytest.mark.slow
def test_the_commands_of_the_first_run_run_one_after_the_other(workplace: Path) -> None:
    tiny = "model.id=tiny/random-llama warmup.steps=2 grpo.max_steps=1 eval.limit=4 eval.also={} merge=false"
    for command in commands(ROOT / "docs" / "first-run.md"):
        shell(workplace, f'{command} ARGS="{tiny}"' if command == "make train" else command)
    assert (workplace / "runs" / "quickstart" / "report.html").is_file()


@pytest.mark.slow
def test_the_commands_of_the_warm_start_run_one_after_the_other(workplace: Path) -> None:
    """On the tiny model, which the page's traces do not teach in two steps."""
    tiny = "model.id=tiny/random-llama warmup.steps=2 grpo.max_steps=1 eval.limit=4 eval.also={} merge=false"
    for command in commands(ROOT / "docs" / "warm-start.md"):
        assert "ARGS" not in command
        shell(workplace, f'{command} ARGS="{tiny}"')
    assert (workplace / "runs" / "warm" / "warmup" / "adapter" / "adapter_model.safetensors").is_file()
    assert '"warm"' in (workplace / "runs" / "warm" / "metrics.json").read_text()


@pytest.mark.slow
def test_the_commands_of_the_results_and_of_choosing_a_recipe_run(workplace: Path) -> None:
    tiny = "model.id=tiny/random-llama grpo.max_steps=1 eval.limit=4 eval.samples=0 merge=false"
    for name in ("choosing-a-recipe", "results"):
        for command in commands(ROOT / "docs" / f"{name}.md"):
            assert "ARGS" not in command
            shell(workplace, f'{command} ARGS="{tiny}"' if command.startswith("make train") else command)
    assert (workplace / "runs" / "results" / "report.html").is_file()


# docs/architecture.md


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_written_from_the_code_is_up_to_date(build: ModuleType) -> None:
    stale = [path.name for path, text in build.pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run `python docs/build.py`"


def test_the_house_has_at_most_26_rooms_on_10_floors(build: ModuleType) -> None:
    house = sys.modules["house"]
    drawn = [house.grpo_lite_house(), house.rewards_house()]
    assert sum(len(one.uses) for one in drawn) <= 26
    assert max(len(one.floors()) for one in drawn) <= 10
    for one in drawn:  # no arrow points up, or sideways
        level = {room: number for number, row in enumerate(one.floors()) for room in row}
        assert [
            (room, other) for room, others in one.uses.items() for other in others if level[other] >= level[room]
        ] == []


def test_a_new_import_changes_the_picture(build: ModuleType) -> None:
    house = sys.modules["house"]
    before = house.House(
        {"a": ["a.py"], "b": ["b.py"], "c": ["c.py"]}, {"a": {"b"}, "b": frozenset(), "c": frozenset()}
    )
    after = house.House(before.modules, {**before.uses, "b": {"c"}})
    assert before.floors() == [["b", "c"], ["a"]]
    assert after.floors() == [["c"], ["b"], ["a"]]
    assert after.shown_uses() == [("a", "b"), ("b", "c")]
    through = house.House(after.modules, {**after.uses, "a": {"b", "c"}})
    assert through.shown_uses() == after.shown_uses()  # a uses c through b already


def test_each_walk_has_at_most_twelve_stops() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = re.findall(r"^### .*?(?=^##)", text, flags=re.MULTILINE | re.DOTALL)
    assert len(walks) == 3
    for walk in walks:
        stops = re.findall(r"^(\d+)\. ", walk, flags=re.MULTILINE)
        assert [int(stop) for stop in stops] == list(range(1, len(stops) + 1))
        assert 8 <= len(stops) <= 12
        assert len(re.findall(r"`[\w/]+\.py:\w+", walk)) >= 8
