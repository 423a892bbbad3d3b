"""The package as a user meets it: light to import, every reward by name, documented, with examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rewards

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "rewards"
MODULES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if path.stem not in ("__init__", "server")
)
REWARDS = [name for name in rewards.__all__ if name.endswith(("_reward", "_punishment", "_accuracy"))]
# Modules that run in a process of their own may import a field library as they load.
FIELD_LIBRARIES = {"math.symbolic": {"sympy"}}


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100, check=True
    )
    return done.stdout.strip()


def test_importing_the_package_loads_no_library_and_no_module_of_its_own() -> None:
    code = "import sys; before = set(sys.modules); import rewards; print(sorted(set(sys.modules) - before))"
    loaded = ast.literal_eval(run(code))
    assert [name for name in loaded if name.startswith("rewards.")] == []
    assert {name.split(".")[0] for name in loaded} <= {"rewards", *sys.stdlib_module_names}


def test_a_reward_at_work_loads_no_third_party_library() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from rewards import accuracy_reward, choice_reward, concise_reward, countdown_reward, format_reward\n"
        "accuracy_reward(['#### 4', r'\\boxed{\\sqrt{8}}'], [4, r'2\\sqrt{2}'])\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert ast.literal_eval(run(code)) == ["rewards"]


@pytest.mark.parametrize("name", rewards.__all__)
def test_every_name_is_importable_and_found_by_dir(name: str) -> None:
    assert callable(getattr(rewards, name))
    assert name in dir(rewards)


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'acuracy_reward'; it has: accuracy_reward, choice"):
        _ = rewards.acuracy_reward


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_documents_its_formula_source_and_an_example(name: str) -> None:
    doc = inspect.getdoc(getattr(rewards, name)) or ""
    for part in ("Formula", "Args:", "Returns:", "Source: ", ">>> "):
        assert part in doc, f"{name} has no {part!r}"


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_takes_what_trl_passes(name: str) -> None:
    parameters = inspect.signature(getattr(rewards, name)).parameters
    assert next(iter(parameters)) == "completions"
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_examples_in_docstrings_run() -> None:
    failed = {module: doctest.testmod(importlib.import_module(f"rewards.{module}")).failed for module in MODULES}
    assert [module for module, count in failed.items() if count] == []


def test_the_package_s_own_example_runs() -> None:
    assert doctest.testmod(rewards).failed == 0


def test_modules_import_the_standard_library_and_each_other() -> None:
    for module in MODULES:
        tree = ast.parse((FOLDER / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        names = set()
        for node in tree.body:
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
        assert names <= {"rewards", *sys.stdlib_module_names} | FIELD_LIBRARIES.get(module, set()), module


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_examples_of_the_documentation_run(number: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    exec(blocks[number], {})


def test_the_documentation_names_every_reward() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert [name for name in rewards.__all__ if name not in text] == []
