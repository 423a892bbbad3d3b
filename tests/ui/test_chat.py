"""Asking a trained run: how questions are put, answers shown, and what happens without a terminal."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from grpo_lite.cli import main
from grpo_lite.errors import DataError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.ui.chat import Chat, Sampling, answer_lines, build_prompt, fill_template, talk
from grpo_lite.ui.tool_chat import ToolChat
from tests.command_line import in_process
from tests.finished_run import make_recipe, make_run
from tests.tool_model import call, tool_tokenizer, write_tool_model

BASE = Path("base")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def both(run: RunDir) -> Chat:
    return Chat(run, Sampling(max_new_tokens=6), compare=True)


def command(*arguments: str, stdin: str = "") -> str:
    result = CliRunner().invoke(main, [*arguments], input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    "template, typed, asked",
    [
        ("{prompt}", "2+3=", "2+3="),
        ("{question}=", "2+3", "2+3="),
        ("{question}=", "2+3=", "2+3="),
        ("Q: {question}\nA:", "why?", "Q: why?\nA:"),
        ("{a}+{b}", "2+3", "2+3"),  # two columns: nothing can be filled in
        ("{q} {{x}}", "a", "a {x}"),
        ("{q.text!r:>5}", "a", "a"),
    ],
)
def test_question_is_put_into_the_recipes_template(template: str, typed: str, asked: str) -> None:
    assert fill_template(make_recipe(BASE, prompt=template).data, typed) == asked


def test_system_prompt_examples_and_history_come_before_the_question() -> None:
    recipe = make_recipe(BASE, system="Add.", examples=[{"prompt": "1+1=", "answer": "2"}])
    messages = build_prompt(recipe, "2+3", [("5+5", "10")])
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Add."), ("user", "1+1="), ("assistant", "2"),
        ("user", "5+5="), ("assistant", "10"), ("user", "2+3="),
    ]  # fmt: skip


def test_text_recipe_asks_in_text_as_training_did() -> None:
    from grpo_lite.task.prompts import render_row

    recipe = make_recipe(BASE, system="Add.", examples=[{"prompt": "1+1=", "answer": "2"}], format="text")
    trained = render_row(recipe.data, {"question": "2+3", "answer": 5}, "here", 0)["prompt"]
    assert build_prompt(recipe, "2+3") == trained == "Add.\n1+1=2\n2+3="


def test_chat_recipe_asks_as_training_did() -> None:
    from grpo_lite.task.prompts import render_row

    recipe = make_recipe(BASE, system="Add.")
    trained = render_row(recipe.data, {"question": "2+3", "answer": 5}, "here", 0)["prompt"]
    assert build_prompt(recipe, "2+3") == trained


def test_base_and_trained_answer_by_their_own_weights(both: Chat, run: RunDir) -> None:
    answers = both.ask("2+3")
    assert list(answers) == ["base", "trained"]
    alone = Chat(run, Sampling(max_new_tokens=6))
    assert alone.ask("2+3") == {"trained": answers["trained"]}
    assert answers["base"] != answers["trained"]  # the adapter is far from zero


def test_greedy_answers_repeat_and_sampled_ones_repeat_with_their_seed(run: RunDir) -> None:
    drawn = [Chat(run, Sampling(temperature=1.5, seed=seed, max_new_tokens=12)).ask("2+3") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_answer_comes_in_pieces_that_make_up_the_whole(run: RunDir) -> None:
    pieces: list[str] = []
    answer = Chat(run, Sampling(max_new_tokens=6)).ask("2+3", stream=pieces.append)["trained"]
    assert "".join(pieces).strip() == answer


def test_conversation_is_kept_until_it_is_forgotten(run: RunDir) -> None:
    chat = Chat(run, Sampling(max_new_tokens=4))
    chat.ask("2+3", remember=True)
    assert [question for question, _ in chat.histories["trained"]] == ["2+3"]
    chat.forget()
    assert chat.histories == {"trained": []}


class Echo:
    """Answers at once; keeps what it was asked."""

    sides = ("trained",)

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.forgot = 0

    def ask(self, question: str, remember: bool = False, stream: Any = None) -> dict[str, str]:
        self.asked.append((question, remember))
        return {"trained": f"answer to {question}"}

    def forget(self) -> None:
        self.forgot += 1


def test_piped_lines_are_questions_of_their_own() -> None:
    echo, shown = Echo(), list[str]()
    assert talk(echo, ["a\n", "\n", "/exit\n", "b"], shown.append, interactive=False) == 3  # type: ignore[arg-type]
    assert echo.asked == [("a", False), ("/exit", False), ("b", False)]
    assert shown == ["answer to a", "answer to /exit", "answer to b"]


def test_an_answer_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole, side by side, and in pieces as they come."""
    from grpo_lite import cli as cli_export

    class Hostile(Echo):
        recipe = None

        def ask(self, question: str, remember: bool = False, stream: Any = None) -> dict[str, str]:
            return {"trained": "a\x1b]0;owned\x07\nb", "base": "c\x1b[2J"}

    monkeypatch.setattr("grpo_lite.cli._trained_run", lambda path: None)
    monkeypatch.setattr("grpo_lite.ui.chat.Chat", lambda *_: Hostile())
    text = in_process("chat", str(tmp_path), "2+3")
    assert "\x1b" not in text
    assert "\\u001b[2J" in text
    shown: list[str] = []
    monkeypatch.setattr(cli_export.click, "echo", lambda text, nl: shown.append(text))
    cli_export._piece("x\x1b[31m\ny")
    assert shown == ["x\\u001b[31m\ny"]


