"""Rows with completions become tokens to warm up on: what is dropped is counted, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from grpo_lite.errors import DataError
from grpo_lite.recipe.load import build_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.prompts import Prompts, load_prompts
from grpo_lite.task.tokens import batch_prompt_ids, completion_ids, prompt_ids
from grpo_lite.task.traces import Traces, earning, earning_lines, load_traces
from tests.conftest import SHARED
from tests.tiny import tiny_tokenizer

PROBLEMS = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
WORKED = [{**row, "completion": f"<think>next</think><answer>{row['answer']}</answer>"} for row in PROBLEMS]
TAGS = {"function": "rewards.format_reward", "weight": 0.5, "kwargs": {"tags": ["think", "answer"]}}
HOW_TO_WRITE_A_TEMPLATE = r"Set warmup\.{} to a template over them, for example '{}'\."


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenizer_of(name: str) -> Any:
    if not (SHARED / "tokenizers" / name).is_dir():
        pytest.skip(f"../shared/tokenizers/{name} is not here")
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


def recipe(path: Path, rows: list[dict[str, Any]], warmup: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """Return a recipe that warms up on `rows` and then trains on 20 problems, 4 of them held out."""
    data = {
        "train": {"path": write_rows(path / "problems.jsonl", PROBLEMS)},
        "prompt": "{question}",
        "holdout": 4,
        "format": "text",
    }
    settings = {
        "name": "t",
        "description": "t",
        "least_gpu": "none",
        "model": {"id": "tiny/random-llama"},
        "rewards": [{"function": "rewards.accuracy_reward"}, TAGS],
        "data": data | sections.pop("data", {}),
        "warmup": {"data": {"path": write_rows(path / "worked.jsonl", rows)}, **(warmup or {})},
        **sections,
    }
    return build_recipe(settings, "t.yaml")


def load(path: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **settings: Any) -> tuple[Traces, Prompts]:
    loaded = recipe(path, rows, **settings)
    prompts = load_prompts(loaded, tokenizer or tiny_tokenizer())
    return load_traces(loaded, prompts), prompts


def test_the_tokens_of_a_prompt_are_those_that_grpo_sees(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("smollm2")
    data = {"format": "chat", "system": "Add.", "examples": [{"prompt": "1+1=", "answer": "2"}]}
    traces, prompts = load(tmp_path, WORKED, tokenizer, data=data)
    by_question = {row["question"]: prompts.ids(row) for row in prompts.train}
    assert len(traces.rows) == 16
    for trace, source in zip(traces.rows, traces.sources, strict=True):
        assert trace.prompt_ids == by_question[source["question"]]


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_completion_ends_with_the_end_token_once(tmp_path: Path, name: str, kind: str) -> None:
    tokenizer = tokenizer_of(name)
    rows = [row | {"completion": row["completion"] + ("<|im_end|>\n" if i % 2 else "")} for i, row in enumerate(WORKED)]
    traces, prompts = load(tmp_path, rows, tokenizer, data={"format": kind})
    for trace, source in zip(traces.rows, traces.sources, strict=True):
        assert trace.completion_ids.count(tokenizer.eos_token_id) == 1
        assert trace.completion_ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(trace.completion_ids[:-1])
        assert text == f"<think>next</think><answer>{source['answer']}</answer>"
        # The loss begins behind the prompt: both parts together are what the model reads.
        assert tokenizer.decode(trace.prompt_ids + trace.completion_ids[:-1]) == prompts.text(source) + text


def test_an_end_token_inside_a_completion_is_only_letters() -> None:
    tokenizer = tokenizer_of("smollm2")
    (ids,) = completion_ids(["write <|im_end|> last"], tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "write <|im_end|> last"


def opening_template(tokenizer: Any) -> Any:
    """Let the generation prompt end with an opened `<think>`, as Qwen3's thinking models have it."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    return tokenizer


