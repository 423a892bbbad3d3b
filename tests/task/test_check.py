"""Before training: the gold must be paid, cheats are counted, and every shipped recipe's rewards are proven."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from grpo_lite.cli import main
from grpo_lite.errors import RewardError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.task.check import check_recipe, check_recipe_rewards, require_paid_gold
from grpo_lite.task.prompts import load_prompts
from grpo_lite.task.rewards import load_rewards, weighted_sum
from rewards.gate import Part, composition_margin


@pytest.mark.parametrize("name", ["quickstart", "sums", "smoke", "countdown"])
def test_a_generated_recipe_pays_gold_and_no_cheat(root: Path, name: str) -> None:
    recipe = load_recipe(name)
    report = check_recipe_rewards(recipe, load_prompts(recipe))
    assert report.ok, report.table()


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("gsm8k", ["data.train.path={data}/gsm8k_train.jsonl"]),
        ("math", ["data.train.path={data}/math500_test.jsonl", "data.prompt={{question}}", "data.answer=answer"]),
        (
            "deepmath",
            ["data.train.path={data}/math_train_answers.jsonl", "data.prompt={{question}}", "data.answer=answer"],
        ),
    ],
)
def test_a_hub_recipe_pays_gold_and_no_cheat_on_real_rows(
    root: Path, shared_data: Path, name: str, overrides: list[str]
) -> None:
    recipe = load_recipe(name, [override.format(data=shared_data) for override in overrides])
    report = check_recipe_rewards(recipe, load_prompts(recipe))
    assert report.ok, report.table()


def test_rewards_that_do_not_pay_gold_stop_the_training(root: Path) -> None:
    recipe = load_recipe("smoke", ["data.gold_completion=the sum is {gold}"])
    with pytest.raises(RewardError, match=r"do not pay the right answer[\s\S]*check.enabled=false"):
        require_paid_gold(recipe, load_prompts(recipe), lambda line: None)


def test_a_reward_that_any_list_of_numbers_fools_is_shown(root: Path, tmp_path: Path) -> None:
    (tmp_path / "naive.py").write_text(
        "def contains(completions, answer, **kwargs):\n"
        "    return [float(a in c[-1]['content']) for c, a in zip(completions, answer)]\n"
    )
    recipe = load_recipe("smoke", [f"rewards=[{{function: '{tmp_path / 'naive.py'}:contains'}}]"])
    shown: list[str] = []
    report = require_paid_gold(recipe, load_prompts(recipe), shown.append)
    assert report.gameability_rate > 0.2
    assert "kinds of cheat are paid too (" in shown[0]
    assert "numbers" in shown[0]


def test_the_command_prints_the_table_and_its_status_says_whether_gold_scores(root: Path) -> None:
    result = CliRunner().invoke(main, ["rewards", "check", "smoke"])
    assert result.exit_code == 0
    assert "false negatives 0.0%" in result.output
    assert CliRunner().invoke(main, ["rewards", "check", "smoke", "data.gold_completion=no"]).exit_code == 1


def test_an_unknown_check_to_skip_is_named(root: Path) -> None:
    result = CliRunner().invoke(main, ["rewards", "check", "smoke", "check.skip=[nonsense]"])
    assert result.exit_code == 1
    assert "nonsense" in result.output


def test_the_sum_is_trl_s_and_none_where_the_gold_is_unusable() -> None:
    def first(completions: list[str], **kwargs: object) -> list[float | None]:
        return [1.0, None]

    def second(completions: list[str], **kwargs: object) -> list[float | None]:
        return [None, 1.0]

    assert weighted_sum([first, second], [2.0, 0.5])(completions=["a", "b"]) == [2.0, None]


def test_a_gated_reward_counts_only_where_the_first_is_at_its_top(root: Path) -> None:
    recipe = load_recipe("gsm8k", ["rewards[1].gate=true", "data.train.path=x.jsonl"])
    functions, _ = load_rewards(recipe, ["answer"])
    texts = ["<think>x</think>\n<answer>4</answer>", "<think>x</think>\n<answer>5</answer>"]
    assert [function.__name__ for function in functions] == ["accuracy_reward", "format_reward"]
    assert functions[0](completions=texts, answer=["4", "4"]) == [1.0, 0.0]
    assert functions[1](completions=texts, answer=["4", "4"], prompts=["p", "p"]) == [1.0, 0.0]


def test_a_reward_of_the_user_s_states_its_own_top(root: Path, tmp_path: Path) -> None:
    text = "def half(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    (tmp_path / "plain.py").write_text(text)
    (tmp_path / "stated.py").write_text(f"{text}half.top = 2.0\n")
    for name, top in (("plain", 1.0), ("stated", 2.0)):
        function = f"{tmp_path / name}.py:half"
        recipe = load_recipe("smoke", [f"rewards[0].function={function}", "rewards[0].kwargs={}"])
        report = check_recipe_rewards(recipe, load_prompts(recipe))
        assert (report.top, report.gold_scores) == (top, top == 1.0)


def test_the_honest_metric_is_logged_beside_the_training_reward(root: Path) -> None:
    functions, _ = load_rewards(load_recipe("gsm8k", ["data.train.path=x.jsonl"]), ["answer"])
    logged: dict[str, float] = {}
    texts = ["<answer>4</answer>", "<answer>5</answer>"]
    functions[0](completions=texts, answer=["4", "4"], log_metric=lambda key, value: logged.update({key: value}))
    assert logged["honest_accuracy"] == 0.5


RANGES = {
    "rewards.accuracy_reward": (0.0, 1.0),
    "rewards.countdown_reward": (0.0, 1.0),
    "rewards.unit_test_reward": (0.0, 1.0),
    "rewards.format_reward": (0.0, 1.0),
    "rewards.soft_overlong_punishment": (-1.0, 0.0),
}


@pytest.mark.parametrize(
    "name",
    sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml") if path.stem != "custom"),
)
def test_no_sum_of_side_rewards_beats_a_correct_answer(root: Path, name: str) -> None:
    recipe = load_recipe(name)
    if not recipe.rewards:
        return  # the environment alone pays, and nothing is added to it; check-env plays its cheats
    parts = [
        Part(reward.weight, *RANGES[reward.function], gated=reward.gate, judges=i == 0)
        for i, reward in enumerate(recipe.rewards)
    ]
    assert composition_margin(parts) > 0


def warmed_up(*overrides: str) -> list[str]:
    warmup = (
        "warmup={data: {generator: chain, kwargs: {size: 40}}, prompt: '{question}=', max_completion_tokens: 64, "
        "completion: '{trace}'}"
    )
    return list(check_recipe(load_recipe("smoke", [warmup, *overrides]), previews=0))


def test_the_check_shows_the_warm_up_and_that_its_traces_do_not_earn_the_reward(root: Path) -> None:
    lines = warmed_up()
    assert "warm-up: 40 rows" in lines
    assert any(line.startswith('warm-up completion: "<think>') and line.endswith('<|end|>"') for line in lines)
    assert any(
        re.match(r"warm-up completion tokens: p50 \d+, p90 \d+, p99 \d+, longest \d+; up to 64", line) for line in lines
    )
    (earned,) = [line for line in lines if "reward" in line and line.startswith("warm-up")]
    # The reward wants the number alone on the first line; too long a completion costs a tenth.
    assert earned.startswith(
        "warm-up: your traces do not earn your reward: 40 of 40 earn nothing (-0.1 on average of at most 0.9), "
    )
    assert '"<think>' in earned


def test_the_check_shows_that_traces_earn_the_reward(root: Path) -> None:
    lines = warmed_up("warmup.completion={answer}")
    assert "warm-up: the traces earn 1 on average of at most 1 (40 tried)" in lines


def test_the_check_says_what_a_warm_up_of_the_base_s_own_samples(root: Path) -> None:
    lines = list(check_recipe(load_recipe("smoke", ["warmup={source: self, samples: 6, keep: 2, prompts: 30}"])))
    assert lines[-1] == (
        "warm-up: the base samples 6 completions of each of 30 training prompts, and learns at most 2 right ones "
        "of each"
    )
