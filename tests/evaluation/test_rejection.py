"""source: self: the base's own right completions, ranked, distinct, the same for a seed, and kept in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import DataError
from grpo_lite.evaluation.rejection import _best, _Sample, read_traces, sample_traces, write_traces
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_for_sampling, load_tokenizer
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.prompts import Prompts, load_prompts
from grpo_lite.task.traces import Trace, Traces, earning
from tests.tiny import tiny_lora
from tests.tool_model import write_tool_model

REWARDS = """
def starts_even(completions, completion_ids, **kwargs):
    return [float(bool(ids) and ids[0] % 2 == 0) for ids in completion_ids]


def never(completions, **kwargs):
    return [0.0] * len(completions)


def says_little(completions, completion_ids, **kwargs):
    return [-len(ids) for ids in completion_ids]
"""


@pytest.fixture
def model() -> Any:
    """The random model, with every seventh token ending a completion: otherwise hardly any would end."""
    base = Base.resolve(load_recipe("smoke").model)
    loaded = load_for_sampling(base, "shared")
    loaded.generation_config.eos_token_id = [1, *range(7, 260, 7)]
    return loaded


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "own_rewards.py"
    path.write_text(REWARDS)
    return path


def prepared(rewards: Path, *overrides: str, first: str = "starts_even") -> tuple[Recipe, Prompts]:
    recipe = load_recipe(
        "smoke",
        [
            f"rewards=[{{function: '{rewards}:{first}'}}, {{function: '{rewards}:says_little', weight: 0.01}}]",
            "warmup={source: self, samples: 8, keep: 2, prompts: 6}",
            *overrides,
        ],
    )
    return recipe, load_prompts(recipe, load_tokenizer(Base.resolve(recipe.model)))


def quiet(line: str) -> None:
    """Show nothing."""


def test_only_right_ended_distinct_completions_are_accepted(root: Path, rewards: Path, model: Any) -> None:
    recipe, prompts = prepared(rewards)
    shown: list[str] = []
    traces = sample_traces(recipe, model, prompts, shown.append)
    end = prompts.tokenizer.eos_token_id
    assert 0 < len(traces.rows) <= 12
    for trace, source in zip(traces.rows, traces.sources, strict=True):
        assert trace.prompt_ids == prompts.ids(source)
        assert trace.completion_ids[0] % 2 == 0
        assert trace.completion_ids.index(end) == len(trace.completion_ids) - 1 <= 7  # the cap is 8 tokens
        assert source["completion"] == prompts.tokenizer.decode(trace.completion_ids, skip_special_tokens=True)
    by_prompt: dict[str, list[str]] = {}
    for source in traces.sources:
        by_prompt.setdefault(source["question"], []).append(source["completion"])
    assert set(by_prompt) <= {row["question"] for row in prompts.train[:6]}
    assert all(len(texts) == len(set(texts)) <= 2 for texts in by_prompt.values())
    (note,) = traces.notes
    assert note.startswith(f"{len(by_prompt)} of 6 prompts have a right completion that ends by itself; ")
    assert note.endswith(f"of 48 completions are right, and {len(traces.rows)} are kept.")
    assert shown == ["warm-up: 8 samples of each prompt: 6/6 prompts"]


def test_what_is_kept_earns_the_recipe_s_reward(root: Path, rewards: Path, model: Any) -> None:
    recipe, prompts = prepared(rewards)
    traces = sample_traces(recipe, model, prompts, quiet)
    earned = earning(recipe, prompts, traces)
    assert earned is not None
    assert (earned["tried"], earned["zero"]) == (len(traces.rows), 0)


def test_a_seed_gives_the_same_completions_again(root: Path, rewards: Path, model: Any) -> None:
    recipe, prompts = prepared(rewards)
    other, _ = prepared(rewards, "seed=7")
    assert sample_traces(recipe, model, prompts, quiet) == sample_traces(recipe, model, prompts, quiet)
    assert sample_traces(recipe, model, prompts, quiet) != sample_traces(other, model, prompts, quiet)


def test_an_adapter_to_start_from_is_sampled_too(root: Path, rewards: Path, model: Any) -> None:
    recipe, prompts = prepared(rewards)
    without = sample_traces(recipe, model, prompts, quiet)
    adapted = tiny_lora(model)
    assert sample_traces(recipe, adapted, prompts, quiet) != without


def test_nothing_right_is_refused_in_one_sentence_with_what_to_do(root: Path, rewards: Path, model: Any) -> None:
    recipe, prompts = prepared(rewards, first="never")
    with pytest.raises(
        DataError,
        match=r"^warmup\.source: 'self' is given, but none of the 48 completions sampled \(6 prompts × 8\) is right, "
        r"so there is nothing to learn from; \d+ were cut off at 8 tokens\. Sample more \(warmup\.samples\), take "
        r"easier prompts or a longer cap \(grpo\.max_completion_length\), or give rows with completions "
        r"\(warmup\.source=data and warmup\.data\)\.$",
    ):
        sample_traces(recipe, model, prompts, quiet)


def test_right_but_cut_off_is_refused_and_counted(root: Path, rewards: Path, model: Any) -> None:
    recipe, prompts = prepared(rewards, "warmup.max_completion_tokens=1")
    with pytest.raises(DataError, match=r"is right that ends by itself \(\d+ are right, but cut off\), so there is"):
        sample_traces(recipe, model, prompts, quiet)


def episodes_of(folder: Path, *overrides: str) -> tuple[Recipe, Prompts, Any]:
    """A recipe whose model calls `add` in most turns, and is paid by where its total ends."""
    write_tool_model(folder)
    recipe = load_recipe(
        "smoke",
        [
            f"model={{id: '{folder}', load_in: 32bit}}", f"data.train={{path: '{folder}/rows.jsonl'}}",
            "data.prompt={question}", "data.answer=null", "data.holdout=2",
            "environment=tests.tool_model:Ledger", "rewards=[]",
            "eval={lenient: {function: get_reward, threshold: 0.5}}",
            "grpo.max_tool_calling_iterations=3", "grpo.max_completion_length=96",
            "warmup={source: self, samples: 6, keep: 2}", *overrides,
        ],
    )  # fmt: skip
    base = Base.resolve(recipe.model)
    return recipe, load_prompts(recipe, load_tokenizer(base)), load_for_sampling(base, "shared")


def test_paid_episodes_are_kept_with_the_tools_words_masked(tmp_path: Path) -> None:
    recipe, prompts, model = episodes_of(tmp_path / "model")
    traces = sample_traces(recipe, model, prompts, quiet)
    words = prompts.tokenizer
    assert any(trace.tool_mask and 0 in trace.tool_mask for trace in traces.rows)
    pay = []
    for trace, source in zip(traces.rows, traces.sources, strict=True):
        prompt = words.decode(trace.prompt_ids)
        total = int(re.search(r"Begin at (\d+)\.", prompt).group(1))  # type: ignore[union-attr]  # from `reset`
        mask = trace.tool_mask or []
        assert len(mask) == len(trace.completion_ids) <= 96
        assert trace.completion_ids[-1] == words.eos_token_id
        written = words.decode([i for i, own in zip(trace.completion_ids, mask, strict=True) if own])
        results = words.decode([i for i, own in zip(trace.completion_ids, mask, strict=True) if not own])
        numbers = [int(n) for n in re.findall(r'"number": (-?\d+)', written)]
        assert "tool_response" not in written
        assert results.count("<tool_response>") == len(numbers)
        total += sum(n for n in numbers if n >= 0)  # Ledger refuses one below 0
        assert total % 5 / 4 >= 0.5
        assert isinstance(source["completion"], list) == bool(numbers)
        pay.append((source["question"], -(total % 5 / 4), sum(mask)))
    assert all(0 < sum(q == question for q, *_ in pay) <= 2 for question, *_ in pay)
    for question in {q for q, *_ in pay}:  # the best paid first, then the shorter
        mine = [rest for q, *rest in pay if q == question]
        assert mine == sorted(mine)
    assert "of 60 completions are right" in traces.notes[0]
    write_traces(tmp_path / "traces.jsonl", traces)
    assert read_traces(tmp_path / "traces.jsonl").rows == traces.rows


def test_episodes_that_nobody_pays_are_refused(tmp_path: Path) -> None:
    recipe, prompts, model = episodes_of(tmp_path / "model", "eval.lenient.threshold=2", "warmup.prompts=1")
    with pytest.raises(DataError, match=r"none of the 6 completions .* cut off at 96 tokens or at the last turn\."):
        sample_traces(recipe, model, prompts, quiet)


def sample(text: str, total: float, length: int = 3, right: bool = True, ended: bool = True) -> _Sample:
    return _Sample([9] * length, text, right, ended, total)


@pytest.mark.parametrize(
    "group, keep, expected",
    [
        ([sample("a", 1.0), sample("b", 1.2)], 1, ["b"]),
        ([sample("long", 1.0, length=5), sample("short", 1.0, length=2)], 1, ["short"]),
        ([sample("a", 1.0), sample("b", 1.0)], 2, ["a", "b"]),  # ties keep their order
        ([sample("a", 1.2), sample("b", 1.1), sample("a", 1.0), sample("c", 0.9)], 3, ["a", "b", "c"]),
        ([sample("wrong", 2.0, right=False), sample("cut", 2.0, ended=False), sample(" ", 2.0)], 3, []),
    ],
    ids=["by all rewards", "shorter first", "ties", "distinct", "none"],
)
def test_the_best_distinct_ones_of_a_prompt_stay(group: list[_Sample], keep: int, expected: list[str]) -> None:
    assert [kept.text for kept in _best(group, keep)] == expected


def test_traces_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    sources = [{"prompt": [{"role": "user", "content": "q\u2028"}], "completion": "a\nb", "answer": "1"}] * 2
    traces = Traces([Trace([1, 2], [3, 4]), Trace([1], [4], [0])], ["a note"], sources)
    write_traces(tmp_path / "traces.jsonl", traces)
    assert read_traces(tmp_path / "traces.jsonl") == traces
    assert json.loads((tmp_path / "traces.jsonl").read_text().split("\n")[1])["completion_ids"] == [4]


@pytest.mark.parametrize("content", ["", "{", '{"prompt_ids": [1]}\n', "[]\n"], ids=["empty", "cut", "field", "list"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "traces.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"traces\.jsonl: the completions for the warm-up cannot be read .*Remove the"):
        read_traces(tmp_path / "traces.jsonl")
