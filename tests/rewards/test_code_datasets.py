"""The reference solutions of HumanEval and MBPP pass, and fail once a line of them is altered."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rewards import unit_test_reward

_TIMEOUT_S = 120.0  # MBPP/123 computes for 4 s on an idle core
_SAMPLE_AND_ALL = pytest.mark.parametrize(
    "step", [pytest.param(12, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)


def _rows(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [
        json.loads(line) for name in names for line in (folder / name).read_text(encoding="utf-8").splitlines() if line
    ]


@pytest.fixture(scope="module")
def mbpp(shared_data: Path) -> list[dict[str, Any]]:
    return _rows(shared_data, "mbpp_train.jsonl", "mbpp_test.jsonl", "mbpp_validation.jsonl")


@pytest.fixture(scope="module")
def humaneval(shared_data: Path) -> list[dict[str, Any]]:
    return _rows(shared_data, "humaneval.jsonl")


def _score_mbpp(rows: Sequence[dict[str, Any]], programs: Sequence[str]) -> list[float | None]:
    return unit_test_reward(
        programs,
        test_list=[row["test_list"] + row["challenge_test_list"] for row in rows],
        test_setup_code=[row["test_setup_code"] for row in rows],
        prompts=[[{"role": "user", "content": row["text"]}] for row in rows],
        timeout_s=_TIMEOUT_S,
    )


def _score_humaneval(
    rows: Sequence[dict[str, Any]], completions: Sequence[Any], prompts: Sequence[Any] | None
) -> list[float | None]:
    return unit_test_reward(
        completions,
        test=[row["test"] for row in rows],
        entry_point=[row["entry_point"] for row in rows],
        prompts=prompts,
        timeout_s=_TIMEOUT_S,
    )


@_SAMPLE_AND_ALL
def test_all_964_solutions_of_mbpp_pass(mbpp: list[dict[str, Any]], step: int) -> None:
    assert len(mbpp) == 964
    rows = mbpp[::step]
    scores = _score_mbpp(rows, [row["code"] for row in rows])
    assert [row["task_id"] for row, score in zip(rows, scores, strict=True) if score != 1.0] == []


@pytest.mark.parametrize("task_id", [367, 927])
def test_setup_that_needs_the_solution_is_broken_where_it_runs_first(mbpp: list[dict[str, Any]], task_id: int) -> None:
    # The two tasks known as broken: their setup builds the solution's own Node. Run in the usual order it is a
    # NameError; the grader runs it with the program there, so they can be used.
    (row,) = [row for row in mbpp if row["task_id"] == task_id]
    with pytest.raises(NameError, match="Node"):
        exec(row["test_setup_code"], {})
    assert _score_mbpp([row], [row["code"]]) == [1.0]
    assert _score_mbpp([row], [row["code"].replace("+ 1", "+ 2").replace("+1", "+2").replace("<= 1", "<= 9")]) != [1.0]


@_SAMPLE_AND_ALL
@pytest.mark.parametrize("form", ["whole program", "continuation", "chat"])
def test_all_164_solutions_of_humaneval_pass(humaneval: list[dict[str, Any]], form: str, step: int) -> None:
    assert len(humaneval) == 164
    rows = humaneval[::step]
    prompts: list[Any] = [row["prompt"] for row in rows]
    completions: list[Any] = [row["prompt"] + row["canonical_solution"] for row in rows]
    if form == "continuation":
        completions = [row["canonical_solution"] for row in rows]
    elif form == "chat":
        prompts = [
            [{"role": "user", "content": f"Complete this:\n```python\n{row['prompt']}```\nOnly code."}] for row in rows
        ]
        completions = [
            [{"role": "assistant", "content": f"<think>Hm.</think>Here:\n```python\n{text}\n```\nIt works."}]
            for text in completions
        ]
    scores = _score_humaneval(rows, completions, prompts)
    assert [row["task_id"] for row, score in zip(rows, scores, strict=True) if score != 1.0] == []


@_SAMPLE_AND_ALL
def test_solutions_of_humaneval_pass_without_prompts_too(humaneval: list[dict[str, Any]], step: int) -> None:
    rows = humaneval[::step]
    completions = [row["prompt"] + row["canonical_solution"] for row in rows]
    assert _score_humaneval(rows, completions, None) == [1.0] * len(rows)


_RIGGED = {
    "HumanEval/32": "def poly(xs, x): return 0\ndef find_zero(xs): return 0",
    "HumanEval/38": "def encode_cyclic(s): return s\ndef decode_cyclic(s): return s",
    "HumanEval/50": "def encode_shift(s): return s\ndef decode_shift(s): return s",
}


def test_helpers_of_the_prompt_cannot_be_rigged_by_the_program(humaneval: list[dict[str, Any]]) -> None:
    rows = [row for row in humaneval if row["task_id"] in _RIGGED]
    programs = [_RIGGED[row["task_id"]] for row in rows]
    assert _score_humaneval(rows, programs, [row["prompt"] for row in rows]) == [0.0, 0.0, 0.0]


def _altered(code: str, which: int) -> str:
    """Make one line return something else."""
    lines = code.split("\n")
    places = [place for place, line in enumerate(lines) if re.search(r"(?:^\s*|:\s*)return\b", line)]
    lines[places[which]] = re.sub(r"\breturn\b.*", "return 'altered'", lines[places[which]])
    return "\n".join(lines)


@_SAMPLE_AND_ALL
def test_score_of_every_mbpp_solution_drops_with_one_line_altered(mbpp: list[dict[str, Any]], step: int) -> None:
    rows = mbpp[::step]
    for which in (-1, 0, 1):  # the last `return` of 20 of them is for a case that their tests do not have
        scores = _score_mbpp(rows, [_altered(row["code"], which) for row in rows])
        rows = [row for row, score in zip(rows, scores, strict=True) if score is None or score >= 1.0]
    assert [row["task_id"] for row in rows] == []


@_SAMPLE_AND_ALL
def test_score_of_every_humaneval_solution_drops_with_one_line_altered(
    humaneval: list[dict[str, Any]], step: int
) -> None:
    rows = humaneval[::step]
    for which in (-1, 0):  # HumanEval/52 asserts that an answer is true, which 'altered' is
        completions = [_altered(row["canonical_solution"], which) for row in rows]
        scores = _score_humaneval(rows, completions, [row["prompt"] for row in rows])
        rows = [row for row, score in zip(rows, scores, strict=True) if score is None or score >= 1.0]
    assert [row["task_id"] for row in rows] == []