def test_terminal_knows_new_help_and_exit() -> None:
    echo, shown = Echo(), list[str]()
    lines = ["a", "/new", "/help", "/exit", "never"]
    assert talk(echo, lines, shown.append, interactive=True) == 1  # type: ignore[arg-type]
    assert (echo.asked, echo.forgot) == ([("a", True)], 1)
    assert "/exit ends it" in shown[1]


def test_two_answers_stand_side_by_side_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = answer_lines({"base": "one two", "trained": "three\nfour"})
    assert lines[0].split() == ["base", "|", "trained"]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["three", "four"]
    assert all(len(line) <= 100 for line in answer_lines({"base": "x " * 200, "trained": "y " * 90}))


def test_two_answers_stand_one_under_the_other_where_it_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert answer_lines({"base": "one", "trained": "two"}) == ["base:", "one", "", "trained:", "two"]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"top_k": -1}, "--top-k -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Sampling(**values)


def test_command_answers_one_question(run: RunDir, both: Chat) -> None:
    expected = both.ask("2+3")["trained"]
    assert command("chat", str(run.path), "2+3", "--max-new-tokens", "6") == expected + "\n"


def test_command_answers_what_is_piped_in_without_a_terminal(run: RunDir, both: Chat) -> None:
    expected = [both.ask(question)["trained"] for question in ("2+3", "4+4")]
    assert command("chat", str(run.path), "--max-new-tokens", "6", stdin="2+3\n4+4\n") == "\n".join(expected) + "\n"


def test_command_with_nothing_piped_in_says_nothing(run: RunDir) -> None:
    assert command("chat", str(run.path), stdin="") == ""


def test_command_compares(run: RunDir) -> None:
    output = command("chat", str(run.path), "2+3", "--compare", "--max-new-tokens", "3")
    assert "base" in output
    assert "trained" in output


def test_verify_command_counts_files(run: RunDir) -> None:
    assert "files intact" in command("verify", str(run.merged))


def test_dry_run_command_prints_the_card(run: RunDir) -> None:
    output = command("push", str(run.path), "me/sums", "--dry-run")
    assert "dry run: nothing is sent" in output
    assert "library_name: transformers" in output


