"""Evaluation of episodes: real tools on held-out rows, scores by the environment, turns and calls, a whole run."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_lite.errors import EvaluationError, RewardError
from grpo_lite.evaluation import episodes as episodes_module
from grpo_lite.evaluation.evaluate import compare, score_model
from grpo_lite.evaluation.probe import probe_lines, probe_recipe
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.scores import table_rows
from grpo_lite.report.summary import merge_line, score_lines
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.task.environments import load_toolkit
from grpo_lite.task.episodes import make_player
from grpo_lite.task.prompts import Prompts, load_prompts
from grpo_lite.train import train_run
from tests.task.test_episodes import scripted
from tests.tool_model import END, call, tool_tokenizer, write_tool_model
from tests.trainer.test_tools import model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True"),
    pytest.mark.filterwarnings("ignore:(?s).*environment_factory"),
]

GUESS = '''
class Guess:
    """Find a number."""

    resets = []

    def reset(self, number: int, **row) -> None:
        self.resets.append(number)
        if number == 13 or (number == 17 and self.resets.count(17) == 3):
            raise RuntimeError("unlucky")
        self.number, self.tries, self.last = number, 0, None

    def guess(self, value: int) -> str:
        """Guess the number.

        Args:
            value: your guess.
        """
        self.tries, self.last = self.tries + 1, int(value)
        return "right" if value == self.number else "too low" if value < self.number else "too high"

    def get_reward(self) -> float:
        return 1.0 / self.tries if self.tries and self.last == self.number else 0.0


def letters(completions, **kwargs):
    return [str(messages).count("e") / 100 for messages in completions]


def right(completions, environments, **kwargs):
    return [float(environment.last == environment.number) for environment in environments]
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny model that has Qwen3's markup, an environment, rows and a recipe."""
    words = tool_tokenizer()
    words.save_pretrained(tmp_path / "model")
    model(len(words)).unload().save_pretrained(tmp_path / "model")
    (tmp_path / "guess.py").write_text(GUESS)
    rows = (json.dumps({"number": 20 + n}) for n in range(24))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "guess.yaml").write_text(
        f"""
name: guess
description: find a number
least_gpu: none
model: {{id: {tmp_path}/model, load_in: 32bit}}
data: {{train: {{path: {tmp_path}/rows.jsonl}}, prompt: "Find my number.", answer: null, holdout: 4}}
environment: {tmp_path}/guess.py:Guess
rewards: []
grpo:
  {{max_tool_calling_iterations: 2, max_completion_length: 200, num_generations: 4, per_device_train_batch_size: 8,
    gradient_accumulation_steps: 1, max_steps: 1, learning_rate: 0.01, gradient_checkpointing: false}}
eval: {{samples: 2}}
"""
    )
    return tmp_path


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(str(folder / "guess.yaml"), list(overrides))


def guesses(*values: int, end: str = "done") -> list[str]:
    return [f"{call('guess', value=value)}{END}" for value in values] + [f"{end}{END}"]


