"""Rewards that misbehave: their groups are left out and counted, the run stops when it goes on, nothing is made up."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import RewardError
from grpo_lite.models.base import Base
from grpo_lite.recipe.recipe import LimitsSection, RewardSection
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.task.guard import GuardedReward
from grpo_lite.task.rewards import load_function
from tests.command_line import in_process, steps_of


def guarded(function: Any, show: Any = lambda line: None, **limits: Any) -> GuardedReward:
    import sys
    import types

    module = types.ModuleType("guarded_rewards_under_test")
    module.f = function  # type: ignore[attr-defined]
    sys.modules["guarded_rewards_under_test"] = module
    section = RewardSection(function="guarded_rewards_under_test.f")  # type: ignore[call-arg]
    reward = load_function(section, "rewards[0]", ["answer"])
    return GuardedReward(reward, 2, LimitsSection(**limits), show)


TEXTS = ["a", "b", "bad", "d", "e", "f"]  # three groups of two; the second holds the one that is trouble


def raises(completions: list[str], **_: Any) -> list[float]:
    return [float(ord(text[0])) if text != "bad" else 1 / 0 for text in completions]


def nan(completions: list[str], **_: Any) -> list[float]:
    return [float(ord(text[0])) if text != "bad" else math.nan for text in completions]


def too_large(completions: list[str], **_: Any) -> list[float]:
    return [float(ord(text[0])) if text != "bad" else 1e39 for text in completions]  # infinite in float32


def short(completions: list[str], **_: Any) -> list[float]:
    return [float(ord(text[0])) for text in completions if text != "bad"]


def hangs(completions: list[str], **_: Any) -> list[float]:
    return [float(ord(text[0])) if text != "bad" else time.sleep(30) or 0.0 for text in completions]


@pytest.mark.parametrize("function", [raises, nan, too_large, short], ids=lambda f: f.__name__)
def test_one_bad_completion_costs_its_group_only(function: Any) -> None:
    lines: list[str] = []
    reward = guarded(function, lines.append)
    assert reward(completions=TEXTS, answer=TEXTS) == [97.0, 98.0, None, None, 101.0, 102.0]
    assert reward.excluded == (2, 3)
    assert "1 of 3 groups are left out of this step" in lines[0]
    assert (reward.failures, reward.in_a_row) == (1, 0)


def test_a_hang_costs_at_most_twice_the_limit_and_the_groups_it_left_no_time_for() -> None:
    reward = guarded(hangs, reward_timeout_s=0.3)
    begun = time.monotonic()
    assert reward(completions=TEXTS, answer=TEXTS) == [97.0, 98.0, None, None, None, None]
    assert time.monotonic() - begun < 2
    assert reward.excluded == (2, 3, 4, 5)


def never_leaves(completions: list[str], **_: Any) -> list[float]:
    while "bad" in completions:
        try:  # noqa: SIM105
            time.sleep(0.01)
        except:  # noqa: E722
            pass
    return [float(ord(text[0])) for text in completions]


@pytest.mark.parametrize("waits", [False, True], ids=["plain", "async"])
def test_a_reward_that_swallows_everything_costs_its_groups_only(waits: bool) -> None:
    async def awaited(completions: list[str], **_: Any) -> list[float]:
        return never_leaves(completions)

    reward = guarded(awaited if waits else never_leaves, reward_timeout_s=0.3)
    assert reward(completions=TEXTS, answer=TEXTS) == [97.0, 98.0, None, None, None, None]
    assert reward(completions=["a", "b"], answer=[1, 2]) == [97.0, 98.0]


def test_columns_are_cut_with_the_group_and_nothing_is_logged_twice() -> None:
    logged: list[str] = []

    def picky(completions: list[str], answer: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric("seen", len(answer))
        assert answer == completions
        if "bad" in completions:
            raise ValueError("bad")
        return [1.0] * len(answer)

    reward = guarded(picky)
    scores = reward(completions=TEXTS, answer=TEXTS, log_metric=lambda name, value: logged.append(name))
    assert scores == [1.0, 1.0, None, None, 1.0, 1.0]
    assert logged == ["seen"]


def test_a_reward_that_keeps_failing_stops_with_the_first_reason() -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise KeyError("gold")

    reward = guarded(broken, reward_failures=2)
    assert reward(completions=TEXTS) == [None] * 6
    with pytest.raises(RewardError, match=r"raised KeyError: 'gold'\. It has now failed in 2 batches in a row"):
        reward(completions=TEXTS)


def test_a_success_in_between_starts_the_count_again() -> None:
    calls = [0]

    def flaky(completions: list[str], **_: Any) -> list[float]:
        calls[0] += 1
        if calls[0] <= 4 or 6 <= calls[0] <= 9:  # a failing batch is one call and one a group
            raise ValueError("down")
        return [1.0] * len(completions)

    reward = guarded(flaky, reward_failures=2)
    assert [reward(completions=TEXTS)[0] for _ in range(3)] == [None, 1.0, None]
    assert reward.failures == 2


def test_none_for_an_unusable_gold_is_no_failure() -> None:
    reward = guarded(lambda completions, **_: [None] * len(completions))
    assert reward(completions=TEXTS) == [None] * 6
    assert reward.excluded == ()


def test_a_slow_reward_below_the_limit_is_told_once_and_left_alone() -> None:
    lines: list[str] = []
    reward = guarded(lambda completions, **_: time.sleep(0.2) or [1.0] * len(completions), lines.append,
                     reward_timeout_s=0.35)  # fmt: skip
    assert [reward(completions=TEXTS) for _ in range(2)] == [[1.0] * 6] * 2
    assert len(lines) == 1
    assert "took 0.2 s for a batch, more than half of limits.reward_timeout_s = 0.35 s" in lines[0]


def test_training_goes_on_without_the_groups_that_could_not_be_scored(root: Path, tmp_path: Path) -> None:
    """Step 2's reward hangs: the step moves nothing, is counted and shown, and the run ends well."""
    (tmp_path / "mine.py").write_text(
        "import time\n\n\n"
        "def mine(completions, trainer_state=None, **kwargs):\n"
        "    while trainer_state.global_step == 1:\n"
        "        time.sleep(0.01)\n"
        "    return [float(len(c[0]['content']) % 3) for c in completions]\n"
    )
    run = tmp_path / "run"
    text = in_process(
        "train", "smoke", "--run", str(run), f"rewards=[{{function: '{tmp_path}/mine.py:mine'}}]",
        "limits.reward_timeout_s=0.4", "check.enabled=false", "eval.enabled=false", "merge=false", "grpo.beta=0",
    )  # fmt: skip
    assert "mine took longer than limits.reward_timeout_s = 0.4 s; 2 of 2 groups are left out" in text
    assert steps_of(run) == [1, 2, 3]
    assert RunDir(run).read_run()["faults"] == {"excluded_groups": 2}


