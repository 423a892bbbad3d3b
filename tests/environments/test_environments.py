"""The environments of the kit: gold policies earn 1, cheats do not, and no argument makes a tool raise."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from grpo_lite.environments import BUILT_IN
from grpo_lite.environments.calculator import Calculator, evaluate
from grpo_lite.environments.play import play, play_in, tools_of
from grpo_lite.task.generators import generate_rows

Rows = Callable[[int], list[dict[str, Any]]]
ROWS: dict[str, Rows] = {
    "calculator": lambda size: generate_rows("products", {"size": size}, seed=3),
}
HOSTILE = [None, 3, -1, 2**70, 1.5, True, [], {}, [["a"]], "", " ", "\x00", "é" * 9, "\ud800", "＋１", "9" * 50_000,
           "(" * 300, "<tool_call>{}</tool_call>", "__import__('os').getcwd()", "1;2", "\n\n"]  # fmt: skip


def module_and_class(name: str) -> tuple[Any, Any]:
    module, _, class_name = BUILT_IN[name].partition(":")
    loaded = import_module(module)
    return loaded, getattr(loaded, class_name)


@pytest.fixture(params=sorted(ROWS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_gold_policy_earns_everything_and_repeats(name: str) -> None:
    module, environment = module_and_class(name)
    rows = ROWS[name](50)
    assert len({str(row) for row in rows}) == 50
    assert rows == ROWS[name](50)
    episodes = [play(environment, row, module.gold(row)) for row in rows]
    assert [reward for reward, _ in episodes] == [1.0] * 50
    assert play(environment, rows[0], module.gold(rows[0])) == episodes[0]


def test_no_cheat_is_paid(name: str) -> None:
    module, environment = module_and_class(name)
    paid = [
        (cheat, row, reward)
        for row in ROWS[name](5)
        for cheat, turns in module.cheats(row).items()
        if (reward := play(environment, row, turns)[0]) != 0.0
    ]
    assert paid == []


def test_hostile_arguments_give_one_short_error_and_no_exception(name: str) -> None:
    module, environment = module_and_class(name)
    instance, row = environment(), ROWS[name](1)[0]
    instance.reset(**row)
    for call, tool in tools_of(instance).items():
        good = next(c for turn in module.gold(row) for c in turn if c["name"] == call)["arguments"]
        for argument in good:
            for value in HOSTILE:
                text = tool(**{**good, argument: value})
                assert isinstance(text, str)
                assert len(text) < 2500, (argument, value)
                assert "<tool_call>" not in text
    assert instance.get_reward() == 0.0


def test_an_episode_leaves_nothing_to_the_next(name: str) -> None:
    module, environment = module_and_class(name)
    instance, (first, second) = environment(), ROWS[name](2)
    assert play_in(instance, first, module.gold(first))[0] == 1.0
    assert play_in(instance, second, ["I do not know"])[0] == 0.0
    assert play_in(instance, second, module.gold(second)) == play(environment, second, module.gold(second))


def test_transformers_reads_the_schemas_of_the_tools(name: str) -> None:
    from transformers.utils import get_json_schema

    for call, tool in tools_of(module_and_class(name)[1]()).items():
        schema = get_json_schema(tool)["function"]
        assert schema["name"] == call
        assert all(part["description"] for part in schema["parameters"]["properties"].values())


@pytest.mark.parametrize(
    "expression, value",
    [
        ("17*23", "391"),
        ("(2+3)*-4", "-20"),
        ("7/2", "3.5"),
        ("0.1+0.2", "0.3"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("2**10", "1024"),
        ("2**-1", "0.5"),
        ("2**0.5", "1.41421356237"),
        ("(-1)**999999999999", "-1"),
        ("0**0", "1"),
        ("12 × 12 ÷ 9 − 1=", "15"),
    ],
)
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression, error",
    [
        ("9**9**9", "too large"),
        ("2**1001", "too large"),
        ("2**(1/3)**-99", "too large"),
        ("9" * 390, "too large"),
        ("9**99*9**99*9**99*9**99", "too large"),
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("(-8)**0.5", "no real value"),
        ("1,000*2", "are allowed"),
        ("abs(1)", "are allowed"),
        ("1(2)", "are allowed"),
        ("()", "are allowed"),
        ("1+", "complete expression"),
        ("-" * 390 + "(", "complete expression"),
    ],
)  # fmt: skip
def test_the_calculator_refuses(expression: str, error: str) -> None:
    text = Calculator().calculate(expression)
    assert text.startswith("Error: ")
    assert error in text


@pytest.mark.parametrize("seed", range(3))
def test_the_calculator_agrees_with_python(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        text = "".join(f"{rng.randint(1, 99)}{rng.choice(['+', '-', '*', '//', '%'])}" for _ in range(5)) + "7"
        assert evaluate(text) == str(eval(text))  # our own generated arithmetic


def test_a_result_may_be_used_again() -> None:
    row = {"question": "Three boxes of 24 and 12 more?", "answer": 84}
    calls = [[{"name": "calculate", "arguments": {"expression": text}}] for text in ("3*24", "72+12", "84*1")]
    assert play(Calculator, row, calls)[0] == 1.0
    assert play(Calculator, row, [*calls, *calls[:1]])[0] == 0.0  # the last result counts
    assert play(Calculator, {"question": "3*24"}, calls)[0] is None


def test_a_failing_call_shows_what_trl_would_show() -> None:
    class Broken:
        def reset(self, **row: Any) -> str:
            return " now"

        def explode(self) -> str:
            raise RuntimeError("boom")

        async def slow(self) -> int:
            return 7

    calls = [{"name": name, "arguments": {}} for name in ("explode", "slow", "none", "reset")]
    wrong = [{"name": "slow", "arguments": {"x": 1}}, {"name": "slow", "arguments": "x"}, {}]
    reward, messages = play(Broken, {"prompt": [{"role": "user", "content": "go"}]}, [[*calls, *wrong], "end", "late"])
    assert reward is None
    assert messages[0] == {"role": "user", "content": "go now"}
    shown = [message["content"] for message in messages if message["role"] == "tool"]
    assert shown[:4] == ["{'error': 'boom'}", "7", "{'error': 'Tool none not found.'}",
                         "{'error': 'Tool reset not found.'}"]  # fmt: skip
    assert all(text.startswith("{'error': ") for text in shown[4:])
    assert messages[-1] == {"role": "assistant", "content": "end"}
