"""format_reward: the right form is paid once, hacked forms are not, in text and chat, strict and soft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import format_reward
from rewards.format import ends_with_tag

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "format_hack.jsonl"
RIGHT = "<think>2+2\nis 4</think>\n<answer>4</answer>"


def test_every_shared_case_is_judged_as_expected() -> None:
    if not CASES.is_file():
        pytest.skip("shared/cases/format_hack.jsonl is not here")
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    scores = format_reward([case["completion"] for case in cases])
    assert [c["note"] for c, score in zip(cases, scores, strict=True) if score != float(c["expect"])] == []


RIGHT_FORMS = [
    "<think>我想</think><answer>四</answer>",
    "<think>use `x < y` and <b>bold</b></think>\n\n<answer>```\nprint(4)\n```</answer>",
    "<think>a</think>\t\r\n<answer>4</answer>\r\n",
    RIGHT,
    f"\n {RIGHT}\n",
    "<think>a</think><answer>b</answer>",
    "<think>a < b</think><answer>x<y</answer>",
]
WRONG_FORMS = {
    "empty": "",
    "blank": " \n",
    "bare answer": "4",
    "no thinking": "<answer>4</answer>",
    "order": "<answer>4</answer><think>a</think>",
    "nested": "<think>a<answer>4</answer></think>",
    "crossed": "<think>a<answer>4</think></answer>",
    "text before": f"So: {RIGHT}",
    "text between": "<think>a</think> so <answer>4</answer>",
    "text after": f"{RIGHT} Done.",
    "answer twice": f"{RIGHT}<answer>4</answer>",
    "thinking twice": f"<think>b</think>{RIGHT}",
    "second opening": "<think><think>a</think><answer>4</answer>",
    "second closing": "<think>a</think></think><answer>4</answer>",
    "extra closing": f"{RIGHT}</answer>",
    "blank thinking": "<think> \n</think><answer>4</answer>",
    "blank answer": "<think>a</think><answer> </answer>",
    "cut off": RIGHT[:-3],
    "unclosed thinking": "<think>a<answer>4</answer>",
    "case": "<Think>a</Think><Answer>4</Answer>",
    "attribute": "<think x='1'>a</think><answer>4</answer>",
    "blank in tag": "< think>a</think><answer>4</answer>",
    "enumeration": f"<think>a</think><answer>{'1 ' * 1000}</answer>",
    "tag inside the answer": "<think>a</think><answer><think></answer>",
    "flood": "<think>" * 20_000 + RIGHT,
    "zero-width thinking": "<think>\u200b\u200d</think><answer>4</answer>",
    "zero-width answer": "<think>a</think><answer>\ufeff\u2060</answer>",
    "ideographic blank": "<think>\u3000</think><answer>4</answer>",
    "Hangul filler": "<think>\u3164</think><answer>4</answer>",
    "Braille blank": "<think>\u2800</think><answer>4</answer>",
    "control characters": "<think>\x00\x1b</think><answer>4</answer>",
    "combining mark alone": "<think>\u0300</think><answer>4</answer>",
    "in a code block": f"```\n{RIGHT}\n```",
    "in a quote": f"> {RIGHT}",
    "in a comment": f"<!-- {RIGHT} -->",
    "full-width brackets": "＜think＞a＜/think＞＜answer＞4＜/answer＞",
    "escaped brackets": "&lt;think&gt;a&lt;/think&gt;&lt;answer&gt;4&lt;/answer&gt;",
    "square brackets": "[think]a[/think][answer]4[/answer]",
    "Cyrillic letters": "<thіnk>a</thіnk><аnswer>4</аnswer>",
    "blank before closing": "<think>a</think ><answer>4</answer >",
    "newline in the tag": "<think\n>a</think><answer\n>4</answer>",
    "self-closing": "<think/>a<answer/>4",
    "closing first": "</think><think>a</think><answer>4</answer>",
    "answer quoted in the thinking": "<think>I write <answer>5</answer></think><answer>4</answer>",
    "closing quoted in the thinking": "<think>then </answer></think><answer>4</answer>",
    "thinking quoted in the answer": "<think>a</think><answer>I think </think> so</answer>",
    "answer, thinking, answer": "<answer>4</answer><think>a</think><answer>4</answer>",
    "two forms": RIGHT * 2,
    "two forms on two lines": f"{RIGHT}\n\n{RIGHT}",
    "a word between": "<think>a</think>.<answer>4</answer>",
    "a mark before": "\ufeff" + RIGHT,
    "an end token after": RIGHT + "<|im_end|>",
    "a turn of the user after": RIGHT + "\nuser: 2+2?",
    "opening tag doubled": "<<think>a</think><answer>4</answer>",
    "closing tag broken": "<think>a</think><answer>4</answer",
    "closing tag misspelt": "<think>a</thinks><answer>4</answer>",
    "thinking never closed, twice": "<think>a<think>b<answer>4</answer>",
}


def test_the_right_form_is_paid() -> None:
    chat = [[{"role": "assistant", "content": text}] for text in RIGHT_FORMS]
    for scores in (format_reward(RIGHT_FORMS), format_reward(chat), format_reward(RIGHT_FORMS, mode="soft")):
        assert [text for text, score in zip(RIGHT_FORMS, scores, strict=True) if score != 1.0] == []


def test_a_wrong_form_is_not_paid() -> None:
    texts = list(WRONG_FORMS.values())
    strict, soft = format_reward(texts), format_reward(texts, mode="soft")
    assert [name for name, score in zip(WRONG_FORMS, strict, strict=True) if score != 0.0] == []
    assert [name for name, score in zip(WRONG_FORMS, soft, strict=True) if score is None or score > 0.5] == []


def test_soft_credit_counts_right_blocks_and_repetition_loses_it() -> None:
    texts = ["4", "<answer>4</answer>", "x <think>a</think><answer>4</answer>", "<answer>4</answer>" * 3]
    assert format_reward(texts, mode="soft") == [0.0, 0.25, 0.5, 0.0]


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " "]), max_size=12))
def test_soft_credit_is_the_full_pay_only_for_the_right_form(pieces: list[str]) -> None:
    text = "".join(pieces)
    strict, soft = format_reward([text])[0], format_reward([text], mode="soft")[0]
    assert strict is not None
    assert soft is not None
    assert (soft == 1.0) == (strict == 1.0)
    assert soft in (0.0, 0.25, 0.5, 1.0)


def test_a_prompt_that_opens_the_thinking_owns_the_opening_tag() -> None:
    own, whole = "2+2\nis 4</think>\n<answer>4</answer>", RIGHT
    assert format_reward([own, whole], prompts=["?<think>\n", "?<think>"]) == [1.0, 0.0]
    assert format_reward([own, whole], prompts=["?", "?"]) == [0.0, 1.0]
    assert format_reward([own, whole], prefilled=True) == [1.0, 0.0]
    assert format_reward([own, whole], prompts=["?<think>", "?<think>"], prefilled=False) == [0.0, 1.0]
    assert format_reward([own], prompts=[[{"role": "assistant", "content": "<think>"}]]) == [1.0]
    assert format_reward([whole], prompts=[[{"role": "user", "content": "say <think>"}]]) == [1.0]


def test_a_rendered_prompt_shows_whether_it_prefills() -> None:
    assert ends_with_tag("<|im_start|>assistant\n<think>\n", "think")
    assert not ends_with_tag("<think></think>", "think")


def test_other_tags_and_three_of_them() -> None:
    tags = ["plan", "code", "answer"]
    assert format_reward(["<plan>a</plan><code>b</code><answer>c</answer>", RIGHT], tags=tags) == [1.0, 0.0]
    assert format_reward(["<answer>4</answer>", RIGHT], tags=["answer"]) == [1.0, 0.0]


def test_a_pattern_matches_the_whole_text_over_newlines() -> None:
    assert format_reward(["a\nb END", "a END b"], pattern=r".+ END") == [1.0, 0.0]


def test_options_that_make_no_sense_are_refused() -> None:
    options: list[dict[str, Any]] = [
        {"mode": "loose"}, {"mode": "soft", "pattern": ".*"}, {"tags": []}, {"tags": ["a", "a"]},
    ]  # fmt: skip
    for kwargs in options:
        with pytest.raises(ValueError, match="format_reward"):
            format_reward([RIGHT], **kwargs)


def test_the_longest_answer_can_be_set() -> None:
    text = f"<think>a</think><answer>{'1' * 1500}</answer>"
    assert format_reward([text], max_answer_chars=1500) == [1.0]
    assert format_reward([text], max_answer_chars=1499) == [0.0]