HANGS_IN_EVALUATION = (
    "import time\n\n\n"
    "def mine(completions, trainer_state=None, **kwargs):\n"
    "    while trainer_state is None:\n"
    "        time.sleep(0.01)\n"
    "    return [float(len(c[0]['content']) % 3) for c in completions]\n"
)


def test_a_reward_that_hangs_in_evaluation_ends_it_and_nothing_that_was_trained(root: Path, tmp_path: Path) -> None:
    """TRL passes trainer_state, evaluation does not. Held-out scores on the way are left out, and training goes on."""
    reward, run = tmp_path / "mine.py", tmp_path / "run"
    reward.write_text(HANGS_IN_EVALUATION)
    arguments = ["train", "smoke", "--run", str(run), f"rewards=[{{function: '{reward}:mine'}}]", "merge=false",
                 "limits.reward_timeout_s=0.4", "check.enabled=false", "grpo.beta=0", "eval.every=1", "eval.samples=0",
                 "eval.every_limit=2", "eval.limit=2", "grpo.max_steps=1"]  # fmt: skip
    text = in_process(*arguments, expect=1)
    told = "eval.lenient: mine took longer than limits.reward_timeout_s = 0.4 s on 2 completions"
    assert f"held-out score of step 1 left out: {told}" in text
    assert f"error: {told}. Fix it, or raise the limit." in text
    assert RunDir(run).read_run()["faults"] == {"unscored_heldout": 1}
    reward.write_text(HANGS_IN_EVALUATION.replace("while", "if"))
    assert "training has ended" in in_process(*arguments)
    assert steps_of(run) == [1]


def test_evaluation_scores_as_many_at_a_time_as_training_does(root: Path) -> None:
    """The limit of a call is then the same thing in both."""
    from grpo_lite.evaluation.evaluate import score_completions
    from grpo_lite.models.load import load_tokenizer
    from grpo_lite.recipe.load import load_recipe

    calls: list[int] = []

    def counting(completions: list[Any], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(len(completions))
        assert len(answer) == len(completion_ids) == len(completions)
        return [float(len(ids) == int(gold)) for ids, gold in zip(completion_ids, answer, strict=True)]

    import sys
    import types

    sys.modules["counting_rewards"] = types.ModuleType("counting_rewards")
    sys.modules["counting_rewards"].f = counting  # type: ignore[attr-defined]
    recipe = load_recipe("smoke", ["rewards=[{function: counting_rewards.f}]"])  # a round of 8
    rows = [{"prompt": [{"role": "user", "content": "x"}], "answer": str(n % 3)} for n in range(19)]
    tokenizer = load_tokenizer(Base.resolve(recipe.model))
    lenient, _ = score_completions(tokenizer, recipe, rows, [[5] * (n % 2) for n in range(19)])
    assert calls == [8, 8, 3]
    assert lenient == [n % 2 == n % 3 for n in range(19)]
