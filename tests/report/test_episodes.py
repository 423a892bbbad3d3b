"""The doctor, the board and the page on episodes with tools: what went wrong, and every turn as text."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.board import Board
from grpo_lite.report.doctor import diagnose, examine
from grpo_lite.report.evidence import Evidence
from grpo_lite.report.page import write_report
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.train import train_run
from tests.run_files import HOSTILE, write_run
from tests.tool_model import write_tool_model


def recipe(**grpo: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r", "description": "d", "least_gpu": "none", "model": {"id": "m"}, "rewards": [],
            "data": {"train": {"path": "x.jsonl"}}, "environment": "here.py:Ledger",
            "grpo": {"max_completion_length": 100, "num_generations": 4, **grpo},
        }
    )  # fmt: skip


def call(number: int, name: str = "add") -> dict[str, Any]:
    function = {"name": name, "arguments": {"number": number}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def row(*turns: dict[str, Any], reward: float = 0.0, **more: Any) -> dict[str, Any]:
    """Return a line of completions/: `turns` only where there is a call."""
    last = [turn for turn in turns if turn["role"] == "assistant"][-1]
    episode = {"turns": list(turns)} if len(turns) > 1 or "tool_calls" in turns[0] else {}
    return {"step": 8, "prompt": "p", "completion": last["content"], **episode, "rewards": {"Ledger": reward},
            "reward": reward, "tokens": 9, "truncated": False, **more}  # fmt: skip


def evidence(rows: list[dict[str, Any]], calls: float = 1.0, failed: float = 0.0, **grpo: Any) -> Evidence:
    mean = sum(each["reward"] for each in rows) / len(rows)
    step = {"reward": mean, "reward_std": 0.3, "rewards/Ledger/mean": mean, "rewards/Ledger/std": 0.3,
            "frac_reward_zero_std": 0.1, "tools/calls": calls * 8, "tools/call_frequency": calls,
            "tools/failure_frequency": failed, "completions/mean_length": 20.0}  # fmt: skip
    return Evidence(recipe(**grpo), [{"step": n, **step} for n in range(1, 9)], rows)


GOOD = [row(call(1), result("total 1"), said("1"), reward=1.0)] * 5 + [row(call(2), result("2"), said("x"))] * 3
CASES: dict[str, tuple[Evidence, str, str | None]] = {
    "tools_never_called": (evidence([row(said("4"))] * 8, 0.0), "No tool was called in 8 steps", None),
    "calls_malformed": (
        evidence([row(said('<tool_call>\n{"name": add}</tool_call>'))] * 8, 0.0),
        r"100% of the completions end in the text of a call that cannot be read, such as '<tool_call>\\n\{",
        None,
    ),
    "calls_malformed cut": (
        evidence([row(said('<tool_call>\n{"name": "ad'), truncated=True)] * 3 + GOOD),
        "3 of 3 are cut off at 100 tokens",
        "grpo.max_completion_length=200",
    ),
    "calls_fail": (
        evidence([row(call(-1), result("{'error': 'Tool ad not found.'}"), said("x"), reward=0.1)] * 8, 1.0, 1.0),
        r"""100% of the calls give the model an error, most often "\{'error': 'Tool ad not found.'\}".""",
        None,
    ),
    "paid_without_call": (
        evidence([*GOOD, *[row(said("1"), reward=1.0)] * 8]),
        "50% of the episodes call no tool and earn 1.00, those with calls 0.62",
        None,
    ),
    "call_loops": (
        evidence([row(*[call(1), result("1")] * 4, said("x"), reward=0.5)] * 4 + GOOD),
        r"33% of the episodes with calls repeat one 3 times or more, such as 'add\(number=1\)' 4 times",
        "grpo.max_tool_calling_iterations=2",
    ),
    "episodes_at_limit": (
        evidence([row(call(1), result("1"), call(2), result("2"), call(3))] * 8, max_tool_calling_iterations=2),
        "100% of the episodes end with a call that is not answered, because 2 turns with calls are over",
        "grpo.max_tool_calling_iterations=4",
    ),
    "episodes_at_limit length": (
        evidence([row(call(1), result("1"), call(2))] * 8, max_tool_calling_iterations=4),
        "because the result does not fit into 100 tokens",
        "grpo.max_completion_length=200",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_problem_of_episodes_is_found_with_its_figures(name: str) -> None:
    seen, sentence, override = CASES[name]
    findings = {finding.key: finding for finding in diagnose(seen)}
    finding = findings.pop(name.split()[0])
    assert re.search(sentence, finding.sentence), finding.sentence
    assert finding.override == override
    assert "zero_reward" not in findings  # the tools explain it
    if override:
        key, _, value = override.partition("=")
        Recipe.model_validate(json.loads(seen.recipe.model_copy(
            update={"grpo": {**seen.recipe.grpo, key.partition(".")[2]: int(value)}}).model_dump_json()))  # fmt: skip


@pytest.mark.slow
def test_a_real_run_that_repeats_its_calls_is_told_so(tmp_path: Path) -> None:
    """Its model makes many calls at once, of five different ones."""
    words = write_tool_model(tmp_path)
    (tmp_path / "r.yaml").write_text(
        f"""
