"""A chat template that opens `<think>` itself: every reward knows, in training, evaluation and both checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from grpo_lite.cli import main
from grpo_lite.errors import RewardError
from grpo_lite.evaluation.evaluate import score_completions
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe, RewardSection
from grpo_lite.task.check import check_recipe_rewards, gold_completion, require_paid_gold
from grpo_lite.task.prompts import load_prompts
from grpo_lite.task.rewards import load_function, load_rewards

LEAD_IN = "<|user|>q<|end|><|assistant|><think>\n"
OWN_PART = "2+2 is 4</think>\n<answer>4</answer>"
ONLY_THOUGHT = "so <answer>4</answer>"
TAGGED = [
    "rewards=[{function: rewards.accuracy_reward}, {function: rewards.format_reward, weight: 0.2, "
    "kwargs: {tags: [think, answer]}}]",
    "data.gold_completion=<think>working</think>\n<answer>{gold}</answer>",
]


@pytest.fixture(scope="module")
def thinking_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template whose generation prompt ends with an opening `<think>`, as DeepSeek-R1's does."""
    folder = tmp_path_factory.mktemp("thinking")
    for path in tiny_dir.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(root: Path, thinking_dir: Path) -> Recipe:
    return load_recipe("smoke", [f"model.id={thinking_dir}", "check.skip=[]", *TAGGED])


def test_the_prompts_say_what_a_completion_continues(recipe: Recipe, thinking_dir: Path, tiny_dir: Path) -> None:
    opened = load_prompts(recipe, AutoTokenizer.from_pretrained(thinking_dir))
    assert opened.lead_in.endswith("<|assistant|><think>\n")
    assert load_prompts(recipe, AutoTokenizer.from_pretrained(tiny_dir)).lead_in.endswith("<|assistant|>")
    assert load_prompts(recipe).lead_in == ""


def test_rewards_in_training_and_their_honest_twin_start_inside_the_thinking(recipe: Recipe) -> None:
    (accuracy, shape), _ = load_rewards(recipe, ["answer"], LEAD_IN)
    chat = [[{"role": "assistant", "content": text}] for text in (OWN_PART, ONLY_THOUGHT, "<think>" + OWN_PART)]
    columns: dict[str, Any] = {"answer": ["4"] * 3, "prompts": [[{"role": "user", "content": "q"}]] * 3}
    logged: dict[str, float] = {}
    assert accuracy(completions=chat, log_metric=logged.__setitem__, **columns) == [1.0, 0.0, 1.0]
    assert logged["honest_accuracy"] == pytest.approx(2 / 3)
    assert shape(completions=chat, **columns) == [1.0, 0.0, 0.0]
    (accuracy, shape), _ = load_rewards(recipe, ["answer"], "<|assistant|>")
    assert accuracy(completions=chat, **columns) == [1.0, 1.0, 1.0]
    assert shape(completions=chat, **columns) == [0.0, 0.0, 1.0]


TEXT_REWARDS: dict[str, dict[str, Any]] = {
    "rewards.accuracy_reward": {"answer": ["4"]},
    "rewards.exact_match_reward": {"answer": ["4"]},
    "rewards.honest_accuracy": {"answer": ["4"]},
    "rewards.countdown_reward": {"nums": [[4, 9]], "target": [4]},
    "rewards.cosine_length_reward": {"answer": ["4"], "completion_ids": [[1]]},
}


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_no_reward_pays_an_answer_that_was_only_thought(name: str) -> None:
    columns = TEXT_REWARDS[name]
    kwargs = {"max_completion_length": 9} if "cosine" in name else {}
    section = RewardSection(function=name, kwargs=kwargs)  # type: ignore[call-arg]
    for lead_in, beats in ((LEAD_IN, True), ("<|assistant|>", False)):
        reward = load_function(section, "rewards[0]", [*columns], lead_in)
        right, thought = (reward(completions=[text], **columns)[0] for text in (OWN_PART, ONLY_THOUGHT))
        assert right is not None
        assert thought is not None
        assert (right > thought) == beats


def test_a_program_that_was_only_thought_is_not_run() -> None:
    section = RewardSection(function="rewards.unit_test_reward")  # type: ignore[call-arg]
    code = "```python\ndef f():\n    return 1\n```"
    reward = load_function(section, "rewards[0]", ["test_list"], LEAD_IN)
    columns: dict[str, Any] = {"test_list": [["assert f() == 1"]] * 2}
    assert reward(completions=[f"so\n{code}", f"so</think>\n{code}"], **columns) == [0.0, 1.0]


