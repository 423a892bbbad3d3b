"""Rewards by dotted path or file: imported, checked against the columns, and held to their contract."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grpo_lite.errors import RewardError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe, RewardSection
from grpo_lite.task.rewards import load_function, load_rewards

USER_FILE = """
import math
def good(completions, answer, scale=1.0, **kwargs):
    return [scale * (c == a) for c, a in zip(completions, answer)]
def closed(completions, answer):
    return [1.0 for _ in completions]
def short(completions, **kwargs):
    return [1.0]
def number(completions, **kwargs):
    return 1.0
def text(completions, **kwargs):
    return ["a" for _ in completions]
def nan(completions, **kwargs):
    return [math.nan for _ in completions]
def some_none(completions, **kwargs):
    return [None, True]
def breaks(completions, **kwargs):
    return [1 / 0]
def wrong_signature(texts):
    return [1.0]
def needs(completions, level):
    return [1.0 for _ in completions]
constant = 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(USER_FILE)
    return str(path)


def load(reference: str, columns: tuple[str, ...] = ("answer",), **kwargs: Any) -> Any:
    return load_function(RewardSection(function=reference, kwargs=kwargs), "rewards[0]", columns)  # type: ignore[call-arg]


def test_a_reward_from_a_file_runs_with_its_kwargs_bound(user_file: str) -> None:
    reward = load(f"{user_file}:good", scale=2.0)
    assert reward(completions=["1", "2"], answer=["1", "1"], trainer_state=None) == [2.0, 0.0]
    assert reward.__name__ == "good"


def test_a_reward_without_open_kwargs_gets_only_what_it_names(user_file: str) -> None:
    assert load(f"{user_file}:closed")(completions=["1"], answer=["1"], prompts=["x"], log_metric=None) == [1.0]


def test_none_and_bool_are_rewards(user_file: str) -> None:
    assert load(f"{user_file}:some_none")(completions=["1", "2"]) == [None, 1.0]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("short", "returned 1 rewards for 2 completions"),
        ("number", "returned a float; a list of 2 floats"),
        ("text", "returned 'a' at position 0"),
        ("nan", "returned nan at position 0; rewards are finite"),
        ("breaks", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_contract_is_named(user_file: str, name: str, expected: str) -> None:
    with pytest.raises(RewardError, match=expected):
        load(f"{user_file}:{name}")(completions=["1", "2"], answer=["1", "1"])


@pytest.mark.parametrize(
    "name, expected",
    [
        ("wrong_signature", r"has the signature \(texts\); a reward is called as f\(completions="),
        ("needs", "needs level, and no dataset column has that name. Columns: answer"),
        ("goood", r"there is no 'goood' in it \(did you mean 'good'\?\)"),
        ("constant", "is a int, not a function"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused_before_training(user_file: str, name: str, expected: str) -> None:
    with pytest.raises(RewardError, match=expected):
        load(f"{user_file}:{name}")


@pytest.mark.parametrize(
    "reference, expected",
    [
        ("accuracy", "write module.name"),
        ("my_rewards.py", "or file.py:name"),
        ("no_such_module_x.f", "does not import: ModuleNotFoundError"),
        ("nowhere.py:f", "there is no such file"),
        ("grpo_lite.task.generators.sumz", r"did you mean 'sums'"),
    ],
)
def test_a_reward_that_is_not_there_is_named(reference: str, expected: str) -> None:
    with pytest.raises(RewardError, match=expected):
        load(reference)


def test_a_file_that_does_not_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(RewardError, match=r"bad\.py does not import: SyntaxError"):
        load(f"{tmp_path / 'bad.py'}:f")


def test_an_unknown_kwarg_of_a_closed_reward_is_refused(user_file: str) -> None:
    with pytest.raises(RewardError, match=r"rewards\[0\]\.kwargs\.level: .* has no such argument"):
        load(f"{user_file}:closed", level=3)


def test_a_numpy_array_is_a_list_of_rewards(tmp_path: Path) -> None:
    (tmp_path / "np_reward.py").write_text(
        "import numpy as np\ndef f(completions, **kwargs):\n    return np.ones(len(completions), dtype=np.float32)\n"
    )
    out = load(f"{tmp_path / 'np_reward.py'}:f")(completions=["a", "b"])
    assert out == [1.0, 1.0]
    assert all(math.isfinite(x) for x in out)


@pytest.mark.parametrize("column", ["answer", "solution"])
def test_golds_in_either_column_reach_the_accuracy_reward(column: str) -> None:
    reward = load("rewards.accuracy_reward", (column,))
    assert reward(completions=["#### 4"], **{column: ["4"]}) == [1.0]


def test_an_accuracy_reward_without_a_column_of_golds_is_refused() -> None:
    with pytest.raises(RewardError, match="needs answer or solution, and no dataset column has that name"):
        load("rewards.accuracy_reward", ("level",))


def test_a_reward_with_a_lower_top_opens_the_gate_at_that_top() -> None:
    def judge(completions: list[str], **_: Any) -> list[float]:
        return [0.8 if text == "good" else 0.7 for text in completions]

    judge.top = 0.8  # type: ignore[attr-defined]

    def style(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    sys.modules["gate_under_test"] = module = ModuleType("gate_under_test")
    module.judge, module.style = judge, style  # type: ignore[attr-defined]
    changed = {"rewards": [{"function": "gate_under_test.judge"}, {"function": "gate_under_test.style", "gate": True}]}
    recipe = Recipe.model_validate(load_recipe("smoke").model_dump() | changed)
    _, gated = load_rewards(recipe, [])[0]
    assert gated(completions=["good", "nearly"]) == [0.5, 0.0]
