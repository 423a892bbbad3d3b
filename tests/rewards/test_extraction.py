"""Which answer a completion commits to: classes of texts that must give one and the same answer, or none."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import (
    accuracy_reward,
    choice_reward,
    countdown_reward,
    exact_match_reward,
    format_reward,
    honest_accuracy,
)
from rewards.completion import completion_text, prompt_end, visible_text, visible_texts
from rewards.extraction import extract_answer

# Each class: texts that commit to the same answer, and that answer.
CLASSES = {
    "42": [
        "<answer>42</answer>",
        "<answer>\n42\n</answer>",
        "<ANSWER>42</ANSWER>",
        "<answer>\\boxed{42}</answer>",
        "<answer>The answer is 42.</answer>",
        "<answer>41</answer> No: <answer>42</answer>",
        "\\boxed{41} <answer>42</answer>",
        "\\boxed{42}",
        "\\boxed {42}",
        "\\fbox{42}",
        "$$\\boxed{42}$$",
        "\\[ \\boxed{ 42 } \\]",
        "\\boxed{\\boxed{42}}",
        "\\boxed{42} \\boxed{42}",
        "First \\boxed{41}. Then \\boxed{42}.",
        "#### 41\n\\boxed{42}",
        "\\boxed{\\boxed{42}",
        "\\boxed{42} and then \\boxed{43",
        "{ \\boxed{42} and a stray brace",
        "48/2 = 24\n#### 42",
        "####42",
        "#### Answer: 42",
        "so 6 * 7 = 42 #### 42",
        "The answer is 42.",
        "the answer is: 42",
        "The final answer is 42",
        "Answer: 42",
        "**Answer:** 42",
        "**Final answer: 42**",
        "Final answer:\n\n42",
        "The answer is $42$.",
        "The answer is \\(42\\).",
        "The answer is\n$$42$$",
        "The answer is **42**.",
        "The answer is \\boxed{42}.",
        "The answer is 41. Wait. The answer is 42.",
        "The answer is 42 because 6 * 7 = 42.",
        "The answer is 42, which is 6 * 7.",
        "The answer to this question is 42.",
        "I get \\boxed{41}. Hmm no, the answer is 42.",
        "The answer is 42!",
    ],
    "3.5": ["The answer is 3.5.", "The answer is 3.5", "#### 3.5", "\\boxed{3.5}"],
    "\\frac{1}{2}": [
        "\\boxed{\\frac{1}{2}}",
        "The answer is $\\frac{1}{2}$.",
        "<answer>$x$ \\boxed{\\frac{1}{2}}</answer>",
    ],
    "\\{1, 2\\}": ["\\boxed{\\{1, 2\\}}", "The answer is $\\{1, 2\\}$."],
    "1, 2": [
        "\\boxed{1} and \\boxed{2}",
        "\\boxed{1}, \\boxed{2}",
        "\\boxed{1} or \\boxed{2}",
        "$\\boxed{1}$, $\\boxed{2}$",
    ],
    None: [
        "",
        "42",
        "It is 42.",
        "\\boxed{42",
        "\\boxed{}",
        "<answer>42",
        "<answer></answer>",
        "</answer>42<answer>",
        "answer 42",
        "answers: 42",
        "####",
        "#### ",
        "##### 42",
        "boxed{42}",
        "\\boxedtimes{42}",
        "The answer is",
    ],
}


def test_texts_of_one_class_commit_to_one_answer() -> None:
    assert [(text, want) for want, texts in CLASSES.items() for text in texts if extract_answer(text) != want] == []


HEDGES = [
    "The answer is $42$ or $41$.",
    "The answer is $41$, $42$.",
    "The answer is \\(41\\) or \\(42\\).",
    "The answer is 42 or 41.",
    "The answer is 42, but it could be 41.",
    "The answer is 42, which could also be 41 or 40.",
    "The answer is 42 if n is even.",
    "The answer is 42 when x = 1 and 41 otherwise.",
    "The answer is 41 or \\boxed{42}.",
    "It is \\boxed{42} or 41.",
    "It is \\boxed{42} or \\boxed{41}.",
    "It is $41$ or $\\boxed{42}$.",
    "<answer>41 or \\boxed{42}</answer>",
    "<answer>\\boxed{41} \\boxed{42}</answer>",
    "<answer>The answer is 41 or 42.</answer>",
    "<answer>41\n42</answer>",
    "<answer>42; 41</answer>",
    "<answer>42/41</answer>",
    "#### 42 or 41",
    "#### 42, 41",
    "\\boxed{42}\\boxed{41}",
    "\\boxed{42 \\text{ or } 41}",
    "\\boxed{42\\lor 41}",
    "\\boxed{42 \\vee 41}",
    "\\boxed{42 | 41}",
    "\\boxed{42 \\quad 41}",
    "\\boxed{42 \\\\ 41}",
    "\\boxed{\\begin{matrix}42\\\\41\\end{matrix}}",
    "\\boxed{42?}",
    "\\boxed{[42, 41]}",
    "\\boxed{42 \\to 41}",
    "\\boxed{42-ish, say 41}",
    "\\boxed{40 < 42}",
]


def test_a_hedge_is_no_answer() -> None:
    for gold in ("42", "41"):
        scores = accuracy_reward(HEDGES, [gold] * len(HEDGES))
        assert [text for text, score in zip(HEDGES, scores, strict=True) if score != 0.0] == []


CLAUSES = {
    "Final Answer: The largest $n$ is 34.": "34",
    "**Final Answer:** The largest $n$ is **34**.": "34",
    "Final Answer: The largest $n$ is $34$.": "34",
    "Final Answer: The largest $n$ is exactly 34, since $35$ fails.": "34",
    "Final answer: The area is 34 square units.": "34 square units",
    "The final answer is that the probability that Alice wins is 2/3.": "2/3",
    "Answer: the probability that Alice wins is 2/3.": "2/3",
    "Answer: the probability that the sum is even is $\\frac{2}{3}$.": "\\frac{2}{3}",
    "Answer: The largest number for which the sum is positive is 34.": "34",
    "Answer: The number of 5-digit numbers is 34.": "34",
    "Final answer: $n$ is 34.": "34",
    "Final answer: \\(f(3)\\) is 34.": "34",
    "Final answer: It equals 34.": "34",
    "Answer: The largest number of choices that can be made is 34.": "34",
    "Final Answer: The largest $n$ is 34, not 35.": "34",
    "\\boxed{41}. Final Answer: The largest $n$ is 34.": "34",
}


def test_a_clause_behind_the_marker_commits_to_its_value() -> None:
    assert {text: extract_answer(text) for text in CLAUSES} == CLAUSES


NO_CLAUSES = [
    "The largest $n$ is 34.",
    "Therefore, the largest $n$ is 34.",
    "Final Answer: The largest $n$ is 41.",
    "Final Answer: The largest $n$ is 34 or 41.",
    "Final Answer: The largest $n$ is 34. Or 41.",
    "Final Answer: The largest $n$ is not 34.",
    "Final Answer: The largest $n$ isn't 41, it is 34.",
    "Final Answer: The largest $n$ is at most 34.",
    "Final Answer: The largest $n$ is about 34.",
    "Final Answer: The largest $n$ is less than 34.",
    "Final Answer: The largest $n$ is 34 more than the smallest.",
    "Final Answer: The largest $n$ is 34 times as large.",
    "Final Answer: The largest $n$ might be 34.",
    "Final Answer: The largest $n$ is between 33 and 34.",
    "Final Answer: The smallest $n$ is 2 and the largest is 34.",
    "Final Answer: The smallest $n$ is 2, the largest is 34.",
    "Final Answer: The smallest $n$ is $2$ while the largest is 34.",
    "Final Answer: The largest $n$ is 41 if $k$ is 34.",
    "Final Answer: The largest $n$ is 41 when $k$ is 34.",
    "Final Answer: The largest $n = 41$, so $k$ is 34.",
    "Final Answer: The wrong value is 34.",
    "Final Answer: The other candidate is 34.",
    "Final Answer: My guess is 34.",
    "Final Answer: The largest $n$ is 34, which is wrong.",
    "Final Answer: The largest $n$ is 34?",
    "Final Answer: It is 34 that fails.",
    "Final Answer: The largest $n$ is 34 below the bound.",
    "Final Answer: The claim is that $n$ is 34.",
    "Final Answer: $41$ is 34.",
    "Final Answer: $n = 41$ is 34.",
    "Final Answer: The largest $n$ is",
    "\\boxed{34}. Final Answer: The largest $n$ is 41.",
]


def test_a_clause_that_hedges_denies_or_compares_commits_to_no_value() -> None:
    scores = accuracy_reward(NO_CLAUSES, ["34"] * len(NO_CLAUSES))
    assert [text for text, score in zip(NO_CLAUSES, scores, strict=True) if score != 0.0] == []


def test_working_in_front_of_a_box_inside_the_answer_tag_is_read_as_a_chain() -> None:
    assert extract_answer("<answer>6 * 7 = \\boxed{42}</answer>") == "6 * 7 = 42"
    assert extract_answer("<answer>We get $\\boxed{42}$ apples.</answer>") == "42"


def test_the_recipe_s_order_decides_between_markers() -> None:
    text = "\\boxed{1} <answer>2</answer>\n#### 3"
    assert extract_answer(text, ["boxed", "answer_tag", "hash"]) == "1"
    assert extract_answer(text, ["hash", "boxed"]) == "3"
    assert extract_answer(text, ["phrase"]) is None


@pytest.mark.parametrize("reward", [accuracy_reward, honest_accuracy])
def test_a_tag_of_another_name_holds_the_answer_on_request(reward: Any) -> None:
    texts = {
        "41 <SOLUTION>42</SOLUTION>": 1.0,
        "<SOLUTION>41</SOLUTION> no <solution> 42 </solution>": 1.0,
        "\\boxed{41} <SOLUTION>\\boxed{42}</SOLUTION>": 1.0,
        "<SOLUTION>41 or 42</SOLUTION>": 0.0,
        "<SOLUTION>42": 0.0,
        "42": 0.0,
        "<answer>42</answer>": 0.0,
        "<think><SOLUTION>42</SOLUTION></think>": 0.0,
    }
    scores = reward(list(texts), [42] * len(texts), extract=["tag:SOLUTION"])
    assert dict(zip(texts, scores, strict=True)) == texts
    assert reward(["<SOLUTION>42</SOLUTION>"], [42]) == [0.0]


@pytest.mark.parametrize("method", ["tag:", "tag:a b", "tag:<x", "tagged", "Tag:x"])
def test_a_tag_without_a_plain_name_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="last_number, tag:NAME"):
        extract_answer("<x>1</x>", [method])


def test_a_later_number_in_prose_takes_a_marked_answer_back_and_chatter_does_not() -> None:
    assert extract_answer("\\boxed{42}. No, the answer is 41.") == "41"
    assert extract_answer("\\boxed{42}. So the answer is clear.") == "42"
    assert extract_answer("The answer is 41. So \\boxed{42}.") == "42"
    assert extract_answer("\\boxed{42}. No, the answer is 41.", ["boxed"]) == "42"


@pytest.mark.parametrize(
    ("method", "answers"),
    [
        (
            "first_line",
            {"15\n4+4=8": "15", "\n\n 15 \n16": "15", "15": "15", "": None, "2+3=5\n4+4=8": None, "x = 5\n": "x = 5"},
        ),
        (
            "last_number",
            {"so 1,234 apples": "1,234", "it is -3.5": "-3.5", "1 then 2/3": "2/3", "none": None, "x2 and .5": ".5"},
        ),
    ],
)
def test_the_first_line_or_the_last_number_is_the_answer_on_request(method: str, answers: dict[str, Any]) -> None:
    assert {text: extract_answer(text, [method]) for text in answers} == answers


@given(st.text(max_size=300))
def test_no_text_breaks_extraction(text: str) -> None:
    for methods in (("answer_tag", "boxed", "hash", "phrase"), ("first_line",), ("last_number",)):
        found = extract_answer(text, methods)
        assert found is None or found.strip()


@given(st.text(alphabet="ab{}\\ $", max_size=40), st.integers(-999, 999))
def test_the_last_closed_box_wins_whatever_stands_before_it(before: str, number: int) -> None:
    before = before.replace("\\", "/")  # no escape may swallow the box
    assert extract_answer(f"{before} x \\boxed{{{number}}}", ["boxed"]) == str(number)


THINKING = {
    "42": "42",
    "<think>41</think>42": "42",
    "<THINK>41</THINK>42": "42",
    "<thinking>41</thinking>42": "42",
    "<reasoning>41</reasoning>42": "42",
    "41</think>42": "42",
    "42<think>41": "42",
    "<think>41": "",
    "<think>a<think>b</think>42": "42",
    "<think>a</think>4<think>b</think>2": "42",
    "a</think>b</think>42": "42",
    "42<think>a</think>": "42",
    "<thinker>42": "<thinker>42",
}


def test_thinking_is_left_out() -> None:
    assert {text: visible_text(text) for text in THINKING} == THINKING


def test_a_prompt_that_opens_the_thinking_hides_what_comes_before_its_end() -> None:
    assert visible_texts(["41</think>42", "42"], ["2?<think>\n", "2?<think>"]) == ["42", ""]
    assert visible_texts(["41</think>42", "42"], prefilled=True) == ["42", ""]
    assert visible_texts(["42"], ["2?"]) == ["42"]
    assert visible_texts(["42"], ["2?<think>"], prefilled=False) == ["42"]


def test_a_chat_prompt_leads_into_the_completion_only_by_a_started_assistant_turn() -> None:
    assert prompt_end([{"role": "user", "content": "Use <think>"}]) == ""
    assert prompt_end([{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>"}]) == "<think>"
    assert prompt_end([]) == prompt_end(None) == ""


def test_the_text_of_a_completion_is_found_in_every_shape() -> None:
    cases: list[tuple[Any, str]] = [
        (None, ""),
        ("text", "text"),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"content": "a"}], "a"),
        (
            [
                {"role": "assistant", "content": "a"},
                {"role": "tool", "content": "t"},
                {"role": "assistant", "content": "b"},
            ],
            "b",
        ),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": None}], "a"),
        ([{"role": "assistant", "content": "b", "reasoning_content": "42"}], "b"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], "a"),
        ([], ""),
    ]
    assert [(completion, want) for completion, want in cases if completion_text(completion) != want] == []


def test_content_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="got int"):
        completion_text([{"role": "assistant", "content": 42}])


REPEATED = [
    "1", "1,", "a ", "(", "{", "\\{", "\\frac{", "\\text{", "-", "=", "\\boxed{", "$", "$\\boxed{", "\\(", "**",
    "1{,}", "or ", ",", "\\boxed{1} ", "\\boxed{1} or ", "answer ", "answer is ", "answer: 1 ", "#", "####", "#### 1",
    "\n", "\\", "½", "é", "<think>", "</think>", "<answer>", "</answer>", "<answer>1", "x_", "^", "!", "|", "\\deg",
    "5 cm ", " because", ". ", "1 1/2 ",
]  # fmt: skip


@pytest.mark.parametrize(("characters", "limit_s"), [(10_000, 5.0), pytest.param(60_000, 30.0, marks=pytest.mark.slow)])
def test_no_repeated_pattern_makes_a_scan_quadratic(characters: int, limit_s: float) -> None:
    """Linear work takes tenths of a second, quadratic work far more than the limit."""
    slow = {}
    for piece in REPEATED:
        start = time.monotonic()
        _score_all((piece * characters)[:characters])
        if (seconds := time.monotonic() - start) > limit_s:
            slow[piece] = seconds
    assert slow == {}


def _score_all(text: str) -> None:
    texts = [text, f"\\boxed{{{text[:3900]}}}", f"<answer>{text}</answer>", f"The answer is {text}", f"#### {text}"]
    for methods in (["first_line"], ["last_number"], ["answer_tag", "boxed", "hash", "phrase"]):
        accuracy_reward(texts, ["12345"] * 5, extract=methods)
    honest_accuracy(texts, ["12345"] * 5)
    exact_match_reward(texts, ["12345"] * 5)
    choice_reward(texts, ["A"] * 5)
    countdown_reward(texts, [[1, 2]] * 5, [3] * 5)
    format_reward(texts, mode="soft")