def test_a_format_with_other_tags_is_not_told_of_the_thinking() -> None:
    section = RewardSection(function="rewards.format_reward", kwargs={"tags": ["answer"]})  # type: ignore[call-arg]
    reward = load_function(section, "rewards[1]", ["answer"], LEAD_IN)
    assert reward(completions=["<answer>4</answer>"], answer=["4"]) == [1.0]


def test_what_the_recipe_says_itself_goes_first() -> None:
    section = RewardSection(function="rewards.accuracy_reward", kwargs={"prefilled": False})  # type: ignore[call-arg]
    assert load_function(section, "rewards[0]", ["answer"], LEAD_IN)(completions=[ONLY_THOUGHT], answer=["4"]) == [1.0]


def test_a_user_s_reward_without_the_argument_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def mine(completions, answer):\n    return [1.0 for _ in completions]\n")
    section = RewardSection(function=f"{path}:mine")  # type: ignore[call-arg]
    assert load_function(section, "rewards[0]", ["answer"], LEAD_IN)(completions=["a"], answer=["4"]) == [1.0]


def test_a_perfect_completion_leaves_the_opening_tag_to_the_template(recipe: Recipe) -> None:
    row = {"answer": "4"}
    assert gold_completion(recipe, row, LEAD_IN) == "working</think>\n<answer>4</answer>"
    assert gold_completion(recipe, row, "<|assistant|>").startswith("<think>working")
    plain = load_recipe("smoke", ["data.gold_completion=\\boxed{{{gold}}}"])
    assert gold_completion(plain, row, LEAD_IN) == "working\n</think>\n\\boxed{4}"


def test_the_checks_pay_gold_and_no_cheat_behind_a_template_that_thinks(recipe: Recipe, thinking_dir: Path) -> None:
    prompts = load_prompts(recipe, AutoTokenizer.from_pretrained(thinking_dir))
    report = check_recipe_rewards(recipe, prompts)
    assert report.ok, report.table()
    require_paid_gold(recipe, prompts, lambda line: None)
    blind = load_prompts(recipe)  # without the template the golds open the tag themselves, and are paid too
    assert check_recipe_rewards(recipe, blind).ok


def test_a_recipe_that_denies_the_template_s_tag_is_stopped(recipe: Recipe, thinking_dir: Path, root: Path) -> None:
    denied = load_recipe("smoke", [f"model.id={thinking_dir}", *TAGGED, "rewards[1].kwargs.prefilled=false"])
    with pytest.raises(RewardError, match="do not pay the right answer"):
        require_paid_gold(denied, load_prompts(denied, AutoTokenizer.from_pretrained(thinking_dir)), lambda line: None)


def test_both_commands_say_so(recipe: Recipe, thinking_dir: Path) -> None:
    overrides = [f"model.id={thinking_dir}", "check.skip=[]", *TAGGED]
    result = CliRunner().invoke(main, ["rewards", "check", "smoke", *overrides])
    assert result.exit_code == 0, result.output
    assert "false negatives 0.0%, gameability 0.0%" in result.output
    result = CliRunner().invoke(main, ["check", "smoke", *overrides])
    assert "the chat template opens <think>" in result.output
    assert "rewards[0] accuracy_reward: gold completions earn 1.000" in result.output
    assert "rewards[1] format_reward: gold completions earn 1.000" in result.output


def test_a_model_that_is_not_at_hand_is_said_and_the_check_goes_on(root: Path) -> None:
    result = CliRunner().invoke(main, ["rewards", "check", "smoke", "model.id=nobody/nothing-at-all"])
    assert result.exit_code == 0, result.output
    assert "checked without the chat template" in result.output


def test_the_evaluation_starts_inside_the_thinking_too(recipe: Recipe, thinking_dir: Path, tiny_dir: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "q"}], "answer": "4"}] * 2
    for folder, expected in ((thinking_dir, [True, False]), (tiny_dir, [True, True])):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (OWN_PART, ONLY_THOUGHT)]
        assert score_completions(tokenizer, recipe, rows, ids)[0] == expected