def played(recipe: Recipe, prompts: Prompts, rows: Any, script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Score episodes whose turns a script says, each row's script for its greedy episode and its samples."""
    words = prompts.tokenizer
    seeds, generators = [], iter(script)
    turn: list[Any] = []

    def generate(model: Any, tokenizer: Any, ids: Any, *, max_new_tokens: int, seed: int, **_: Any) -> Any:
        if not any(words.convert_tokens_to_ids("<tool_response>") in prompt for prompt in ids):  # new episodes
            turn[:] = [scripted(words, next(generators))]
        seeds.append(seed)
        return [[answer] for answer in turn[0](list(map(list, ids)), max_new_tokens)]

    monkeypatch.setattr(episodes_module, "generate_completions", generate)
    player = make_player(prompts, recipe, print)
    return score_model(model(len(words)), words, recipe, rows, lambda line: None, "base", player), seeds


def test_episodes_are_scored_by_their_environment_with_turns_and_calls(folder: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_in(folder, "eval={lenient: {function: get_reward, threshold: 0.4}, samples: 2, batch_size: 3}")
    prompts = load_prompts(recipe, tool_tokenizer())
    rows = [{"prompt": [{"role": "user", "content": f"Find it, {n}."}], "number": n} for n in (7, 9, 13)]
    script = [
        [guesses(5, 7), [*guesses(8), "never"]],  # the third row cannot be reset
        [guesses(7), guesses(6, 7)],  # two samples of the first row
        [guesses(1), guesses(9)],
    ]
    records, seeds = played(recipe, prompts, rows, [*script, [[f"x{END}"]]], monkeypatch)
    assert [record["lenient"] for record in records] == [True, False, None]  # 1 / 2 tries, wrong, no episode
    assert [record["samples_right"] for record in records] == [2, 1, None]
    assert [(record["calls"], record["failed_calls"]) for record in records] == [(2, 0), (1, 0), (0, 0)]
    assert records[0]["turns"][1] == {"role": "tool", "name": "guess", "content": "too low"}
    assert records[0]["completion"] == "done"
    assert len(set(seeds)) == len(seeds) == 8  # each turn its own
    again = [{**record, "lenient": bool(record["lenient"])} for record in records[:2]] + records[2:]
    result = compare(recipe, {"base": records, "trained": again})
    assert result["n"] == 2
    assert result["episodes"]["base"] == {"turns": 2.5, "calls": 1.5, "failed_calls": 0.0, "without_call": 0.0,
                                            "failed_rewards": 0}  # fmt: skip
    lines = score_lines(result)
    assert any(line.startswith("turns an episode 2.5 → 2.5, calls an episode 1.5 → 1.5") for line in lines), lines
    assert lines[-1] == "1 held-out rows could not be judged in every episode and were left out"
    assert [row["base"] for row in table_rows(result) if "call" in row["name"]] == ["1.5", "0.0", "0%"]
    with pytest.raises(EvaluationError, match="no episode on a held-out row could be judged: `reset` failed"):
        compare(recipe, {"base": records[2:], "trained": records[2:]})


def test_a_get_reward_that_fails_costs_its_episode_not_the_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch):
    broken = GUESS.replace("return 1.0 / self.tries if", "return 1.0 / (self.last != 6) if")  # who ends on 6 breaks it
    (folder / "guess.py").write_text(broken)
    recipe = recipe_in(folder, "eval={lenient: {function: get_reward}, samples: 2, batch_size: 4}")
    prompts = load_prompts(recipe, tool_tokenizer())
    rows = [{"prompt": [{"role": "user", "content": f"Find it, {n}."}], "number": n} for n in (6, 9)]
    script = [[guesses(6), guesses(9)], [guesses(1), guesses(6), guesses(9), guesses(5, 9)]]
    records, _ = played(recipe, prompts, rows, script, monkeypatch)
    assert [record["lenient"] for record in records] == [False, True]
    assert "Guess.get_reward raised ZeroDivisionError" in records[0]["fault"]
    assert [record["samples_right"] for record in records] == [0, 2]
    result = compare(recipe, {"base": records, "trained": records})
    assert (result["n"], result["lenient"]["base"]["rate"]) == (2, 0.5)
    assert "get_reward failed in held-out episodes, which count as not right: base 1, trained 1" in score_lines(result)
    with pytest.raises(RewardError, match=r"evaluating base: get_reward failed in all 1 episodes; .*ZeroDivisionError"):
        played(recipe, prompts, rows[:1], script, monkeypatch)


def test_a_sample_that_cannot_be_reset_leaves_its_row_out_of_pass_at_k(folder: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_in(folder, "eval={lenient: {function: get_reward, threshold: 0.4}, samples: 2, batch_size: 3}")
    prompts = load_prompts(recipe, tool_tokenizer())
    rows = [{"prompt": [{"role": "user", "content": f"Find it, {n}."}], "number": n} for n in (7, 17)]
    script = [[guesses(7), guesses(17)], [guesses(7), guesses(6)], [guesses(17)]]
    records, _ = played(recipe, prompts, rows, script, monkeypatch)
    assert [record["lenient"] for record in records] == [True, True]
    assert [record["samples_right"] for record in records] == [1, None]
    result = compare(recipe, {"base": records, "trained": records})
    assert result["n"] == 2
    assert result["pass_at_k"]["pass@1"] == {"base": 0.5, "trained": 0.5}
    assert "pass_at_k" not in compare(recipe, {"base": records[1:], "trained": records[1:]})


def test_a_reward_function_gets_the_episodes_environments(folder: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_in(folder, f"rewards=[{{function: '{folder}/guess.py:right'}}]", "eval.samples=0")
    prompts = load_prompts(recipe, tool_tokenizer())
    rows = [{"prompt": [{"role": "user", "content": f"Find it, {n}."}], "number": n} for n in (7, 9)]
    records, _ = played(recipe, prompts, rows, [[guesses(5, 7), guesses(8)]], monkeypatch)
    assert [record["strict"] for record in records] == [True, False]


def test_a_score_that_the_environment_does_not_pay_is_refused_before_training(folder: Path):
    (folder / "guess.py").write_text(GUESS.replace("def get_reward", "def _get_reward"))
    recipe = recipe_in(
        folder, f"rewards=[{{function: '{folder}/guess.py:right'}}]", "eval.lenient={function: get_reward}"
    )
    with pytest.raises(RewardError, match=r"eval: a score is get_reward, and .*:Guess has none"):
        load_toolkit(recipe)


def test_rows_of_an_environment_that_are_also_held_out_are_not_trained_on(folder: Path):
    (folder / "held.jsonl").write_text(json.dumps({"number": 21}))
    prompts = load_prompts(recipe_in(folder, f"data.eval={{path: {folder}/held.jsonl}}"))
    assert len(prompts.train) == 23
    assert "1 training rows are also held out and were dropped." in prompts.notes


@pytest.mark.slow
def test_a_run_with_tools_is_trained_evaluated_merged_and_scored_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    recipe = recipe_in(
        folder, f"rewards=[{{function: '{folder}/guess.py:letters'}}]", "eval.every=1", "grpo.max_completion_length=40",
        "eval.lenient={function: get_reward}",
    )  # fmt: skip
    run = train_run(recipe, RunDir(folder / "run"), show=lambda line: None).run
    scores = run.read_scores()
    assert scores["n"] == 4
    assert scores["episodes"].keys() == {"base", "trained"}
    assert scores["merged"]["lenient"]["n"] == 4
    record = run.read_run()["merge"]
    assert record["passed"]
    assert "held-out prompts of episodes, up to the first answer: top-1" in merge_line(record)
    first = json.loads((run.evaluation / "records.jsonl").read_text().splitlines()[0])
    assert first["base"]["turns"][0]["role"] == "assistant"
    assert "heldout/lenient" in (run.path / "metrics.jsonl").read_text()


def test_the_same_seed_gives_the_same_episodes_and_leaves_the_caller_s_randomness_alone(tmp_path: Path):
    words = write_tool_model(tmp_path)
    recipe = Recipe.model_validate(
        {
            "name": "r", "description": "d", "least_gpu": "none", "model": {"id": str(words)}, "rewards": [],
            "data": {
                "train": {"path": str(words / "rows.jsonl")}, "prompt": "{question}", "answer": None, "holdout": 3,
            },
            "environment": "tests.tool_model.Ledger", "eval": {"samples": 2, "batch_size": 4},
            "grpo": {"max_tool_calling_iterations": 3, "max_completion_length": 150},
        }
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(words)
    prompts = load_prompts(recipe, AutoTokenizer.from_pretrained(words, padding_side="left"))
    player = make_player(prompts, recipe, lambda line: None)
    state = random.getstate(), torch.random.get_rng_state()
    first = score_model(base, prompts.tokenizer, recipe, prompts.eval, lambda line: None, "base", player)
    assert random.getstate() == state[0]  # its `reset` draws from it
    assert torch.equal(torch.random.get_rng_state(), state[1])
    assert sum(record["calls"] for record in first) > 0
    assert score_model(base, prompts.tokenizer, recipe, prompts.eval, lambda line: None, "base", player) == first


@pytest.mark.parametrize("kind", ["calls", "never calls"])
def test_the_probe_plays_episodes_and_says_whether_tools_are_called(kind: str, tmp_path: Path):
    write_tool_model(tmp_path)
    recipe = Recipe.model_validate(
        {
            "name": "r", "description": "d", "least_gpu": "none", "model": {"id": str(tmp_path)}, "rewards": [],
            "data": {
                "train": {"path": str(tmp_path / "rows.jsonl")}, "prompt": "{question}", "answer": None, "holdout": 3,
            },
            "environment": "tests.tool_model.Ledger", "eval": {"batch_size": 8},
            "grpo": {
                "max_tool_calling_iterations": 2, "max_completion_length": 150, "num_generations": 4,
                "per_device_train_batch_size": 8,
            },
        }
    )  # fmt: skip
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.padding_side = "left"
    if kind == "never calls":
        begins = tokenizer.convert_tokens_to_ids(call("add", number=1))
        with torch.no_grad():
            base.lm_head.weight[begins - 1 : begins + 4, 0] = -20.0
    prompts = load_prompts(recipe, tokenizer)
    probe = probe_recipe(recipe, base, prompts, count=2, samples=4)
    lines = list(probe_lines(probe))
    assert (probe.prompts, probe.samples) == (2, 4)
    assert probe.step_s > 0
    assert 0 < probe.rewarded < 1  # Ledger pays by its total, which begins above 0
    if kind == "calls":
        assert probe.calls is not None
        assert probe.calls > 0
        assert f"  calls an episode {probe.calls:.1f}, {probe.failed_calls:.0%} of them failed" in lines
    else:
        assert probe.calls == 0
        assert "no tool is called in 8 episodes" in lines[-1]
