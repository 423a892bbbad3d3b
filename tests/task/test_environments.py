"""The recipe's tools and environments: what loads, and the one line for each thing that does not."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import GRPOLiteError
from grpo_lite.recipe.recipe import LimitsSection, Recipe
from grpo_lite.task.environments import Toolkit, load_toolkit, require_environment_columns, tool_template
from grpo_lite.task.prompts import load_prompts
from grpo_lite.task.rewards import load_rewards
from grpo_lite.task.tool_guard import ToolFailure, ToolGuard
from tests.tool_model import tool_tokenizer

SOURCE = '''
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one.
        b: the other.
    """
    return a + b

def untyped(a):
    """Do something.

    Args:
        a: a thing.
    """

def undocumented(a: int) -> int:
    return a

class Env:
    def reset(self, **row) -> None: ...
    def look(self) -> str:
        """Look around."""
        return "here"
    def get_reward(self) -> float:
        return 1.0

class Unpaid:
    def reset(self, **row) -> None: ...
    look = Env.look

class WithoutReset:
    look = Env.look

class AsyncReset:
    async def reset(self, **row): ...
    look = Env.look

class WithoutMethods:
    def reset(self, **row) -> None: ...

class Needy:
    def __init__(self, size): ...
    reset = Env.reset
'''


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "my_env.py"
    path.write_text(SOURCE)
    return str(path)


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "description": "d",
            "least_gpu": "none",
            "model": {"id": "m"},
            "data": {"train": {"path": "x.jsonl"}},
            "rewards": [{"function": "rewards.accuracy_reward"}],
            **changes,
        }
    )


def test_tools_and_environments_load_as_trl_wants_them(file: str, monkeypatch: pytest.MonkeyPatch):
    toolkit = load_toolkit(recipe(tools=[f"{file}:add"], environment=f"{file}:Env", rewards=[]))
    assert isinstance(toolkit, Toolkit)
    assert [tool.__name__ for tool in toolkit.offered({})] == ["add", "look"]
    assert toolkit.arguments["tools"][0](2, 3) == 5
    assert toolkit.arguments["environment_factory"]().get_reward() == 1.0
    monkeypatch.syspath_prepend(str(Path(file).parent))
    sys.modules.pop("my_env", None)
    several = load_toolkit(recipe(environment={"one": f"{file}:Env", "two": "my_env:Unpaid"}))
    assert isinstance(several, Toolkit)
    assert set(several.arguments["environment_factory"]) == {"one", "two"}
    assert [tool.__name__ for tool in several.offered({"environment": "two"})] == ["look"]
    require_environment_columns(several, [{"environment": "one"}], "data.train")
    with pytest.raises(GRPOLiteError, match=r"data.train: row 1: environment: 'three' is given; allowed: one, two"):
        require_environment_columns(several, [{"environment": "one"}, {"environment": "three"}], "data.train")
    assert load_toolkit(recipe()) is None


def test_columns_that_reset_does_not_take_are_named_before_a_model_is_loaded(tmp_path: Path):
    path = tmp_path / "narrow.py"
    path.write_text(SOURCE.replace("def reset(self, **row)", "def reset(self, number, prompt)", 1))
    toolkit = load_toolkit(recipe(environment=f"{path}:Env", rewards=[]))
    assert toolkit is not None
    require_environment_columns(toolkit, [{"number": 1, "prompt": []}], "data.train")
    message = r"data.train: row 1: Env.reset: missing a required argument: 'number'; the row has the columns prompt\."
    with pytest.raises(GRPOLiteError, match=message):
        require_environment_columns(toolkit, [{"number": 1, "prompt": []}, {"prompt": []}], "data.train")
    with pytest.raises(GRPOLiteError, match=r"unexpected keyword argument 'answer'.*or let reset take all others"):
        require_environment_columns(toolkit, [{"number": 1, "prompt": [], "answer": "2"}], "data.train")


def test_rows_have_all_columns_of_their_source_as_in_training(tmp_path: Path):
    path, rows = tmp_path / "narrow.py", tmp_path / "rows.jsonl"
    path.write_text(SOURCE.replace("def reset(self, **row)", "def reset(self, number, prompt, low=None)", 1))
    rows.write_text('{"number": 1, "question": "q"}\n{"number": 2, "question": "q", "low": 3}\n')
    data = {"train": {"path": str(rows)}, "prompt": "{question}", "answer": None, "holdout": 0}
    settings = {"data": data, "rewards": [], "eval": {"enabled": False}}
    with pytest.raises(GRPOLiteError, match=r"data.train: row 0: Env.reset: .*unexpected keyword argument 'question'"):
        load_prompts(recipe(environment=f"{path}:Env", **settings))
    path.write_text(path.read_text().replace("low=None)", "question, low=None)"))
    prompts = load_prompts(recipe(environment=f"{path}:Env", **settings))
    assert [row["low"] for row in prompts.train] == [None, 3]
    path.write_text(path.read_text().replace(", low=None)", ")"))
    with pytest.raises(GRPOLiteError, match=r"row 1: Env.reset: .*unexpected keyword argument 'low'"):
        load_prompts(recipe(environment=f"{path}:Env", **settings))


def test_two_classes_of_one_name_are_refused(file: str, tmp_path: Path):
    other = tmp_path / "other.py"
    other.write_text(SOURCE)
    with pytest.raises(GRPOLiteError, match="environment: two classes are called Env; their rewards are told apart"):
        load_toolkit(recipe(environment={"one": f"{file}:Env", "two": f"{other}:Env"}))
    assert load_toolkit(recipe(environment={"one": f"{file}:Env", "two": f"{file}:Env"}))


@pytest.mark.parametrize(("limit", "noted"), [(None, True), (6, False)])
def test_episodes_that_need_not_end_are_noted(file: str, tmp_path: Path, limit: int | None, noted: bool):
    (tmp_path / "rows.jsonl").write_text('{"question": "Look."}\n' * 3)
    grpo = {"max_tool_calling_iterations": limit, "max_completion_length": 8192}
    data = {"train": {"path": str(tmp_path / "rows.jsonl")}, "prompt": "{question}", "answer": None, "holdout": 0}
    prompts = load_prompts(recipe(environment=f"{file}:Env", grpo=grpo, data=data, eval={"enabled": False}))
    line = "turns are not limited: a model that only calls tools fills all 8192"
    assert any(line in note for note in prompts.notes) is noted


def test_a_template_that_rewrites_earlier_turns_is_refused_and_known_ones_are_named(monkeypatch: pytest.MonkeyPatch):
    import trl.chat_template_utils as templates

    def unknown(tokenizer: Any) -> str:
        raise ValueError

    monkeypatch.setattr(templates, "is_chat_template_prefix_preserving", lambda tokenizer: False)
    monkeypatch.setattr(templates, "get_training_chat_template", unknown)
    with pytest.raises(GRPOLiteError, match=r"of m rewrites earlier turns .* Qwen2.5, Qwen3, Qwen3.5 and Llama 3.1"):
        tool_template(tool_tokenizer(), "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": ["FILE:ad"]}, r"tools\[0\]: .*there is no 'ad' in it \(did you mean 'add'"),
        ({"tools": ["FILE:untyped"]}, r"tools\[0\]: .*untyped: transformers makes no schema of it: .*type hint"),
        ({"tools": ["FILE:undocumented"]}, r"undocumented: transformers makes no schema of it: .*docstring"),
        ({"tools": ["FILE:add", "FILE:add"]}, "two tools are called add"),
        ({"tools": ["nowhere.py:add"]}, r"tools\[0\]: 'nowhere.py' is given, but there is no such file"),
        ({"environment": "FILE:WithoutReset"}, "environment: .*WithoutReset: has no method `reset`"),
        ({"environment": "FILE:AsyncReset"}, "`reset` is async; TRL calls it without awaiting it"),
        ({"environment": "FILE:WithoutMethods"}, "has no public method beside reset"),
        ({"environment": "FILE:Needy"}, "cannot be made without arguments: TypeError"),
        ({"environment": "FILE:Unpaid", "rewards": []}, r"rewards: \[\] is given, and .*Unpaid has no get_reward"),
    ],
)
def test_what_is_not_in_the_contract_is_one_line(file: str, changes: dict[str, Any], message: str):
    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(item) for item in value]
        return value.replace("FILE", file) if isinstance(value, str) else value

    with pytest.raises(GRPOLiteError, match=message) as error:
        load_toolkit(recipe(**{key: named(value) for key, value in changes.items()}))
    assert "\n" not in str(error.value)


def test_no_reward_at_all_is_refused_by_the_recipe():
    with pytest.raises(ValueError, match=r"rewards: \[\] is given; at least one reward is needed"):
        recipe(rewards=[], tools=["rewards.accuracy_reward"])
    assert load_rewards(recipe(rewards=[], environment="x:Y"), []) == ([], [])


def test_a_model_without_a_tool_template_is_refused():
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(GRPOLiteError, match=r"the chat template of m cannot show calls .*Qwen3"):
        tool_template(tokenizer, "m")


def test_a_guarded_tool_gives_text_or_a_failure():
    guard = ToolGuard(LimitsSection(tool_timeout_s=0.2, tool_result_chars=100), lambda line: None)

    async def later(text: str) -> str:
        return text

    def huge() -> str:
        return "x" * 1000

    class Odd:
        def __str__(self) -> str:
            raise ValueError("no")

    assert guard.wrap(later, ())(text="a") == "a"
    assert guard.wrap(huge, ())().endswith("[cut: 1000 characters, the first 100 shown]")
    assert guard.wrap(dict, ())(a=1) == "{'a': 1}"
    with pytest.raises(ToolFailure, match="no text"):
        guard.wrap(Odd, ())()


def test_each_reason_is_shown_once_on_a_line_of_its_own():
    lines: list[str] = []
    guard = ToolGuard(LimitsSection(), lines.append)

    def fail(why: str) -> str:
        raise ValueError(why)

    tool = guard.wrap(fail, ())
    for why in ("one", "one", "two\nlines", "long " * 200, "four"):
        with pytest.raises(ToolFailure):
            tool(why=why)
    assert lines[:2] == ["tool failed: fail: one", "tool failed: fail: two lines"]
    assert lines[2].endswith("long…; further ones are only counted")
    assert len(lines) == 3
    assert len(lines[2]) < 400


def test_calls_share_the_time_of_their_episode_and_of_the_round():
    limits = LimitsSection(tool_timeout_s=5, tool_episode_timeout_s=0.3, tool_round_timeout_s=0.5)
    lines: list[str] = []
    guard = ToolGuard(limits, lines.append)

    def nap(seconds: float) -> str:
        time.sleep(seconds)
        return "awake"

    first, second, third = (guard.wrap(nap, budgets) for budgets in guard.budgets(3))
    assert first(seconds=0.01) == "awake"
    with pytest.raises(ToolFailure, match=r"took longer than 0\.2\d* s, what limits.tool_episode_timeout_s had left"):
        first(seconds=5)
    with pytest.raises(ToolFailure, match=r"not called: no time is left \(limits.tool_episode_timeout_s\)"):
        first(seconds=0)
    with pytest.raises(ToolFailure, match=r"what limits.tool_round_timeout_s had left"):
        second(seconds=5)
    with pytest.raises(ToolFailure, match=r"not called: no time is left \(limits.tool_round_timeout_s\)"):
        third(seconds=0)
    assert guard.timeouts == 2
    (again, *_) = (guard.wrap(nap, budgets) for budgets in guard.budgets(1))  # the next round
    assert again(seconds=0) == "awake"
