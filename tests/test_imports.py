"""The architecture's import rules, by AST: downward only, rewards stand alone, light things stay torch-free."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import those of its own layer and of the layers below it.
LAYERS = [
    {"errors", "statistics"},
    {"upstream", "recipe"},
    {"recipe_checks"},
    {"recipe_load", "recipe_schema"},
    {
        "run_dir",
        "hardware",
        "manifest",
        "shards",
        "export_folder",
        "engine_options",
        "packing",
        "attention",
        "logprobs",
    },
    {"base_model", "generators", "lora_adapter", "merge_math", "merge_plan", "packed_forward"},
    {"data", "model", "reward_loader", "generate", "progress", "trainer", "rollout", "sampling", "trainer_rows"},
    {"merge", "verify", "check"},
    {"evaluate", "merge_run"},
    {"train", "summary"},
    {"cli"},
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


@pytest.mark.parametrize("path", modules("grpo_lite"), ids=lambda path: path.stem)
def test_a_module_imports_downward_only(path: Path) -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert path.stem in level, f"place {path.stem} in a layer"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "grpo_lite" and len(parts) > 1 and parts[1] in level:
            assert level[parts[1]] <= level[path.stem], f"{path.stem} imports {parts[1]}"


@pytest.mark.parametrize("path", modules("rewards"), ids=lambda path: path.stem)
def test_rewards_import_neither_torch_nor_us(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "transformers", "trl", "grpo_lite"}


@pytest.mark.parametrize("path", [*modules("grpo_lite"), *modules("rewards")], ids=lambda path: path.stem)
def test_a_module_has_at_most_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", [p for p in modules("grpo_lite") if p.stem != "cli"], ids=lambda path: path.stem)
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
    ],
)
def test_light_things_stay_free_of_torch(code: str) -> None:
    heavy = "{'torch', 'transformers', 'trl', 'sympy', 'datasets', 'peft'}"
    check = f"{code}; import sys; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