def test_a_tag_that_the_template_opens_is_not_said_twice(tmp_path: Path) -> None:
    tokenizer = opening_template(tokenizer_of("qwen3"))
    rows = [row | {"completion": f"<think>\n{i}</think>{row['answer']}"} for i, row in enumerate(WORKED)]
    traces, _ = load(tmp_path, rows, tokenizer, data={"format": "chat"})
    trace, answer = traces.rows[0], traces.sources[0]["answer"]
    whole = tokenizer.decode(trace.prompt_ids + trace.completion_ids)
    assert whole.endswith(f"assistant\n<think>\n{int(answer) - 1}</think>{answer}<|im_end|>")
    assert traces.notes == ["4 of 20 rows have a held-out prompt and were dropped."]


def test_a_tag_that_a_text_prompt_opens_is_not_said_twice(tmp_path: Path) -> None:
    traces, _ = load(tmp_path, WORKED, data={"prompt": "{question} <think>"})
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(traces.rows[0].prompt_ids).endswith("<think>")
    assert tokenizer.decode(traces.rows[0].completion_ids).startswith("next</think>")


def test_completions_that_never_close_the_opened_tag_are_counted(tmp_path: Path) -> None:
    tokenizer = opening_template(tokenizer_of("qwen3"))
    rows = [row | {"completion": row["answer"]} for row in WORKED]
    traces, _ = load(tmp_path, rows, tokenizer, data={"format": "chat"})
    assert "16 of 16 completions never close the <think> that their prompt opens." in traces.notes


def test_chat_completions_and_conversations_are_read_as_trl_reads_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("smollm2")
    chat = {"format": "chat"}
    plain, _ = load(tmp_path, WORKED, tokenizer, data=chat)
    users = [[{"role": "user", "content": row["question"]}] for row in WORKED]
    said = [[{"role": "assistant", "content": row["completion"]}] for row in WORKED]
    pairs = [{"prompt": user, "completion": reply} for user, reply in zip(users, said, strict=True)]
    conversations = [{"messages": user + reply} for user, reply in zip(users, said, strict=True)]
    paired, _ = load(tmp_path, pairs, tokenizer, data=chat, warmup={"prompt": "{prompt}"})
    conversed, _ = load(tmp_path, conversations, tokenizer, data=chat)
    assert plain.rows == paired.rows == conversed.rows


