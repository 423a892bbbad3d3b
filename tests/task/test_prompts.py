"""Rows become prompts: sources, templates, the split, and messages for what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import DataError
from grpo_lite.recipe.load import build_recipe
from grpo_lite.recipe.recipe import Recipe, SourceSection
from grpo_lite.task.generators import chain, countdown, generate_rows, sums
from grpo_lite.task.prompts import Prompts, load_prompts, read_rows
from grpo_lite.task.tokens import prompt_ids, prompt_text


def recipe(also: dict[str, Any] | None = None, **data: Any) -> Recipe:
    return build_recipe(
        {
            "name": "t",
            "description": "t",
            "least_gpu": "none",
            "model": {"id": "tiny/random-llama"},
            "rewards": [{"function": "rewards.accuracy_reward"}],
            "data": {"holdout": 1, **data},
            "eval": {"also": also or {}},
        },
        "t.yaml",
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"question": f"q{i}", "gold": str(i), "level": i} for i in range(10)]


def load(path: Path, also: dict[str, Any] | None = None, **data: Any) -> Prompts:
    file = write_rows(path / "rows.jsonl", data.pop("rows", ROWS))
    defaults = {"train": {"path": file}, "prompt": "{question}", "answer": "gold"}
    return load_prompts(recipe(also, **{**defaults, **data}))


def test_columns_reach_the_rewards_and_the_gold_is_named_answer(tmp_path: Path) -> None:
    row = load(tmp_path).train[0]
    assert row["prompt"] == [{"role": "user", "content": row["question"]}]
    assert row["answer"] == row["gold"]
    assert row["level"] == int(row["gold"])


def test_train_and_held_out_are_disjoint_and_complete(tmp_path: Path) -> None:
    prompts = load(tmp_path, holdout=4)
    train, held = ({row["question"] for row in part} for part in (prompts.train, prompts.eval))
    assert (len(train), len(held)) == (6, 4)
    assert train | held == {row["question"] for row in ROWS}


def test_the_split_is_the_same_every_time(tmp_path: Path) -> None:
    assert load(tmp_path, holdout=4) == load(tmp_path, holdout=4)


def test_a_share_of_the_rows_can_be_held_out(tmp_path: Path) -> None:
    assert len(load(tmp_path, holdout=0.3).eval) == 3


def test_a_training_row_with_a_held_out_prompt_is_dropped_and_said(tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", ROWS[:3])
    prompts = load(tmp_path, eval={"path": held})
    assert len(prompts.train) == 7
    assert prompts.notes == ("3 training rows have a held-out prompt and were dropped.",)


def test_further_rows_are_rendered_alike_and_share_no_prompt_with_training(tmp_path: Path) -> None:
    hard = [*ROWS[:2], *({"question": f"hard {i}", "gold": "x"} for i in range(5))]
    also = {"hard": {"path": write_rows(tmp_path / "hard.jsonl", hard), "limit": 6}}
    prompts = load(tmp_path, also, holdout=3)
    trained = [row["question"] for row in prompts.train]
    dropped = sum(row["question"] in trained for row in ROWS[:2])
    assert dropped
    assert prompts.notes == (f"{dropped} rows of eval.also.hard have a training prompt and were dropped.",)
    assert len(prompts.also["hard"]) == 6 - dropped
    row = prompts.also["hard"][-1]
    assert (row["prompt"], row["answer"]) == ([{"role": "user", "content": "hard 3"}], "x")
    assert prompts.held_out == [*prompts.eval, *prompts.also["hard"]]


def test_further_rows_that_are_all_trained_on_are_refused(tmp_path: Path) -> None:
    same = write_rows(tmp_path / "same.jsonl", ROWS)
    held = write_rows(tmp_path / "held.jsonl", [{"question": "z", "gold": "1"}])
    with pytest.raises(DataError, match=r"eval\.also\.same: no rows are left\. 10 rows of eval\.also\.same have a tr"):
        load(tmp_path, {"same": {"path": same}}, eval={"path": held})


def test_system_prompt_and_examples_come_first_in_a_chat(tmp_path: Path) -> None:
    prompt = load(tmp_path, system="Be brief.", examples=[{"prompt": "1+1", "answer": "2"}]).train[0]["prompt"]
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]


def test_text_prompts_put_examples_on_lines_before_the_question(tmp_path: Path) -> None:
    prompt = load(tmp_path, format="text", prompt="{question}=", examples=[{"prompt": "1+1=", "answer": "2"}]).train[0]
    assert prompt["prompt"] == f"1+1=2\n{prompt['question']}="


def test_a_prompt_column_of_messages_is_taken_as_it_is(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi {not a field}"}]
    rows = [{"prompt": [*messages, {"role": "user", "content": str(i)}], "gold": "1"} for i in range(2)]
    assert load(tmp_path, rows=rows, prompt="{prompt}").train[0]["prompt"][0] == messages[0]


def test_braces_in_the_data_are_not_a_template(tmp_path: Path) -> None:
    rows = [{"question": "what is {gold}?", "gold": "1"}, {"question": "b", "gold": "2"}]
    texts = {
        row["prompt"][0]["content"] for part in ("train", "eval") for row in getattr(load(tmp_path, rows=rows), part)
    }
    assert "what is {gold}?" in texts


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"prompt": "{problem}"}, r"row 0 has no column 'problem'. It has: question, gold, level"),
        ({"answer": "answer"}, r"row 0 has no column 'answer'"),
        ({"holdout": 10}, r"10 is given, but there are only 10 rows"),
        ({"train": {"path": "nowhere.jsonl"}}, r"'nowhere.jsonl' is given, but there is no such file"),
        ({"rows": []}, r"the source has no rows"),
    ],
    ids=["prompt column", "answer column", "holdout", "no file", "empty"],
)
def test_what_is_missing_is_named(tmp_path: Path, data: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load(tmp_path, **data)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.jsonl", '{"a": 1}\n{bad\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is list, not an object"),
        ("a.json", '{"a": 1}', "must hold a list of objects"),
        ("a.parquet", "not parquet", "cannot be read as .parquet"),
        ("a.txt", "x", "allowed endings: .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_placed(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected):
        read_rows(SourceSection(path=str(tmp_path / name)), 0, "data.train")


def test_all_file_kinds_hold_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": 'é, "q"', "answer": "1"}, {"question": "b\nc", "answer": "2"}]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('question,answer\n"é, ""q""",1\n"b\nc",2\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert read_rows(SourceSection(path=str(tmp_path / f"a.{suffix}")), 0, "x") == rows, suffix


