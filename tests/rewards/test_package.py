"""The package as a user meets it: light to import, every reward by name, documented, with examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import rewards

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "rewards"
MODULES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if path.stem not in ("__init__", "server") and "build" not in path.relative_to(FOLDER).parts  # of `pip install`
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


def test_every_name_is_importable_and_found_by_dir() -> None:
    for name in rewards.__all__:
        assert callable(getattr(rewards, name))
        assert name in dir(rewards)


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'acuracy_reward'; it has: accuracy_reward, choice"):
        _ = rewards.acuracy_reward


def test_every_reward_documents_its_formula_source_and_an_example() -> None:
    docs = {name: inspect.getdoc(getattr(rewards, name)) or "" for name in REWARDS}
    parts = ("Formula", "Args:", "Returns:", "Source: ", ">>> ")
    assert [f"{name} has no {part!r}" for name, doc in docs.items() for part in parts if part not in doc] == []


def test_every_reward_takes_what_trl_passes() -> None:
    for name in REWARDS:
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
                names.add("rewards" if node.level else (node.module or "").split(".")[0])
        assert names <= {"rewards", *sys.stdlib_module_names} | FIELD_LIBRARIES.get(module, set()), module


def test_the_examples_of_the_documentation_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})


def test_the_documentation_names_every_reward() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert [name for name in rewards.__all__ if name not in text] == []


def test_rewards_state_their_facts() -> None:
    tops = {name: getattr(getattr(rewards, name), "top", None) for name in REWARDS}
    ones = {"accuracy", "choice", "countdown", "exact_match", "format", "reasoning_gym", "unit_test"}
    assert {name for name, top in tops.items() if top == 1.0} == {"honest_accuracy", *(f"{n}_reward" for n in ones)}
    assert {name for name, top in tops.items() if top == 0.0} == {
        "repetition_penalty_reward",
        "soft_overlong_punishment",
    }
    judged_twice = {name: getattr(getattr(rewards, name), "second_opinion", None) for name in REWARDS}
    assert {name: opinion for name, opinion in judged_twice.items() if opinion} == {
        "accuracy_reward": rewards.honest_accuracy
    }
    assert [name for name in REWARDS if getattr(getattr(rewards, name), "runs_code", False)] == ["unit_test_reward"]


def test_a_perfect_completion_earns_the_stated_top() -> None:
    entry = {"question": "?", "answer": "4", "metadata": {"source_dataset": "basic_arithmetic"}}
    columns: dict[str, dict[str, Any]] = {
        "accuracy_reward": {"answer": ["4"]},
        "choice_reward": {"answer": ["B"]},
        "countdown_reward": {"nums": [[4, 9]], "target": [4]},
        "exact_match_reward": {"answer": ["4"]},
        "format_reward": {},
        "honest_accuracy": {"answer": ["4"]},
        "reasoning_gym_reward": {"entry": [entry]},
        "repetition_penalty_reward": {},
        "soft_overlong_punishment": {"completion_ids": [[1]], "max_completion_length": 9, "cache_length": 3},
        "unit_test_reward": {"test_list": [["assert f() == 4"]]},
    }
    texts = {"choice_reward": "<answer>B</answer>", "unit_test_reward": "```python\ndef f():\n    return 4\n```"}
    stated = {name for name in REWARDS if getattr(getattr(rewards, name), "top", None) is not None}
    assert stated - {"judge_reward"} == set(columns)  # that one asks a server: tests/rewards/test_llm_judge.py
    if find_spec("reasoning_gym") is None:
        del columns["reasoning_gym_reward"]
    for name, column in columns.items():
        reward = getattr(rewards, name)
        text = texts.get(name, "<think>two twos</think><answer>4</answer>")
        assert reward([text], **column) == [reward.top], name


def test_wrappers_keep_the_facts() -> None:
    shared = rewards.memoised(rewards.accuracy_reward)
    assert (shared.top, shared.second_opinion) == (1.0, rewards.honest_accuracy)
    assert rewards.gated(rewards.format_reward, by=shared).top == 1.0
    assert not hasattr(rewards.memoised(lambda completions: [0.0]), "top")