def test_the_recipe_s_system_prompt_replaces_that_of_a_conversation(tmp_path: Path) -> None:
    system = {"role": "system", "content": "theirs"}
    rows = [
        {"messages": [system, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    ours, _ = load(tmp_path, rows, tokenizer_of("smollm2"), data={"format": "chat", "system": "ours"})
    theirs, _ = load(tmp_path, rows, tokenizer_of("smollm2"), data={"format": "chat"})
    assert [m["content"] for m in ours.sources[0]["prompt"]] == ["ours", "a"]
    assert [m["content"] for m in theirs.sources[0]["prompt"]] == ["theirs", "a"]


def test_templates_render_prompt_and_completion(tmp_path: Path) -> None:
    rows = [{"problem": "2+2", "work": "two and two", "answer": "4"}]
    warmup = {"prompt": "{problem}=", "completion": "<think>{work}</think>{answer}"}
    traces, _ = load(tmp_path, rows, warmup=warmup)
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(traces.rows[0].prompt_ids) == "2+2="
    assert tokenizer.decode(traces.rows[0].completion_ids) == "<think>two and two</think>4<eos>"
    assert traces.sources[0] == {**rows[0], "prompt": "2+2=", "completion": "<think>two and two</think>4"}


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "completion": "fine"},
        {"question": "b", "completion": None},
        {"question": "c", "completion": " <eos> \n"},
        {"question": "d", "completion": "x" * 7},  # 7 bytes and the end token are 8 tokens
        {"question": "e", "completion": "x" * 8},
        {"question": "a very long question", "completion": "fine"},
    ]
    traces, _ = load(tmp_path, rows, warmup={"max_completion_tokens": 8}, data={"max_prompt_tokens": 10})
    assert [source["question"] for source in traces.sources] == ["a", "d"]
    assert [len(trace.completion_ids) for trace in traces.rows] == [5, 8]
    assert traces.notes == [
        "1 of 6 completions are null and were dropped.",
        "1 of 5 completions are empty and were dropped.",
        "1 of 4 prompts are over 10 tokens (data.max_prompt_tokens) and were dropped.",
        "1 of 3 completions are over 8 tokens with the end token (warmup.max_completion_tokens) and were dropped.",
    ]


@pytest.mark.parametrize("warmup", [{}, {"prompt": "How much is {question}?"}], ids=["same words", "other words"])
def test_a_held_out_problem_is_never_warmed_up_on(tmp_path: Path, warmup: dict[str, Any]) -> None:
    traces, prompts = load(tmp_path, WORKED, warmup=warmup)
    held_out = {row["question"] for row in prompts.eval}
    assert len(held_out) == 4
    assert {source["question"] for source in traces.sources} == {row["question"] for row in WORKED} - held_out
    assert traces.notes == ["4 of 20 rows have a held-out prompt and were dropped."]


def test_a_row_that_is_scored_apart_is_not_warmed_up_on(tmp_path: Path) -> None:
    hard = [{"question": "hard+1=", "answer": "2", "steps": "two"}]
    also = {"hard": {"path": write_rows(tmp_path / "hard.jsonl", hard)}}
    traces, _ = load(tmp_path, [*WORKED, *[{**WORKED[0], **hard[0]}]], eval={"also": also})
    assert "hard+1=" not in {source["question"] for source in traces.sources}


def test_a_generator_shares_the_recipe_s_seed_and_no_held_out_row(tmp_path: Path) -> None:
    source = {"generator": "sums", "kwargs": {"low": 1, "high": 4}}
    warmup = {"data": source, "completion": "{answer}"}
    traces, prompts = load(tmp_path, WORKED, warmup=warmup, data={"train": source})
    assert [source["question"] for source in traces.sources] == [row["question"] for row in prompts.train]


def test_nothing_left_is_refused_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"warmup\.data: none of its 20 rows is left to train on\. 4 of 20 rows have a held-out prompt "
        r"and were dropped\. 16 of 16 completions are over 3 tokens with the end token "
        r"\(warmup\.max_completion_tokens\) and were dropped\. Give other rows",
    ):
        load(tmp_path, WORKED, warmup={"max_completion_tokens": 3})


CHAT = {"data": {"format": "chat"}}
USER = {"role": "user", "content": "q"}
BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no completion": (
        {"question": "q", "solution": "s"},
        {},
        r"warmup\.data: row 0 has no column 'completion'\. It has: question, solution\. "
        + HOW_TO_WRITE_A_TEMPLATE.format("completion", r"\{solution\}"),
    ),
    "no prompt": (
        {"problem": "q", "completion": "s"},
        {},
        r"warmup\.data: row 0 has no column 'question'\. It has: problem, completion\. "
        + HOW_TO_WRITE_A_TEMPLATE.format("prompt", r"\{problem\}"),
    ),
    "null prompt": (
        {"question": None, "completion": "s"},
        {},
        r"warmup\.data: row 0 has null in the column 'question', which warmup\.prompt names\. Fill it in\.",
    ),
    "a template that cannot be filled": (
        {"question": "q", "steps": ["a"]},
        {"warmup": {"completion": "{steps[1]}"}},
        r"warmup\.completion: '\{steps\[1\]\}' cannot be filled in: list index out of range\. Expected: text with",
    ),
    "no template": (
        {"question": "q", "completion": "s"},
        {"warmup": {"completion": "{completion"}},
        r"warmup\.completion: '\{completion' cannot be filled in: .*double the braces",
    ),
    "two replies": (
        {"question": "q", "completion": [{"role": "assistant", "content": "a"}] * 2},
        {},
        r"warmup\.data: row 0 has \[\{'role'.*in the column 'completion'\. Allowed: text, or a list with one assistant",
    ),
    "a reply of the user": (
        {"messages": [USER, USER]},
        CHAT,
        r"warmup\.data: row 0 has \{'role': 'user'.* where the completion is expected\. Allowed: .*role 'assistant'",
    ),
    "a conversation without a question": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        CHAT,
        r"warmup\.data: row 0 has \[.*in the column 'messages'\. Allowed: a list of chat messages, the last one the",
    ),
    "messages for a text format": (
        {"messages": [USER, {"role": "assistant", "content": "a"}]},
        {},
        r"warmup\.data: row 0 has chat messages in the column prompt\. Set data\.format=chat\.",
    ),
    "reasoning apart from the answer": (
        {"messages": [USER, {"role": "assistant", "content": "a", "thinking": "hm"}]},
        CHAT,
        r"row 0 has the assistant's reasoning under 'thinking', apart from its content\. Join them by templates, such "
        r"as warmup\.completion='<think>\{messages\[1\]\[thinking\]\}</think>\{messages\[1\]\[content\]\}'",
    ),
}


