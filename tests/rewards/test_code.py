"""`unit_test_reward` pays for passed tests in every form that datasets have them, and for nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from rewards import sandbox, unit_test_reward

_RIGHT = "def add(a, b): return a + b"
_HALF = "def add(a, b): return 3"
_WRONG = "def add(a, b): return None"
_BROKEN = "def add(a, b) return"
_CALLS = [{"args": [1, 2], "want": 3}, {"args": [2, 2], "want": 4}]
_ASSERTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
_CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n"
_CHECK_CODE = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert abs(candidate(2, 2) - 4) < 1e-9\n"
_STREAMS = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "2 2\n", "stdout": "4\n"}]
_FORMS: dict[str, dict[str, Any]] = {
    "calls": {"tests": _CALLS, "entry_point": "add"},
    "calls as JSON": {"tests": json.dumps(_CALLS), "entry_point": "add"},
    "calls from a table": {
        "tests": [{**call, "kwargs": None, "stdin": None, "stdout": None} for call in _CALLS],
        "entry_point": "add",
    },
    "MBPP": {"test_list": _ASSERTS, "test_setup_code": ""},
    "MBPP with setup": {"test_list": ["assert add(ONE, 2) == 3", _ASSERTS[1]], "test_setup_code": "ONE = 1"},
    "MBPP executed": {"test_list": ["assert sum([add(1, 2)]) == 3", "assert add(2, 2) > 3.5"]},
    "asserts as tests": {"tests": _ASSERTS},
    "HumanEval": {"test": _CHECK, "entry_point": "add"},
    "HumanEval executed": {"test": _CHECK_CODE, "entry_point": "add"},
}  # fmt: skip


def scores(completions: Sequence[Any], **row: Any) -> list[float | None]:
    """Score completions on one row."""
    options = {name: row.pop(name) for name in ("mode", "tiers", "timeout_s", "log_metric") if name in row}
    columns = {name: [value] * len(completions) for name, value in row.items()}
    return unit_test_reward(completions, **columns, **{"timeout_s": 60.0, **options})


def score(completion: Any, **row: Any) -> float | None:
    """Score one completion on one row."""
    return scores([completion], **row)[0]


@pytest.mark.parametrize("form", _FORMS)
def test_score_is_the_fraction_of_tests_passed(form: str) -> None:
    expected: dict[str, tuple[Any, float]] = {
        "right": (_RIGHT, 1.0),
        "fenced": (f"```python\n{_RIGHT}\n```", 1.0),
        "half": (_HALF, 0.5),
        "wrong": (_WRONG, 0.0),
        "broken": (_BROKEN, 0.0),
        "empty": ("", 0.0),
        "prose": ("I do not know.", 0.0),
        "chat": ([{"role": "assistant", "content": f"```python\n{_RIGHT}\n```"}], 1.0),
    }
    found = scores([completion for completion, _ in expected.values()], **_FORMS[form])
    assert dict(zip(expected, found, strict=True)) == {name: score for name, (_, score) in expected.items()}
    assert scores([_HALF, _RIGHT], **_FORMS[form], mode="all") == [0.0, 1.0]


def test_scripts_are_scored_by_their_output() -> None:
    expected = {
        "a, b = map(int, input().split())\nprint(a + b)": 1.0,
        "print(3)": 0.5,
        "print(3); print(4)": 0.0,
        "a, b = map(int, input().split())\nprint(a + b)\nraise SystemExit(1)": 0.0,
        "": 0.0,
    }
    fenced = [f"```python\n{program}\n```" for program in expected]
    assert dict(zip(expected, scores(list(expected), tests=_STREAMS), strict=True)) == expected
    assert dict(zip(expected, scores(fenced, tests=json.dumps(_STREAMS)), strict=True)) == expected


@pytest.mark.parametrize("form", ["calls", "HumanEval executed"])
def test_tiers_pay_for_compiling_and_running(form: str) -> None:
    expected = {
        _BROKEN: 0.0,
        "import os; os._exit(0)": 0.1,  # it compiles
        "raise SystemExit(0)": 0.1,
        "x = 1": 0.1,
        "def add(a, b): raise ValueError": 0.1,
        _WRONG: 0.3,  # and every test ran to its end
        _HALF: 0.3 + 0.35,
        _RIGHT: 1.0,
    }
    found = scores(list(expected), **_FORMS[form], tiers={"compile": 0.1, "run": 0.2, "pass": 0.7})
    assert dict(zip(expected, found, strict=True)) == pytest.approx(expected)


def test_tiers_of_a_script_need_exit_code_zero_to_have_run() -> None:
    tiers = {"compile": 0.1, "run": 0.2, "pass": 0.7}
    found = scores(["1 +", "raise ValueError", "print(3)"], tests=_STREAMS, tiers=tiers)
    assert found == pytest.approx([0.0, 0.1, 0.3 + 0.35])


def test_blank_and_commented_out_programs_earn_no_tier() -> None:
    tiers = {"compile": 0.1, "run": 0.2, "pass": 0.7}
    programs = ["", "   \n", "# def add(a, b): return a + b", "```python\n```"]
    assert scores(programs, **_FORMS["calls"], tiers=tiers) == [0.0] * 4


def test_row_whose_tests_judge_nothing_is_none_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = [
        {"tests": []},
        {"tests": None},
        {"tests": "not JSON"},
        {"tests": '{"args": [1], "want": 1}', "entry_point": "add"},
        {"tests": _CALLS},  # calls of what?
        {"tests": [{"args": [1, 2]}], "entry_point": "add"},
        {"tests": [{"args": 1, "want": 1}], "entry_point": "add"},
        {"tests": [_CALLS[0], _STREAMS[0]], "entry_point": "add"},
        {"tests": [{"stdin": "1", "stdout": None}]},
        {"tests": [{"args": [1, 2], "want": object()}], "entry_point": "add"},
        {"tests": [3]},
        {"test_list": []},
        {"test_list": ["assert add(1, 2) =="]},
        {"test_list": ["assert True"]},
        {"test": "def check(candidate): pass", "entry_point": "add"},
        {"test": _CHECK},
        {"test": "def check(", "entry_point": "add"},
        {"test": _CHECK, "test_list": _ASSERTS, "entry_point": "add"},
        {"tests": [{"args": ["x" * 5_000_000, ""], "want": ""}], "entry_point": "add"},
        {"test": _CHECK_CODE + "#" * 5_000_000, "entry_point": "add"},
    ]
    for row in rows:
        columns = {"tests": None, **row}
        found: dict[str, float] = {}
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rewards.code"):
            assert score(_RIGHT, **columns, log_metric=found.__setitem__) is None, repr(row)[:200]
        assert found["unit_test_reward/unusable_tests"] == 1.0
        assert "cannot be judged" in caplog.text


def test_rows_of_a_batch_are_independent() -> None:
    assert unit_test_reward(
        [_RIGHT, _RIGHT, _WRONG, _RIGHT],
        test_list=[_ASSERTS, None, _ASSERTS, ["assert nothing("]],
        timeout_s=60.0,
        task_id=[1, 2, 3, 4],
        trainer_state=None,
    ) == [1.0, None, 0.0, None]


def test_metrics_are_fractions_of_the_batch() -> None:
    found: dict[str, float] = {}
    loop = "def add(a, b):\n    while True: pass"
    unit_test_reward(
        [_RIGHT, _BROKEN, loop, _RIGHT],
        test_list=[_ASSERTS, _ASSERTS, _ASSERTS, []],
        timeout_s=1.0,
        log_metric=found.__setitem__,
    )
    assert found == {
        "unit_test_reward/unusable_tests": 0.25,
        "unit_test_reward/not_python": 0.25,
        "unit_test_reward/timeout": 0.25,
        "unit_test_reward/weak_isolation": 0.0,
    }


def test_broken_call_is_an_error_not_a_score() -> None:
    calls: list[tuple[dict[str, Any], str]] = [
        ({}, "no tests"),
        ({"test_list": [_ASSERTS] * 2}, "test_list has 2 rows, completions has 1"),
        ({"test_list": [_ASSERTS], "entry_point": []}, "entry_point has 0 rows"),
        ({"test_list": [_ASSERTS], "mode": "most"}, "mode is 'most'"),
        ({"test_list": [_ASSERTS], "tiers": {"compile": 1.0, "run": 1.0}}, "sum 1"),
        ({"test_list": [_ASSERTS], "tiers": {"comple": 0.1, "pass": 0.9}}, "weights of compile, run, pass"),
        ({"test_list": [_ASSERTS], "tiers": {"run": -0.5, "pass": 1.5}}, "sum 1"),
    ]
    for options, message in calls:
        with pytest.raises(ValueError, match=message):
            unit_test_reward([_RIGHT], **options)


def test_empty_batch_has_no_scores() -> None:
    assert unit_test_reward([], test_list=[]) == []


def test_refusal_and_its_acceptance_reach_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.WITHOUT, "namespaces,bubblewrap,landlock,seccomp")
    with pytest.raises(sandbox.IsolationError, match="allow_weak_isolation"):
        unit_test_reward([_RIGHT], test_list=[_ASSERTS])
    found: dict[str, float] = {}
    scores = unit_test_reward(
        [_RIGHT], test_list=[_ASSERTS], allow_weak_isolation=True, timeout_s=60.0, log_metric=found.__setitem__
    )
    assert scores == [1.0]
    assert found["unit_test_reward/weak_isolation"] == 1.0
    sandbox.close_all()


def test_types_decide_in_calls_and_pythons_equality_in_asserts() -> None:
    one = "def add(a, b): return True"
    assert score(one, tests=[{"args": [0, 1], "want": 1}], entry_point="add") == 0.0
    assert score(one, test_list=["assert add(0, 1) == 1"]) == 1.0


def test_forgeries_earn_nothing_in_any_form() -> None:
    programs = [
        "class A(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef add(a, b): return A(0)",
        "from unittest.mock import MagicMock\nadd = MagicMock()",
        "import os; os._exit(0)",
        "def add(a, b): raise SystemExit(0)",
        "def add(a, b): return float('nan')",
        "import builtins\nbuiltins.sum = builtins.abs = lambda *a: 3\ndef add(a, b): return None",
        "def check(candidate): return True\ndef add(a, b): return 0",
    ]
    paid = {
        form: [program for program, score in zip(programs, scores(programs, **row), strict=True) if score != 0.0]
        for form, row in _FORMS.items()
    }
    assert paid == {form: [] for form in _FORMS}


def test_prompt_helpers_missing_make_the_row_unusable_rather_than_the_program_the_grader() -> None:
    test = "def check(candidate):\n    assert helper(candidate(1)) == 2"
    program = "def helper(x): return 2\ndef add(a): return 0"
    prompt = "def helper(x):\n    return x + 1\n\ndef add(a):\n    '''Return a.'''\n"
    assert score(program, test=test, entry_point="add", prompts=prompt) == 0.0
    assert score("    return a", test=test, entry_point="add", prompts=prompt) == 1.0
    assert score(program, test=test, entry_point="add", prompts="Write add.") is None
