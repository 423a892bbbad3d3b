"""The battery of cheats finds rewards that can be fooled, passes those that cannot, and shows the text."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from rewards import accuracy_reward, choice_reward, countdown_reward, exact_match_reward, format_reward, gated, memoised
from rewards.testing import Report, check_rewards
from rewards.testing.cheats import Cheat

ROWS = [
    {"prompt": "What is 6 * 7?", "answer": "42"},
    {"prompt": "What is 2 + 2?", "answer": "4"},
    {"prompt": "How many metres are 1.5 km?", "answer": "1500"},
]


def tagged(row: dict[str, Any]) -> str:
    return f"<think>hm</think>\n<answer>{row['answer']}</answer>"


def failed(report: Report) -> set[str]:
    return {finding.check for finding in report.findings}


def line(report: Report, name: str) -> Any:
    return next(line for line in report.lines if line.check == name)


def test_accuracy_passes_in_every_form() -> None:
    for render in (tagged, lambda row: f"so \\boxed{{{row['answer']}}}", lambda row: f"hm\n#### {row['answer']}"):
        report = check_rewards(ROWS, accuracy_reward, render_gold=render)
        assert report.ok, report.table()
        assert (report.false_negative_rate, report.gameability_rate) == (0.0, 0.0)
        report.assert_ok()
    assert check_rewards(ROWS, accuracy_reward, render_gold=tagged, chat=True).ok


def test_accuracy_and_gated_form_together_pass() -> None:
    accuracy = memoised(accuracy_reward)
    shape = gated(format_reward, by=accuracy)

    def both(**columns: Any) -> list[float | None]:
        parts = zip(accuracy(**columns), shape(**columns), strict=True)
        return [None if a is None or f is None else a + 0.2 * f for a, f in parts]

    report = check_rewards(ROWS, both, render_gold=tagged)
    assert report.ok, report.table()
    assert report.top == pytest.approx(1.2)


def test_a_reward_that_looks_for_the_gold_anywhere_is_found_out() -> None:
    def contains(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
        return [float(gold in text) for text, gold in zip(completions, answer, strict=True)]

    report = check_rewards(ROWS, contains, render_gold=tagged)
    assert {"numbers", "or", "list", "gold, then other", "denied", "only thought", "in prose"} <= failed(report)
    assert report.gold_scores
    assert not report.ok
    assert report.gameability_rate > 0.2
    with pytest.raises(AssertionError, match="not fit to train on"):
        report.assert_ok()
    assert "numbers" in report.table()
    assert "0 1 2 3 4" in report.table(most_findings=100)


def test_a_reward_for_form_alone_is_found_out() -> None:
    report = check_rewards(ROWS, format_reward, render_gold=tagged)
    assert {"question mark", "other gold"} <= failed(report)


def test_a_reward_that_takes_the_first_number_is_found_out() -> None:
    import re

    def first_number(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
        found = [re.search(r"\d+", text) for text in completions]
        return [float(m is not None and m.group() == gold) for m, gold in zip(found, answer, strict=True)]

    assert {"1,234", "or", "gold, then other"} <= failed(check_rewards(ROWS, first_number, render_gold=tagged))


def test_a_gold_that_does_not_score_is_a_false_negative_first_in_the_list() -> None:
    report = check_rewards(ROWS, partial(accuracy_reward, extract=["boxed"]), render_gold=tagged)
    assert not report.gold_scores
    assert not report.ok
    report = check_rewards(ROWS, partial(accuracy_reward, extract=["boxed"]), render_gold=tagged, top=1.0)
    assert report.false_negative_rate == 1.0
    assert report.findings[0].check == "gold"


def test_unusable_golds_are_counted_and_left_out() -> None:
    rows = [*ROWS, {"prompt": "?", "answer": ""}]
    report = check_rewards(rows, accuracy_reward, render_gold=tagged)
    assert (report.rows, report.unusable_rows) == (4, 1)
    assert report.ok
    alone = check_rewards(rows[3:], accuracy_reward, render_gold=tagged)
    assert not alone.ok
    assert not alone.gold_scores


def test_equal_golds_of_two_rows_are_no_cheat() -> None:
    rows = [{"prompt": "1", "answer": "0.5"}, {"prompt": "2", "answer": "1/2"}]
    report = check_rewards(rows, accuracy_reward, render_gold=tagged)
    assert report.ok, report.table()
    assert line(report, "other gold").tried == 0


def test_every_other_text_reward_passes_on_rows_of_its_own() -> None:
    words = [{"prompt": "Who?", "answer": "Ada Lovelace"}, {"prompt": "Who?", "answer": "Alan Turing"}]
    check_rewards(words, exact_match_reward, render_gold=tagged).assert_ok()
    letters = [{"prompt": "A or B?", "answer": "A"}, {"prompt": "C or D?", "answer": "D"}]
    check_rewards(letters, choice_reward, render_gold=tagged).assert_ok()
    numbers = [
        {"prompt": "4?", "nums": [20, 16], "target": 4, "solution": "20-16"},
        {"prompt": "6?", "nums": [2, 3], "target": 6, "solution": "2*3"},
    ]
    check_rewards(
        numbers,
        countdown_reward,
        render_gold=lambda row: f"<think>hm</think><answer>{row['solution']}</answer>",
        answer_column="solution",
    ).assert_ok()


def test_worked_solutions_are_rendered_as_the_recipe_says() -> None:
    rows = [{"prompt": "?", "answer": "6*7\n#### 42"}, {"prompt": "?", "answer": "2+2\n#### 4"}]
    report = check_rewards(
        rows, accuracy_reward, render_gold=lambda row: f"<answer>{row['answer'].split('####')[1].strip()}</answer>"
    )
    assert report.ok, report.table()
    assert line(report, "or").tried == 2


def test_a_few_shot_contract_is_checked_with_its_one_exception() -> None:
    score = partial(accuracy_reward, extract=["first_line"])
    rows = [{"prompt": f"{a}+{a}=", "answer": 2 * a} for a in range(1, 5)]
    report = check_rewards(rows, score, render_gold=lambda row: f"{row['answer']}\n4+4=8", skip=["gold, then other"])
    assert report.ok, report.table()


def test_own_checks_are_added_and_unknown_names_refused() -> None:
    own = Cheat("shouting", "the gold in capitals", lambda row, rows: tagged(row).upper())
    report = check_rewards(ROWS, accuracy_reward, render_gold=tagged, cheats=[own])
    assert failed(report) == {"shouting"}  # tags match in any case: a finding for who wants otherwise
    with pytest.raises(ValueError, match="skip names"):
        check_rewards(ROWS, accuracy_reward, render_gold=tagged, skip=["no such check"])


def test_no_rows_and_a_broken_reward_are_errors() -> None:
    with pytest.raises(ValueError, match="no rows"):
        check_rewards([], accuracy_reward, render_gold=tagged)

    def short(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0]

    with pytest.raises(ValueError, match="returned 1 values for 3 completions"):
        check_rewards(ROWS, short, render_gold=tagged)


def test_a_renderer_may_place_other_answers_itself() -> None:
    report = check_rewards(
        ROWS, accuracy_reward, render_gold=tagged, render_answer=lambda row, answer: f"<answer>{answer}</answer>"
    )
    assert report.ok, report.table()
    assert line(report, "or").tried == 3


def test_a_worked_solution_s_boxed_answer_is_put_in_every_cheat() -> None:
    rows = [{"prompt": str(n), "answer": f"We add, and so it is $\\boxed{{{n * 1000}}}$."} for n in (2, 3)]
    report = check_rewards(rows, accuracy_reward, render_gold=lambda row: row["answer"])
    assert report.ok, report.table()
    for name in ("1,234", "or", "list", "numbers in place", "other gold", "other row", "denied", "in prose"):
        assert line(report, name).tried == 2, name


def test_programs_that_solve_nothing_are_tried_where_the_gold_is_one() -> None:
    from rewards import unit_test_reward

    rows = [
        {"prompt": "Add.", "test_list": ["assert f(1, 2) == 3"], "code": "def f(a, b):\n    return a + b"},
        {"prompt": "Multiply.", "test_list": ["assert f(2, 4) == 8"], "code": "def f(a, b):\n    return a * b"},
    ]

    def program(row: Any) -> str:
        return f"```python\n{row['code']}\n```"

    report = check_rewards(rows, partial(unit_test_reward, timeout_s=60.0), render_gold=program)
    assert report.ok, report.table()
    names = ("program, empty", "program, equal", "program, exit", "program, ends", "other row", "only thought")
    assert [line(report, name).tried for name in names] == [2] * 6

    def compiles(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [float("def f" in text or "f =" in text) for text in completions]

    assert {"program, empty", "program, equal", "other row"} <= failed(
        check_rewards(rows, compiles, render_gold=program)
    )