@pytest.mark.parametrize("row, settings, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_brings_no_completion_is_named(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    tokenizer = tokenizer_of("smollm2") if settings is CHAT else None
    with pytest.raises(DataError, match=message):
        load(tmp_path, [row], tokenizer, **settings)


def test_the_reasoning_s_templates_from_the_message_work(tmp_path: Path) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "a", "thinking": "hm"}]}
    warmup = {
        "completion": "<think>{messages[1][thinking]}</think>{messages[1][content]}",
        "prompt": "{messages[0][content]}",
    }
    traces, _ = load(tmp_path, [row], warmup=warmup)
    assert tiny_tokenizer().decode(traces.rows[0].completion_ids) == "<think>hm</think>a<eos>"


@pytest.mark.parametrize(
    "source, message",
    [
        ({"path": "{folder}/none.jsonl"}, r"warmup\.data\.path: '.*none\.jsonl' is given, but there is no such file"),
        ({"path": "{folder}/empty.jsonl"}, r"warmup\.data: the source has no rows"),
        ({"path": "{folder}/bad.jsonl"}, r"warmup\.data\.path: .*bad\.jsonl line 1 is not JSON"),
        ({"generator": "sums", "kwargs": {"hi": 3}}, r"warmup\.data: the generator 'sums' has no argument 'hi'"),
        ({"hub": "nobody/nothing"}, r"warmup\.data\.hub: "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_source_that_cannot_be_read_is_named_by_its_key(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text("{")
    filled = {key: value.format(folder=tmp_path) if key == "path" else value for key, value in source.items()}
    with pytest.raises(DataError, match=message):
        load(tmp_path, WORKED, warmup={"data": filled})


def test_a_tokenizer_that_begins_texts_begins_text_prompts_only() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}{% endfor %}"
    prompts: list[Any] = ["2+2=", [USER]]
    assert [ids.count(1) for ids in batch_prompt_ids(prompts, tokenizer)] == [1, 1]
    assert batch_prompt_ids(prompts, tokenizer) == [prompt_ids(prompt, tokenizer) for prompt in prompts]
    assert completion_ids(["a<eos>b", "a"], tokenizer)[1] == [*tokenizer("a", add_special_tokens=False)["input_ids"], 2]
    assert [ids.count(1) for ids in completion_ids(["a<eos>b", "a"], tokenizer)] == [0, 0]


def test_batched_prompts_have_the_tokens_of_single_ones() -> None:
    tokenizer = tokenizer_of("smollm2")
    prompts = ["2+2=", [USER], "<|im_end|> is a token", [{"role": "user", "content": "<|im_start|>system"}], ""]
    assert batch_prompt_ids(prompts, tokenizer) == [prompt_ids(prompt, tokenizer) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.matrix
def test_twenty_thousand_rows_take_seconds(tmp_path: Path) -> None:
    rows = [{"question": f"{i} and what?", "completion": "word " * 200} for i in range(20_000)]
    begun = time.monotonic()
    traces, _ = load(tmp_path, rows, tokenizer_of("smollm2"), data={"format": "chat"})
    assert len(traces.rows) == 20_000
    assert time.monotonic() - begun < 60


def test_what_the_traces_earn_is_counted(tmp_path: Path) -> None:
    rows = [dict(row) for row in WORKED[:8]]
    rows[0]["completion"] = "no tags"
    rows[1]["completion"] = "<think>next</think><answer>wrong</answer>"  # well-formed: earns 0.5
    loaded = recipe(tmp_path, rows, data={"holdout": 0}, eval={"enabled": False})
    prompts = load_prompts(loaded, tiny_tokenizer())
    traces = load_traces(loaded, prompts)
    earned = earning(loaded, prompts, traces)
    assert earned == {
        "tried": 8,
        "zero": 1,
        "mean": pytest.approx((0 + 0.5 + 6 * 1.5) / 8),
        "top": 1.5,
        "example": "no tags",
    }
    assert list(earning_lines(earned, traces)) == [
        "your traces do not earn your reward: 1 of 8 earn nothing (1.19 on average of at most 1.5), for example "
        '"no tags"'
    ]
    right = dataclasses.replace(traces, rows=traces.rows[2:], sources=traces.sources[2:])
    assert list(earning_lines(earning(loaded, prompts, right), right)) == [
        "the traces earn 1.5 on average of at most 1.5 (6 tried)"
    ]


def test_only_right_traces_stay_where_the_recipe_says_so(tmp_path: Path) -> None:
    wrong = [
        {**WORKED[3], "completion": "<think>next</think><answer>0</answer>"},
        {**WORKED[4], "completion": "no tags"},
    ]
    loaded = recipe(tmp_path, [*wrong, *WORKED[5:8]], {"only_right": True}, data={"holdout": 1})
    prompts = load_prompts(loaded, tiny_tokenizer())
    traces = load_traces(loaded, prompts)
    assert {source["completion"] for source in traces.sources} <= {row["completion"] for row in WORKED[5:8]}
    assert "2 of 5 traces do not earn the first reward in full and were dropped." in traces.notes
    loaded = recipe(tmp_path, wrong, {"only_right": True}, data={"holdout": 1})
    with pytest.raises(DataError, match="the first reward pays none of the 2 traces in full"):
        load_traces(loaded, load_prompts(loaded, tiny_tokenizer()))


def test_the_gold_of_a_trace_may_have_a_column_of_its_own_name(tmp_path: Path) -> None:
    rows = [{"question": "a", "completion": "<answer>7</answer>", "expected": "7"}]
    loaded = recipe(tmp_path, rows, {"answer": "expected"})
    prompts = load_prompts(loaded, tiny_tokenizer())
    earned = earning(loaded, prompts, load_traces(loaded, prompts))
    assert earned is not None
    assert earned["mean"] == 1.0


def test_traces_without_what_a_reward_needs_are_not_tried(tmp_path: Path) -> None:
    rows = [{"question": "a", "completion": "fine", "level": 1}]
    loaded = recipe(tmp_path, rows)
    prompts = load_prompts(loaded, tiny_tokenizer())
    traces = load_traces(loaded, prompts)
    assert earning(loaded, prompts, traces) is None
    (line,) = earning_lines(None, traces)
    assert "a reward needs a column that their rows lack (they have: level, question)" in line


def test_a_penalty_for_length_counts_tokens(tmp_path: Path) -> None:
    penalty = {
        "function": "rewards.soft_overlong_punishment",
        "weight": 0.1,
        "kwargs": {"max_completion_length": 30, "cache_length": 5},
    }
    loaded = recipe(tmp_path, WORKED, rewards=[{"function": "rewards.accuracy_reward"}, penalty])
    prompts = load_prompts(loaded, tokenizer_of("smollm2"))
    traces = load_traces(loaded, prompts)
    assert max(len(trace.completion_ids) for trace in traces.rows) <= 25 < len(WORKED[0]["completion"])
    earned = earning(loaded, prompts, traces)
    assert earned is not None
    assert (earned["mean"], earned["top"]) == (1.0, 1.0)
