"""Async rewards: awaited together, limited, left out by groups, and a spent budget stops the run cleanly."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.cli import INTERRUPTED
from grpo_lite.errors import RewardError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import RewardSection
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.task.guard import awaited, limited
from grpo_lite.task.rewards import load_function, load_rewards
from rewards import each_row
from rewards.waiting import TryAgain
from tests.command_line import in_process
from tests.rewards.judge_server import judging, response_in, verdict
from tests.task.test_guard import TEXTS, guarded


@pytest.fixture(autouse=True)
def no_waiting_before_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.waiting._FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("grpo_lite.rewards.waiting._FIRST_WAIT_S", 0.01)


async def ords(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0.2)
    return [float(ord(text[0])) for text in completions]


async def raises(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(ord(text[0])) if text != "bad" else 1 / 0 for text in completions]


async def hangs(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(30 if "bad" in completions else 0)
    return [float(ord(text[0])) for text in completions]


async def blocks(completions: list[str], **_: Any) -> list[float]:
    if "bad" in completions:
        time.sleep(5)
    return [float(ord(text[0])) for text in completions]


@pytest.mark.parametrize("function", [raises, hangs, blocks], ids=lambda f: f.__name__)
def test_a_fault_of_an_async_reward_costs_its_group_only(function: Any) -> None:
    reward = guarded(function, reward_timeout_s=0.6)
    start = time.monotonic()
    scores = reward(completions=TEXTS, answer=TEXTS)
    assert time.monotonic() - start < 5
    expected = [97.0, 98.0, None, None, 101.0, 102.0]
    # What waits takes the whole time of the second try, so the groups behind it have none left.
    assert scores == (expected if function is raises else [97.0, 98.0, None, None, None, None])
    assert reward(completions=["a", "b"], answer=[1, 2]) == [97.0, 98.0]  # a blocked loop is left behind


def test_two_async_rewards_wait_together() -> None:
    async def both() -> Any:
        rewards = [awaited(guarded(ords)), awaited(guarded(ords))]
        return await asyncio.gather(*(reward(completions=["a"], answer=[1]) for reward in rewards))

    guarded(ords)(completions=["a"], answer=[1])  # the loop has started
    start = time.monotonic()
    assert asyncio.run(both()) == [[97.0], [97.0]]
    assert time.monotonic() - start < 0.39  # 0.2 s each


def test_an_async_reward_is_an_ordinary_one_for_checks_and_scores() -> None:
    assert limited(guarded(ords).function, 5.0, "check")(completions=["a", "b"], answer=[1, 2]) == [97.0, 98.0]
    with pytest.raises(RewardError, match=r"took longer than limits.reward_timeout_s"):
        limited(guarded(hangs).function, 0.3, "check")(completions=["bad"], answer=[1])


def test_each_row_retries_its_rows_and_excludes_the_groups_of_those_that_fail() -> None:
    asked: list[str] = []

    @each_row(retries=2)
    async def one(completion: str, answer: str) -> float:
        asked.append(completion)
        if completion == "bad" or asked.count(completion) == 1:
            raise TryAgain("busy")
        return float(ord(answer[0]))

    lines: list[str] = []
    reward = guarded(one, lines.append)
    assert reward(completions=TEXTS, answer=TEXTS) == [97.0, 98.0, None, None, 101.0, 102.0]
    assert reward.excluded == (2, 3)
    assert [asked.count(text) for text in ("a", "bad")] == [2, 3]
    assert "1 of 6 rows could not be scored, the first because busy; 1 of 3 groups are left out" in lines[0]


def test_a_gate_asks_only_about_the_rows_that_pass(tmp_path: Path) -> None:
    """As `gate: true` has it: the judge stands behind the recipe's first reward, and both are loaded from it."""
    module = tmp_path / "mine.py"
    module.write_text(
        "from rewards import each_row\nasked = []\n\n@each_row()\nasync def style(completion, answer):\n"
        "    asked.append(completion)\n    if completion == 'bad':\n        raise ValueError\n    return 0.5\n\n"
        "def right(completions, answer, **kwargs):\n"
        "    return [None if a is None else float(c == a) for c, a in zip(completions, answer)]\n"
    )
    recipe = load_recipe(
        "smoke", [f"rewards=[{{function: '{module}:right'}}, {{function: '{module}:style', gate: true}}]"]
    )
    (right, style), _ = load_rewards(recipe, ["answer"])
    batch = {"completions": ["a", "bad", "c", "d"], "answer": ["a", "x", None, "d"]}
    assert right(**batch) == [1.0, 0.0, None, 1.0]
    assert style(**batch) == [0.5, 0.0, None, 0.5]
    assert sorted(sys.modules["grpo_lite_user_rewards_mine"].asked) == ["a", "d"]


def test_a_fault_in_a_rows_function_is_named_as_any_other() -> None:
    @each_row()
    async def one(completion: str) -> float:
        return 1 / 0

    with pytest.raises(RewardError, match=r"rewards\[0\]: .* raised ZeroDivisionError"):
        guarded(one).function(completions=["a"])


def test_a_column_that_a_rows_function_needs_is_asked_for() -> None:
    import sys
    import types

    @each_row()
    async def one(completion: str, missing: str) -> float:
        return 1.0

    sys.modules["rows_under_test"] = module = types.ModuleType("rows_under_test")
    module.one = one  # type: ignore[attr-defined]
    section = RewardSection(function="rows_under_test.one")  # type: ignore[call-arg]
    with pytest.raises(RewardError, match="needs missing, and no dataset column has that name"):
        load_function(section, "rewards[0]", ["answer"])


def judged(server: Any, **kwargs: Any) -> list[str]:
    """Return overrides that put the judge in the place of the recipe's reward."""
    section = {"function": "rewards.judge_reward"}
    section["kwargs"] = {"rubric": "Be good.", "model": "m", "base_url": server.base_url, **kwargs}  # type: ignore[assignment]
    return [f"rewards={json.dumps([section])}", "check.enabled=false", "eval.enabled=false", "merge=false"]


def by_length(request: dict[str, Any], number: int) -> Any:
    return verdict(len(response_in(request)) % 11)


@pytest.mark.slow
def test_a_run_stops_with_a_checkpoint_when_the_budget_is_spent_and_resumes_with_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_API_KEY", "a-key-of-this-test")
    run = RunDir(tmp_path / "run")
    with judging(by_length) as server:
        train = [
            "train",
            "smoke",
            "--run",
            str(run.path),
            *judged(server, key_from="JUDGE_API_KEY"),
            "grpo.max_steps=4",
        ]
        stopped = in_process(*train, "limits.judge_budget.calls=12", expect=INTERRUPTED)
        assert "the judge's budget is spent: 12 calls of 12" in stopped
        assert "interrupted by a spent budget after step 2" in stopped
        assert len(server.requests) == 12
        saved = run.last_checkpoint()
        assert saved is not None
        in_process(*train, "limits.judge_budget.calls=100000")
        asked = len(server.requests)
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert sum(record["judge/calls"] for record in records) == asked > 12
    assert set(server.authorizations) == {"Bearer a-key-of-this-test"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if b"a-key-of-this-test" in path.read_bytes()] == []
    assert "a-key-of-this-test" not in stopped
