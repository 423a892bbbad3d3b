"""reasoning_gym_reward: what the library's own verifiers pay, bounded by the judge; skipped without the library."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from rewards import reasoning_gym_reward

installed = importlib.util.find_spec("reasoning_gym") is not None
needs_library = pytest.mark.skipif(not installed, reason="reasoning-gym is not installed")
ROW = {"question": "3 + 4 =", "answer": "7", "metadata": {"source_dataset": "basic_arithmetic"}}
TEXTS = [
    "<answer>7</answer>",
    "<answer>8</answer>",
    "7",
    "",
    "<think><answer>7</answer></think>",
    "<answer>-7</answer>",
]
PAID = [1.0, 0.0, 0.0, 0.0, 0.0, 0.5]  # the library pays len(gold)/len(answer) where the gold is part of the answer


@needs_library
def test_the_task_s_verifier_pays() -> None:
    assert reasoning_gym_reward(TEXTS, [ROW] * 6) == PAID


@needs_library
def test_rows_come_as_json_or_as_columns() -> None:
    assert reasoning_gym_reward(TEXTS, [json.dumps(ROW)] * 6) == PAID
    columns: dict[str, Any] = {"answer": ["7"] * 6, "metadata": [ROW["metadata"]] * 6, "question": ["3 + 4 ="] * 6}
    assert reasoning_gym_reward(TEXTS, **columns) == PAID
    assert reasoning_gym_reward(TEXTS, **(columns | {"metadata": [json.dumps(ROW["metadata"])] * 6})) == PAID


@needs_library
def test_a_row_of_no_known_task_gives_none() -> None:
    rows = [None, "", {}, {"metadata": {}}, {"metadata": {"source_dataset": "no_such_task"}, "answer": "1"}, ROW]
    assert reasoning_gym_reward(["<answer>7</answer>"] * 6, rows) == [None, None, None, None, None, 1.0]


@needs_library
def test_generated_rows_pay_their_own_answer() -> None:
    script = """
import json, reasoning_gym
for task in ("countdown", "simple_equations", "leg_counting", "polynomial_equations"):
    print(json.dumps(list(reasoning_gym.create_dataset(task, size=3, seed=1)), default=str))
"""  # in a process of its own: the library imports plotting, and this one stays light
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    rows = [row for line in made.stdout.splitlines() for row in json.loads(line)]
    assert reasoning_gym_reward([f"<answer>{row['answer']}</answer>" for row in rows], rows) == [1.0] * 12


@needs_library
def test_metrics_name_verifiers_that_broke() -> None:
    seen: dict[str, float] = {}
    broken = {"metadata": {"source_dataset": "basic_arithmetic"}}
    assert reasoning_gym_reward(["<answer>7</answer>"] * 2, [ROW, broken], log_metric=seen.__setitem__) == [1.0, 0.0]
    assert seen == {"reasoning_gym_reward/timeout": 0.0, "reasoning_gym_reward/broken": 0.5}


@needs_library
def test_missing_columns_are_named() -> None:
    with pytest.raises(ValueError, match="`entry`, or the columns `answer` and `metadata`"):
        reasoning_gym_reward(["7"])


def test_a_missing_library_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.reasoning_gym.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'grpo-lite\[reasoning-gym\]'"):
        reasoning_gym_reward(["7"], [ROW])
