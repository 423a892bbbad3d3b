"""The architecture's import rules, by AST: downward only, rewards stand alone, light things stay torch-free."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The line runs downward: what stands in a later row may import what stands in an earlier one, never the other way.
# Modules that are not named here may stand anywhere, as long as no circle closes.
LINE = [
    ("errors", "statistics", "engine_options", "packing"),
    ("recipe", "upstream"),
    ("recipe_checks",),
    ("recipe_load", "recipe_schema"),
    ("run_dir",),
    ("base_model", "hardware"),
    ("data", "model", "reward_loader", "trainer", "rollout", "merge", "verify"),
    ("evaluate", "merge_run", "check"),
    ("fit",),
    ("train", "summary"),
    ("cli",),
]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "grpo_lite"}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return names


def modules(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).glob("*.py")) if path.stem not in ("__init__", "bootstrap")]


def graph() -> dict[str, set[str]]:
    names = {path.stem for path in modules("grpo_lite")}
    return {
        path.stem: {name.split(".")[1] for name in imported(path) if name.startswith("grpo_lite.")} & names
        for path in modules("grpo_lite")
    }


def test_imports_run_downward() -> None:
    level = {name: i for i, row in enumerate(LINE) for name in row}
    for name, targets in graph().items():
        for target in targets:
            if name in level and target in level:
                assert level[target] <= level[name], f"{name} imports {target}"


def test_no_circle_of_imports_not_even_a_lazy_one() -> None:
    edges = graph()
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_no_script_hides_a_package() -> None:
    """`python bench/x.py` puts bench/ first on the path: a bench/rewards.py there would be found as `rewards`."""
    packages = {"grpo_lite", "rewards", "recipes", "tests", *sys.stdlib_module_names}
    scripts = [path for folder in ("bench", "tests", "docs", "launch") for path in (ROOT / folder).glob("*.py")]
    assert len(scripts) > 50
    assert [path.name for path in scripts if path.stem in packages] == []


def test_nobody_imports_the_command_line() -> None:
    assert not [name for name, targets in graph().items() if "cli" in targets]


@pytest.mark.parametrize("path", modules("grpo_lite"), ids=lambda path: path.stem)
def test_bitsandbytes_is_at_home_in_the_model_modules(path: Path) -> None:
    if any(name.split(".")[0] == "bitsandbytes" for name in imported(path)):
        assert path.stem in ("model", "shadow", "nf4_export")


@pytest.mark.parametrize("path", modules("rewards"), ids=lambda path: path.stem)
def test_rewards_import_neither_torch_nor_us(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "transformers", "trl", "grpo_lite"}


@pytest.mark.parametrize("path", [*modules("grpo_lite"), *modules("rewards")], ids=lambda path: path.stem)
def test_a_module_has_at_most_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


SILENT = [path for path in modules("grpo_lite") if not path.stem.startswith("cli")]


@pytest.mark.parametrize("path", SILENT, ids=lambda path: path.stem)
def test_only_the_cli_prints_or_exits(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.exit", "exit", "click.echo"), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    "code",
    [
        "import rewards; rewards.accuracy_reward",
        "import grpo_lite.cli",
        "from grpo_lite.recipe_load import load_recipe; load_recipe('gsm8k')",
        "import grpo_lite.doctor, grpo_lite.report, grpo_lite.watch",
        "import grpo_lite.backend_choice, grpo_lite.remote_checkpoints, grpo_lite.reproduce",  # Unsloth comes before
    ],
)
def test_light_things_stay_free_of_torch(code: str) -> None:
    heavy = "{'torch', 'transformers', 'trl', 'sympy', 'datasets', 'peft'}"
    check = f"{code}; import sys; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
