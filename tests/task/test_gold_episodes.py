"""`warmup.source: gold`: the episodes of the policy beside the environment become rows that a model can learn from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import DataError, RecipeError
from grpo_lite.recipe.load import build_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.check import warmup_lines
from grpo_lite.task.prompts import load_prompts
from grpo_lite.task.traces import earning, load_traces
from tests.models.test_chat_template import tokenizer  # noqa: F401

SOURCES = {
    "calculator:Calculator": {"generator": "products", "kwargs": {"size": 12}},
    "python:Python": {"generator": "counting", "kwargs": {"size": 12}},
    "search:Search": {"generator": "towns", "kwargs": {"size": 12}},
    "sudoku:Sudoku": {"generator": "sudoku", "kwargs": {"size": 12, "empty": 2}},
    "wordle:Wordle": {"generator": "wordle", "kwargs": {"size": 12}},
}
GUESS = '''
import random

class Guess:
    """Find a number."""

    def reset(self, number, **row):
        self.number, self.last, self.noise = number, None, random.random()
        return f" The noise is {self.noise}."

    def guess(self, value: int) -> str:
        """Guess the number.

        Args:
            value: Your guess.
        """
        self.last = value
        return f"noted <|im_end|> {random.random()}"

    def get_reward(self) -> float:
        return float(self.last == self.number)


def gold(row):
    return [[{"name": "guess", "arguments": {"value": row["number"]}}]] * row.get("turns", 1)
'''


def recipe(environment: str | None, train: dict[str, Any], warmup: dict[str, Any], **sections: Any) -> Recipe:
    settings = {
        "name": "t", "description": "t", "least_gpu": "none", "model": {"id": "m"}, "eval": {"enabled": False},
        "environment": environment, "rewards": [],
        "warmup": {"source": "gold", **warmup},
        **sections,
    }  # fmt: skip
    settings["data"] = {"train": train, "holdout": 4, "prompt": "{question}", **sections.get("data", {})}
    return build_recipe(settings, "t.yaml")


def guessing(path: Path, rows: list[dict[str, Any]], source: str = GUESS, **sections: Any) -> Recipe:
    (path / "guess.py").write_text(source)
    (path / "rows.jsonl").write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    data = {"answer": None, **sections.pop("data", {})}
    return recipe(f"{path}/guess.py:Guess", {"path": str(path / "rows.jsonl")}, {}, data=data, **sections)


ROWS = [{"question": "Go.", "number": number} for number in range(12)]


@pytest.mark.parametrize("name", SOURCES)
def test_every_environment_of_the_kit_shows_how_it_is_done(name: str, tokenizer: Any) -> None:  # noqa: F811
    if name.startswith("search"):
        pytest.importorskip("bm25s")
    loaded = recipe(f"grpo_lite.environments.{name}", SOURCES[name], {})
    prompts = load_prompts(loaded, tokenizer)
    traces = load_traces(loaded, prompts)
    assert len(traces.rows) == len(prompts.train) == 8  # 4 of 12 are held out, and never shown
    assert traces.notes == ["8 episodes of the gold policy; the environment pays 1 for each."]
    for row, trace, source in zip(prompts.train, traces.rows, traces.sources, strict=True):
        assert source["answer"] == row["answer"]
        assert trace.tool_mask is not None
        written = [token for token, own in zip(trace.completion_ids, trace.tool_mask, strict=True) if own]
        assert written[-1] == tokenizer.eos_token_id == trace.completion_ids[-1]
        assert tokenizer.decode(written).startswith('<tool_call>{"name": "')
        assert tokenizer.decode(trace.completion_ids).count("<|im_start|>tool\n") == len(source["completion"]) // 2


def test_what_reset_shows_is_in_the_prompt(tokenizer: Any) -> None:  # noqa: F811
    loaded = recipe("grpo_lite.environments.sudoku:Sudoku", SOURCES["sudoku:Sudoku"], {})
    traces = load_traces(loaded, load_prompts(loaded, tokenizer))
    board = traces.sources[0]["puzzle"].replace("\n", "")
    assert "\n\n" + " ".join(board[:4]) + "\n" in tokenizer.decode(traces.rows[0].prompt_ids)


def test_the_last_text_is_the_recipe_s_gold_completion(tokenizer: Any) -> None:  # noqa: F811
    data = {"gold_completion": "The answer is {gold}."}
    loaded = recipe(
        "grpo_lite.environments.calculator:Calculator", SOURCES["calculator:Calculator"], {"prompts": 3}, data=data,
        rewards=[{"function": "rewards.accuracy_reward"}],
    )  # fmt: skip
    prompts = load_prompts(loaded, tokenizer)
    traces = load_traces(loaded, prompts)
    assert len(traces.rows) == 3
    for trace, source in zip(traces.rows, traces.sources, strict=True):
        assert tokenizer.decode(trace.completion_ids).endswith(f"The answer is {source['answer']}.<|im_end|>")
    earned = earning(loaded, prompts, traces)
    assert earned is not None
    assert (earned["mean"], earned["zero"]) == (1.0, 0)


def test_gold_without_a_last_text_ends_with_one(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    loaded = guessing(tmp_path, ROWS)
    traces = load_traces(loaded, load_prompts(loaded, tokenizer))
    assert tokenizer.decode(traces.rows[0].completion_ids).endswith("<|im_start|>assistant\nDone.<|im_end|>")


def test_chance_gives_the_same_rows_again_and_stays_as_it_was(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    loaded = guessing(tmp_path, ROWS)
    prompts = load_prompts(loaded, tokenizer)
    random.seed(5)
    first, after = load_traces(loaded, prompts), random.random()
    assert load_traces(loaded, prompts).rows == first.rows
    random.seed(5)
    assert random.random() == after


def test_markup_in_a_result_stays_letters(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    loaded = guessing(tmp_path, ROWS)
    traces = load_traces(loaded, load_prompts(loaded, tokenizer))
    assert traces.rows[0].completion_ids.count(tokenizer.eos_token_id) == 3  # of the call, the result and the answer


def test_episodes_that_earn_nothing_are_dropped_and_counted(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    loaded = guessing(tmp_path, ROWS, GUESS.replace("float(self.last == self.number)", "float(self.number > 4)"))
    prompts = load_prompts(loaded, tokenizer)
    traces = load_traces(loaded, prompts)
    numbers = [row["number"] for row in prompts.train]
    unpaid = sum(number <= 4 for number in numbers)
    assert 0 < unpaid < len(numbers)
    assert [source["number"] for source in traces.sources] == [number for number in numbers if number > 4]
    assert f"{unpaid} of 8 episodes of the gold policy earn nothing and were dropped." in traces.notes


def test_episodes_of_more_turns_than_training_plays_are_dropped(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    rows = [{**row, "turns": 3 if row["number"] % 2 else 2} for row in ROWS]
    loaded = guessing(tmp_path, rows, grpo={"max_tool_calling_iterations": 2})
    prompts = load_prompts(loaded, tokenizer)
    traces = load_traces(loaded, prompts)
    odd = sum(row["number"] % 2 for row in prompts.train)
    assert 0 < odd < 8
    assert {source["turns"] for source in traces.sources} == {2}
    assert (
        f"{odd} of 8 episodes have more than 2 turns with calls (grpo.max_tool_calling_iterations) and were dropped."
        in traces.notes
    )


def test_an_environment_without_gold_is_named(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    loaded = guessing(tmp_path, ROWS, GUESS.replace("def gold", "def _gold"))
    with pytest.raises(DataError, match=r"Guess has no gold policy. Add `def gold\(row\)` beside the class"):
        load_traces(loaded, load_prompts(loaded, tokenizer))


def test_gold_that_never_earns_anything_is_named(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    loaded = guessing(tmp_path, ROWS, GUESS.replace('row["number"]', "-1"))
    with pytest.raises(DataError, match=r"none of its 8 rows is left to train on\. 8 of 8 episodes of the gold policy"):
        load_traces(loaded, load_prompts(loaded, tokenizer))


@pytest.mark.parametrize(
    ("environment", "warmup", "message"),
    [
        (None, {}, "warmup.source: gold is given, and there is no environment whose gold policy could be played"),
        ("grpo_lite.environments.wordle:Wordle", {"data": {"path": "x.jsonl"}}, "source: gold plays the training pro"),
    ],
)
def test_what_does_not_go_together_is_named(environment: str | None, warmup: dict[str, Any], message: str) -> None:
    rewards = [{"function": "rewards.accuracy_reward"}]
    with pytest.raises(RecipeError, match=message):
        recipe(environment, SOURCES["wordle:Wordle"], warmup, rewards=rewards)


def test_check_shows_an_episode(tokenizer: Any) -> None:  # noqa: F811
    loaded = recipe("grpo_lite.environments.wordle:Wordle", SOURCES["wordle:Wordle"], {})
    prompts = load_prompts(loaded, tokenizer)
    assert loaded.warmup is not None
    lines = list(warmup_lines(loaded, loaded.warmup, prompts))
    assert lines[0] == "warm-up: 8 rows"
    assert '<tool_call>{\\"name\\": \\"guess\\"' in lines[3]


def episode(guess: int, **columns: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "guess", "arguments": {"value": guess}}}
    messages = [
        {"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "guess", "content": "noted"}, {"role": "assistant", "content": "Done."},
    ]  # fmt: skip
    return {"messages": messages, **columns}


def with_traces(path: Path, rows: list[dict[str, Any]]) -> Recipe:
    (path / "traces.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    loaded = guessing(path, ROWS)
    changed = {"source": "data", "data": {"path": str(path / "traces.jsonl")}}
    return build_recipe({**loaded.model_dump(), "warmup": changed}, "t.yaml")


def test_one_prompt_for_all_rows_leaves_the_traces_of_training_rows(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    loaded = with_traces(tmp_path, [episode(row["number"], number=row["number"]) for row in ROWS])
    prompts = load_prompts(loaded, tokenizer)
    traces = load_traces(loaded, prompts)
    assert traces.notes == ["4 of 12 rows have a held-out prompt and were dropped."]
    assert {source["number"] for source in traces.sources} == {row["number"] for row in prompts.train}


def test_traces_that_cannot_be_told_from_held_out_rows_are_refused(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    loaded = with_traces(tmp_path, [episode(row["number"]) for row in ROWS])
    with pytest.raises(DataError, match=r"none of its 12 rows is left.* columns that held-out rows have \(number"):
        load_traces(loaded, load_prompts(loaded, tokenizer))


def test_a_held_out_question_is_not_shown_where_its_trace_has_no_answer(tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    called = "grpo_lite.environments.calculator:Calculator"
    gold = recipe(called, SOURCES["calculator:Calculator"], {})
    prompts = load_prompts(gold, tokenizer)
    rows = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": str(row["answer"])}]}
        for row in [*prompts.train, *prompts.eval]
    ]
    (tmp_path / "traces.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    warmup = {"source": "data", "data": {"path": str(tmp_path / "traces.jsonl")}}
    traces = load_traces(recipe(called, SOURCES["calculator:Calculator"], warmup), prompts)
    assert traces.notes == ["4 of 12 rows have a held-out prompt and were dropped."]