name: r
description: d
least_gpu: none
model: {{id: {words}, load_in: 32bit}}
data: {{train: {{path: {words}/rows.jsonl}}, prompt: "{{question}}", answer: null, holdout: 0}}
environment: tests.tool_model.Ledger
rewards: []
grpo: {{max_tool_calling_iterations: 1, max_completion_length: 150, num_generations: 4, max_steps: 5,
  per_device_train_batch_size: 8, gradient_accumulation_steps: 1}}
eval: {{enabled: false}}
merge: false
"""
    )
    run = train_run(load_recipe(str(tmp_path / "r.yaml")), RunDir(tmp_path / "run"), show=lambda line: None).run
    findings = {finding.key: finding for finding in examine(run)}
    assert (
        "of the episodes with calls repeat one 3 times or more, such as 'add(number=" in findings["call_loops"].sentence
    )
    assert findings["call_loops"].override is None  # one turn is the least
    assert not {"tools_never_called", "calls_malformed", "calls_fail", "paid_without_call"} & findings.keys()


def test_healthy_episodes_have_no_finding() -> None:
    assert diagnose(evidence(GOOD)) == []
    hopeless = evidence([row(call(n), result("1"), said("x")) for n in range(8)])
    stuck = [{**step, "rewards/Ledger/std": 0.0} for step in hopeless.steps]
    (finding,) = diagnose(Evidence(hopeless.recipe, stuck, hopeless.completions))
    assert finding.sentence.startswith("Ledger has been 0 in all 8 steps: no episode reaches its end")


def test_the_board_counts_calls_failures_and_turns() -> None:
    board = Board(recipe())
    board.steps = list(evidence(GOOD, 1.0, 0.25).steps)
    board.rows = [GOOD[0], row(said("4"))]
    assert "· calls 1.0 (25% failed) · turns 1.5 ·" in f"{board.line()} ·"
    assert ("calls", "1.0 (25% failed), turns 1.5") in [line[:2] for line in board.table()]


def episodes_in(folder: Path) -> Path:
    """Write a run whose episodes hold hostile text in call, result and answer; return its page."""
    run = write_run(folder)
    hostile = [call(1, HOSTILE), result(HOSTILE), result("{'error': 'no'}"), said(HOSTILE)]
    for path in (run.path / "completions").glob("*.jsonl"):
        rows = [{**json.loads(line), "turns": hostile} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    records = run.evaluation / "records.jsonl"
    changed = [json.loads(line) for line in records.read_text().splitlines()]
    for record in changed:
        record["trained"]["turns"] = hostile
    records.write_text("".join(json.dumps(each) + "\n" for each in changed))
    return write_report(run)


def test_the_page_has_every_turn_and_hostile_ones_stay_text(tmp_path: Path) -> None:
    html = episodes_in(tmp_path / "run").read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert html.count("<script") == 2
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)[1])
    turns = [["call", f"{HOSTILE}(number=1)"], ["result", HOSTILE], ["failed", "{'error': 'no'}"], ["said", HOSTILE]]
    assert data["completions"][0]["turns"] == turns
    assert data["heldout"][0]["trained"]["turns"] == turns
    assert "turns" not in data["heldout"][0]["base"]