def test_an_unreachable_hub_is_said_within_seconds_with_advice() -> None:
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set.*data.train.path=my.jsonl"):
        read_rows(SourceSection(hub="nobody/nothing-at-all"), 0, "data.train")


def test_over_long_prompts_are_counted_and_dropped(tmp_path: Path, tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    rows = [{"question": "x" * (60 if i == 3 else 5) + str(i), "gold": "1"} for i in range(10)]
    file = write_rows(tmp_path / "r.jsonl", rows)
    config = recipe(train={"path": file}, prompt="{question}", answer="gold", max_prompt_tokens=20)
    prompts = load_prompts(config, tokenizer)
    assert len(prompts.train) + len(prompts.eval) == 9
    assert "1 of" in prompts.notes[0]
    assert "over 20 tokens and were dropped" in prompts.notes[0]


def test_a_base_model_without_a_chat_template_is_named(tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        prompt_text([{"role": "user", "content": "x"}], tokenizer)


def test_prompt_ids_are_those_of_the_chat_template(tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    messages = [{"role": "user", "content": "2+2"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt_ids(messages, tokenizer) == expected


def test_sums_are_distinct_right_and_complete() -> None:
    rows = sums(seed=1, low=1, high=20)
    assert len({row["question"] for row in rows}) == 400  # 20 × 20 ordered pairs
    for row in rows:
        a, b = map(int, row["question"].split("+"))
        assert int(row["answer"]) == a + b


@pytest.mark.parametrize("terms", [2, 4, 7])
def test_chains_are_distinct_and_every_step_of_their_traces_holds(terms: int) -> None:
    rows = chain(seed=1, terms=terms, size=81)  # 9 × 9 ordered pairs of one digit
    assert len({row["question"] for row in rows}) == 81
    for row in rows:
        numbers = list(map(int, row["question"].split("+")))
        assert (len(numbers), row["answer"]) == (terms, str(sum(numbers)))
        match = re.fullmatch(r"<think>(.*)</think><answer>(\d+)</answer>", row["trace"])
        assert match, row
        steps = [re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step) for step in match[1].split(", ")]
        total = numbers[0]
        for step, number in zip(steps, numbers[1:], strict=True):
            assert step, row
            assert [int(part) for part in step.groups()] == [total, number, total + number]
            total += number
        assert match[2] == row["answer"]


def test_a_share_of_the_traces_answers_directly() -> None:
    rows = chain(seed=1, size=1000, direct=0.5)
    direct = [row for row in rows if row["trace"] == f"<answer>{row['answer']}</answer>"]
    assert 450 < len(direct) < 550  # 500 ± 3 standard deviations of 16
    assert all(row["trace"].startswith("<think>") for row in rows if row not in direct)
    assert [row["question"] for row in rows] == [row["question"] for row in chain(seed=1, size=1000)]


def test_chains_repeat_with_their_seed() -> None:
    assert chain(seed=1, size=50) == chain(seed=1, size=50) != chain(seed=2, size=50)


def test_countdown_problems_are_distinct_and_solved_by_their_answer() -> None:
    rows = countdown(seed=3, size=200, numbers=4)
    assert len({(tuple(sorted(row["nums"])), row["target"]) for row in rows}) == 200
    for row in rows:
        assert eval(row["answer"]) == row["target"], row  # our own generated arithmetic
        used = sorted(int(n) for n in row["answer"].replace("(", " ").replace(")", " ").translate(
            str.maketrans("+-*/", "    ")).split())  # fmt: skip
        assert used == sorted(row["nums"])


@pytest.mark.parametrize(
    "name, kwargs, expected",
    [
        ("sums", {"hihg": 3}, "has no argument 'hihg'. Allowed: low, high, operator, size"),
        ("sums", {"low": 5, "high": 2}, "0 <= low <= high is needed"),
        ("sums", {"size": 10**6}, "there are 400 distinct problems"),
        ("sums", {"high": "x"}, "was given"),
        ("chain", {"terms": 1}, "2 <= terms <= 20"),
        ("chain", {"direct": 1.5}, "0 <= direct <= 1"),
        ("chain", {"terms": 2, "size": 82}, "there are 81 distinct problems"),
        ("products", {"low": 2, "high": 3, "size": 5}, "there are 4 distinct problems"),
        ("counting", {"high": 100}, "high >= 200"),
        ("counting", {"high": 200, "size": 5000}, "distinct problems; ask for fewer"),
        ("wordle", {"size": 5000}, "words, so size is 1 to"),
        ("sudoku", {"empty": 11}, "1 <= empty <= 10"),
        ("towns", {"size": 1441}, "there are 1440 distinct questions"),
        ("countdown", {"numbers": 9}, "2 <= numbers <= 6"),
        ("countdown", {"numbers": 2, "low": 1, "high": 2, "size": 500}, "distinct problems exist"),
    ],
)
def test_generator_arguments_out_of_range_are_refused(name: str, kwargs: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        generate_rows(name, kwargs, 0)


@pytest.mark.parametrize(
    "prompt",
    [[], [None], ["hi"], [{}], [{"role": "user"}], [{"role": None, "content": "x"}], [{"role": "user", "content": 3}],
     [{"role": "user", "content": [None]}], [{"role": "user", "content": "x"}, {"role": "user", "content": None}]],
)  # fmt: skip
def test_what_is_no_chat_message_is_shown_with_its_row(tmp_path: Path, prompt: list[object]) -> None:
    rows = [{"prompt": [{"role": "user", "content": "1+1"}], "gold": "2"}, {"prompt": prompt, "gold": "2"}]
    with pytest.raises(DataError, match=r"data\.\w+: row \d: .* is no chat message\. Expected"):
        load(tmp_path, rows=rows, prompt="{prompt}")


def test_messages_as_text_and_null_in_a_prompt_are_refused(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+1"}]
    with pytest.raises(DataError, match=r"row 0 has chat messages .* data\.format=chat"):
        load(tmp_path, rows=[{"prompt": messages, "gold": "2"}] * 2, prompt="{prompt}", format="text")
    with pytest.raises(DataError, match=r"row \d has null in the column 'question'"):
        load(tmp_path, rows=[{"question": "a", "gold": "2"}, {"question": None, "gold": "2"}], prompt="{question}")


def test_a_template_that_refuses_the_messages_is_one_error(tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    refusing = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"chat template refuses the messages .*System role not supported"):
        prompt_ids([{"role": "system", "content": "x"}], tokenizer, {"chat_template": refusing})


def test_gsm8k_rows_load_from_a_file(shared_data: Path) -> None:
    rows = read_rows(SourceSection(path=str(shared_data / "gsm8k_train.jsonl"), limit=5), 0, "x")
    assert len(rows) == 5
    assert "####" in rows[0]["answer"]


@pytest.mark.parametrize(
    "template", ["{", "a } b", "{question!x}", "{level:zz}", "{question.nothing}", "{question[9]}"]
)
def test_a_template_that_cannot_be_filled_in_is_shown_with_the_way_to_write_braces(
    tmp_path: Path, template: str
) -> None:
    with pytest.raises(DataError, match=r"data\.prompt: .* cannot be filled in"):
        load(tmp_path, prompt=template, answer="gold")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_of_a_character_is_told_with_its_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = '{"q": "fine \\ud83d\\ude00"}', '{"q": "half \\ud83d"}'
    path.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{','.join(rows)}]")
    with pytest.raises(DataError, match=r"(line 2|row 1) holds \\ud83d alone, half of a character"):
        read_rows(SourceSection(path=str(path)), 0, "data.train")  # type: ignore[call-arg]


def test_a_csv_cell_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"q,a\n{'x' * 200_000},1\n")
    (row,) = read_rows(SourceSection(path=str(path)), 0, "data.train")  # type: ignore[call-arg]
    assert len(row["q"]) == 200_000


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_nesting_without_end_is_one_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text("[" * 99_999)
    with pytest.raises(DataError):
        read_rows(SourceSection(path=str(path)), 0, "data.train")  # type: ignore[call-arg]


def test_a_folder_of_a_dataset_is_read_alone(tmp_path: Path) -> None:
    for folder in ("easy", "hard"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text(json.dumps({"question": folder, "answer": "1"}) + "\n")
    rows = read_rows(SourceSection(hub=str(tmp_path), data_dir="hard"), 0, "data.train")
    assert [row["question"] for row in rows] == ["hard"]
    with pytest.raises(DataError, match=r"data\.train.*/soft"):
        read_rows(SourceSection(hub=str(tmp_path), data_dir="soft"), 0, "data.train")