@pytest.fixture(scope="module")
def playing(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose model calls a tool in most turns, its adapter untrained."""
    from grpo_lite.models.load import lora_config
    from grpo_lite.runs.run_dir import dump_recipe

    folder = write_tool_model(tmp_path_factory.mktemp("tools"))
    (folder / "ledger.py").write_text(
        """
from tests import tool_model


class Ledger(tool_model.Ledger):
    def reset(self, start, **row):
        self.total = int(start)
        return f" Begin at {self.total}."

    def get_reward(self):
        return 1.0
"""
    )
    (folder / "r.yaml").write_text(
        f"""
name: ledger
description: add
least_gpu: none
model: {{id: {folder}, load_in: 32bit}}
data: {{train: {{path: {folder}/rows.jsonl}}, prompt: "{{start}}", answer: null, holdout: 2}}
environment: {folder}/ledger.py:Ledger
rewards: []
grpo: {{max_tool_calling_iterations: 3, max_completion_length: 120}}
"""
    )
    recipe = load_recipe(str(folder / "r.yaml"))
    run = RunDir(folder / "run")
    run.path.mkdir()
    run.recipe_file.write_text(dump_recipe(recipe))
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora_config(recipe))
    model.save_pretrained(run.adapter)
    from grpo_lite.files.manifest import write_manifest

    write_manifest(run.adapter)
    return run


def test_tools_are_called_and_each_call_and_result_is_shown(playing: RunDir) -> None:
    chat = Chat(playing, Sampling(temperature=1.0, seed=3), compare=True)
    answers = next(given for _ in range(20) if "← total" in (given := chat.ask("5", remember=True))["base"])
    lines = answers["base"].splitlines()
    asked = [int(line[len("→ add(number=") : -1]) for line in lines if line.startswith("→ add(")]
    results = [line for line in lines if line.startswith("←")]
    total, expected = 5, []
    for number in asked[: len(results)]:  # the calls of the last turn may be past the limit
        total += max(number, 0)
        expected.append(f"← total {total}" if number > 0 else f"← {{'error': '{number} is below 0'}}")
    assert results == expected
    assert "→" not in chat.histories["base"][-1][1]  # of an earlier question the model reads its answer only


def test_a_row_is_typed_as_json_and_one_that_cannot_begin_says_why(playing: RunDir) -> None:
    chat = Chat(playing, Sampling())
    pieces: list[str] = []
    typed = chat.ask('{"start": 40}', stream=pieces.append)["trained"]
    assert "".join(pieces) == typed
    assert typed.startswith("? 40 Begin at 40.\n")
    failing = "(not begun: Ledger.reset: raised ValueError: invalid literal for int() with base 10: 'many', with the "
    for answer in [chat.ask("many")["trained"] for _ in range(4)]:  # each time, however often it is shown in training
        assert answer.startswith(failing)
        assert answer.endswith("'start': 'many'}. Type the columns of a row as JSON, such as {\"number\": 37})")
    assert chat.ask('{"other": 1}')["trained"] == (
        "(chat: the recipe's rows have no column 'other'. They have: question, start.)"
    )
    for row in [chat.ask("{}")["trained"] for _ in range(3)]:  # one of the recipe's own, as it is
        assert re.match(r"\? ([012]) Begin at \1\.\n", row)
    Path(chat.recipe.data.train.path or "").rename(playing.path.parent / "gone.jsonl")
    assert "has no column 'start'" in Chat(playing, Sampling()).ask('{"other": 1}')["trained"]
    (playing.path.parent / "gone.jsonl").rename(chat.recipe.data.train.path or "")


def test_a_question_to_the_search_recipe_searches_the_recipe_s_text() -> None:
    pytest.importorskip("bm25s")
    recipe, words = load_recipe("search"), tool_tokenizer()
    tools, turns = ToolChat(recipe, words), iter([call("search", query="museum"), "1841"])
    tools.begin()
    shown, said = tools.answer(
        "When was it opened?", partial(build_prompt, recipe),
        lambda prompts, room: [words(next(turns), add_special_tokens=False)["input_ids"]], 500, None, None,
    )  # fmt: skip
    assert re.match(r'→ search\(query="museum"\)\n← \[1\] The museum of \w+ was opened in \d{4}\.\n', shown)
    assert said == "1841"
