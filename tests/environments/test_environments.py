"""The environments of the kit: gold policies earn 1, cheats do not, and no argument makes a tool raise."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from grpo_lite.rewards.sandbox import SandboxError

from grpo_lite.environments import BUILT_IN, python, search, towns
from grpo_lite.environments.calculator import Calculator, evaluate
from grpo_lite.environments.methods import tools_of
from grpo_lite.environments.python import Python, StatelessPython
from grpo_lite.environments.search import Search
from grpo_lite.environments.sudoku import Sudoku, solutions
from grpo_lite.environments.wordle import Wordle, marks
from grpo_lite.environments.words import WORDS
from grpo_lite.errors import DataError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import LimitsSection
from grpo_lite.task.environments import load_toolkit
from grpo_lite.task.generators import generate_rows
from grpo_lite.task.policies import play_turns

Rows = Callable[[int], list[dict[str, Any]]]
GENERATORS = {
    "calculator": "products", "python": "counting", "wordle": "wordle", "sudoku": "sudoku", "search": "towns",
}  # fmt: skip
LEAST_SUCCESS = {"wordle": 0.5}  # below, it pays for letters
HOSTILE = [None, 3, -1, 2**70, 1.5, True, [], {}, [["a"]], "", " ", "\x00", "é" * 9, "\ud800", "＋１", "9" * 50_000,
           "(" * 300, "<tool_call>{}</tool_call>", "__import__('os').getcwd()", "1;2", "\n\n"]  # fmt: skip


def play_in(environment: Any, row: dict[str, Any], turns: list[Any]) -> Any:
    prompt = [{"role": "user", "content": row.get("question", "")}]
    return play_turns(environment, {"prompt": prompt, **row}, turns, LimitsSection())


def play(environment: Callable[[], Any], row: dict[str, Any], turns: list[Any]) -> Any:
    return play_in(environment(), row, turns)


def module_and_class(name: str) -> tuple[Any, Any]:
    module, _, class_name = BUILT_IN[name].partition(":")
    loaded = import_module(module)
    return loaded, getattr(loaded, class_name)


@pytest.fixture(params=sorted(BUILT_IN))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rows(name: str) -> Rows:
    if name == "search":
        pytest.importorskip("bm25s")
    return lambda size: generate_rows(GENERATORS[name], {"size": size}, seed=3)


def test_the_gold_policy_earns_everything_and_repeats(name: str, rows: Rows) -> None:
    module, environment = module_and_class(name)
    size = 12 if name == "python" else 50  # each of its rows is a process
    every = rows(size)
    assert len({str(row) for row in every}) == size
    assert every == rows(size)
    episodes = [play(environment, row, module.gold(row)) for row in every]
    assert [reward for reward, _ in episodes] == [1.0] * size
    assert play(environment, every[0], module.gold(every[0])) == episodes[0]


def test_no_cheat_is_paid(name: str, rows: Rows) -> None:
    module, environment = module_and_class(name)
    paid = [
        (cheat, row, reward)
        for row in rows(2)
        for cheat, turns in module.cheats(row).items()
        if (reward := play(environment, row, turns)[0]) is None or reward >= LEAST_SUCCESS.get(name, 1e-9)
    ]
    assert paid == []


def test_hostile_arguments_give_one_short_error_and_no_exception(name: str, rows: Rows) -> None:
    module, environment = module_and_class(name)
    instance, row = environment(), rows(1)[0]
    instance.reset(**row)
    for call, tool in tools_of(instance).items():
        good = next(c for turn in module.gold(row) for c in turn if c["name"] == call)["arguments"]
        for argument in good:
            for value in HOSTILE:
                text = tool(**{**good, argument: value})
                assert isinstance(text, str)
                assert len(text) < 2500, (argument, value)
                assert "<tool_call>" not in text
    assert instance.get_reward() == 0.0


def test_an_episode_leaves_nothing_to_the_next(name: str, rows: Rows) -> None:
    module, environment = module_and_class(name)
    instance, (first, second) = environment(), rows(2)
    assert play_in(instance, first, module.gold(first))[0] == 1.0
    assert play_in(instance, second, ["I do not know"])[0] == 0.0
    assert play_in(instance, second, module.gold(second)) == play(environment, second, module.gold(second))


def test_transformers_reads_the_schemas_of_the_tools(name: str) -> None:
    from transformers.utils import get_json_schema

    for call, tool in tools_of(module_and_class(name)[1]()).items():
        schema = get_json_schema(tool)["function"]
        assert schema["name"] == call
        assert all(part["description"] for part in schema["parameters"]["properties"].values())


@pytest.mark.parametrize(
    "expression, value",
    [
        ("17*23", "391"),
        ("(2+3)*-4", "-20"),
        ("7/2", "3.5"),
        ("0.1+0.2", "0.3"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("2**10", "1024"),
        ("2**-1", "0.5"),
        ("2**0.5", "1.41421356237"),
        ("(-1)**999999999999", "-1"),
        ("0**0", "1"),
        ("12 × 12 ÷ 9 − 1=", "15"),
    ],
)
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression, error",
    [
        ("9**9**9", "too large"),
        ("2**1001", "too large"),
        ("2**(1/3)**-99", "too large"),
        ("9" * 390, "too large"),
        ("9**99*9**99*9**99*9**99", "too large"),
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("(-8)**0.5", "no real value"),
        ("1,000*2", "are allowed"),
        ("abs(1)", "are allowed"),
        ("1(2)", "are allowed"),
        ("()", "are allowed"),
        ("1+", "complete expression"),
        ("-" * 390 + "(", "complete expression"),
    ],
)  # fmt: skip
def test_the_calculator_refuses(expression: str, error: str) -> None:
    text = Calculator().calculate(expression)
    assert text.startswith("Error: ")
    assert error in text


@pytest.mark.parametrize("seed", range(3))
def test_the_calculator_agrees_with_python(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        text = "".join(f"{rng.randint(1, 99)}{rng.choice(['+', '-', '*', '//', '%'])}" for _ in range(5)) + "7"
        assert evaluate(text) == str(eval(text))  # our own generated arithmetic


def test_a_result_may_be_used_again() -> None:
    row = {"question": "Three boxes of 24 and 12 more?", "answer": 84}
    calls = [[{"name": "calculate", "arguments": {"expression": text}}] for text in ("3*24", "72+12", "84*1")]
    assert play(Calculator, row, calls)[0] == 1.0
    assert play(Calculator, row, [*calls, *calls[:1]])[0] == 0.0  # the last result counts
    assert play(Calculator, {"question": "3*24"}, calls)[0] is None


def test_a_failing_call_shows_what_trl_would_show() -> None:
    class Broken:
        def reset(self, **row: Any) -> str:
            return " now"

        def explode(self) -> str:
            raise RuntimeError("boom")

        async def slow(self) -> int:
            return 7

    calls = [{"name": name, "arguments": {}} for name in ("explode", "slow", "none", "reset")]
    wrong = [{"name": "slow", "arguments": {"x": 1}}, {"name": "slow", "arguments": "x"}, {}]
    reward, messages = play(Broken, {"prompt": [{"role": "user", "content": "go"}]}, [[*calls, *wrong], "end", "late"])
    assert reward is None
    assert messages[0] == {"role": "user", "content": "go now"}
    shown = [message["content"] for message in messages if message["role"] == "tool"]
    assert shown[:4] == ["{'error': 'boom'}", "7", "{'error': 'Tool none not found.'}",
                         "{'error': 'Tool reset not found.'}"]  # fmt: skip
    assert all(text.startswith("{'error': ") for text in shown[4:])
    assert messages[-1] == {"role": "assistant", "content": "end"}


def calls(tool: str, argument: str, *values: Any) -> list[Any]:
    return [[{"name": tool, "arguments": {argument: value}}] for value in values]


@pytest.mark.parametrize(
    "guess, hidden, expected",
    [("eerie", "elder", "GYY--"), ("llama", "label", "GYY--"), ("sheep", "sheep", "GGGGG"),
     ("speed", "abide", "--Y-Y"), ("geese", "eerie", "-GY-G")],
)  # fmt: skip
def test_wordle_marks_a_letter_as_often_as_it_is_hidden(guess: str, hidden: str, expected: str) -> None:
    assert marks(guess, hidden) == expected


def test_wordle_pays_less_for_each_turn_and_nothing_after_the_last() -> None:
    wrong = [word for word in WORDS if word != "tiger"][:6]
    paid = [play(Wordle, {"answer": "tiger"}, calls("guess", "word", *wrong[:n], " TIGER "))[0] for n in range(7)]
    assert paid[:6] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert 0.0 < paid[6] <= 0.32  # the best of six wrong words
    reward, messages = play(Wordle, {"answer": "tiger"}, calls("guess", "word", "zzzzz", "tower", "tower", "tiger"))
    assert reward == 0.7  # a word that is none and a repeated one are turns
    assert [message["content"] for message in messages if message["role"] == "tool"][1] == (
        "T O W E R\nG - - G G\n4 of 6 guesses are left."
    )


@pytest.mark.parametrize(
    "guesses, paid",
    [
        (["tower"], 0.24),  # G--GG
        (["tower", "crime"], 0.24),  # the best guess counts, not the last
        (["great", "tower", "tower"], 0.24),  # a repeated guess adds nothing
        (["right"], 0.24),  # YGG-Y
        (["great"], 0.16),  # YYY-Y
        (["zzzzz"], 0.0),
        ([], 0.0),
    ],
)
def test_wordle_pays_a_little_for_the_letters_of_the_best_guess(guesses: list[str], paid: float) -> None:
    assert play(Wordle, {"answer": "tiger"}, calls("guess", "word", *guesses))[0] == paid


def test_no_word_that_is_not_found_pays_as_much_as_one_found_last() -> None:
    worths = {
        play(Wordle, {"answer": hidden}, calls("guess", "word", word))[0]
        for hidden in WORDS[::25]
        for word in WORDS
        if word != hidden
    }
    assert max(worth for worth in worths if worth is not None) <= 0.32


def test_wordle_picks_a_word_by_seed_and_judges_no_row_without_one() -> None:
    game = Wordle()
    for seed in (1, 2):
        game.reset(seed=seed)
        assert game.guess(random.Random(seed).choice(WORDS)).endswith("Solved.")
        assert game.guess("tiger") == "Error: the game is over."
    for row in ({}, {"answer": 391}, {"answer": "tree"}):
        assert play(Wordle, row, calls("guess", "word", "tiger"))[0] is None
    assert all(len(word) == 5 and word.isascii() and word.islower() for word in WORDS)


@pytest.mark.parametrize("empty", [1, 6, 10])
def test_a_sudoku_has_one_solution(empty: int) -> None:
    for row in generate_rows("sudoku", {"size": 5, "empty": empty}, seed=7):
        puzzle = row["puzzle"].replace("\n", "")
        assert puzzle.count(".") == empty
        assert list(solutions(puzzle)) == [row["answer"].replace("\n", "")]


def test_sudoku_counts_moves_and_keeps_to_the_rules() -> None:
    row = {"question": "Solve", "puzzle": "12.4\n3412\n2143\n.321", "answer": ""}
    game = Sudoku()
    assert game.reset(**row) == "\n\n1 2 . 4\n3 4 1 2\n2 1 4 3\n. 3 2 1"
    assert game.place(1, 1, 2) == "Error: this cell is a clue. 5 moves are left."
    assert game.place(1, 3, 4) == "Error: the digit 4 is in the same row, column or box already. 4 moves are left."
    assert game.place(1, 3, "3") == "Error: digit must be a whole number from 1 to 4. 3 moves are left."  # type: ignore[arg-type]
    assert game.place(1, 3, 3).endswith("2 moves are left.")
    assert game.get_reward() == 0.0
    assert game.place(4, 1, 4).endswith("4 3 2 1\nSolved.")
    assert game.get_reward() == 0.7  # five moves for two cells
    assert game.place(1, 3, 3) == "Error: the game is over."
    assert game.reset(puzzle="12..") is None
    assert game.get_reward() is None


def test_sudoku_is_made_by_seed() -> None:
    game, other = Sudoku(), Sudoku()
    assert game.reset(seed=4) == other.reset(seed=4) != game.reset(seed=5)


def test_python_keeps_state_by_replay_and_hides_earlier_output() -> None:
    tool = Python()
    tool.reset(question="?", answer=1)
    assert tool.run("x = 20\nprint('once')") == "once"
    assert tool.run("def twice(n): return 2 * n") == "(no output; use print to see a value)"
    assert tool.run("twice(x)") == "40"
    assert tool.run("y = 1\n1 / 0") == "Error: ZeroDivisionError: division by zero (line 2)"
    assert tool.run("y") == "Error: NameError: name 'y' is not defined (line 1)"  # what failed is not replayed
    tool.reset(question="?", answer=1)
    assert tool.run("x").startswith("Error: NameError")


def test_stateless_python_keeps_nothing_between_calls_and_says_so_to_the_model() -> None:
    from transformers.utils import get_json_schema

    row = generate_rows("counting", {"size": 1}, seed=3)[0]
    tool = StatelessPython()
    tool.reset(**row)
    assert tool.run("x = 20\nprint(x)") == "20"
    assert tool.run("x") == "Error: NameError: name 'x' is not defined (line 1)"
    assert play(StatelessPython, row, python.gold(row))[0] == 1.0
    assert {play(StatelessPython, row, turns)[0] for turns in python.cheats(row).values()} == {0.0}
    kept, anew = (get_json_schema(kind().run)["function"]["description"] for kind in (Python, StatelessPython))
    assert "Variables and functions of earlier calls are kept." in kept
    assert "nothing of earlier calls is kept" in anew


def test_python_survives_code_that_leaves_floods_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_lite.environments.python.TIMEOUT_S", 0.5)
    tool = Python()
    tool.reset(question="?", answer=7)
    assert tool.run("print(7)\nimport sys; sys.exit(0)").endswith("Error: 7\nSystemExit: 0 (line 2)")
    assert tool.run("import os; os._exit(0)") == "Error: the code ended its process"
    flood = tool.run("print('ab' * 5000)")
    assert "[8600 characters left out]" in flood
    assert len(flood) <= 1500
    assert tool.run("while True: print('x' * 999)").endswith("RuntimeError: too much output (line 1)")
    assert tool.run("while True: pass") == "Error: out of time after 0.5 s"
    assert tool.run("def f(:") == "Error: SyntaxError: invalid syntax (<code>, line 1) (line 1)"
    assert tool.get_reward() == 0.0


def test_python_pays_no_episode_whose_sandbox_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise SandboxError("no worker")

    tool = Python()
    tool.reset(question="2*9", answer=18)
    monkeypatch.setattr("grpo_lite.environments.python.run_tests", broken)
    for action in (lambda: tool.run("print(2*9)"), tool.get_reward):
        with pytest.raises(SandboxError, match="no worker"):
            action()


def test_a_question_about_the_kit_s_text_takes_two_searches() -> None:
    pytest.importorskip("bm25s")
    answers = [str(n) for town in towns.towns() for n in (town.bridge, town.museum, town.inhabitants)]
    assert len(set(answers)) == len(answers) == 720  # each stands in one passage
    rows = generate_rows("towns", {"size": 100}, seed=5)
    for row in rows:
        who, what = row["queries"]
        assert play(Search, row, calls("search", "query", who, what))[0] == 1.0
        assert play(Search, row, calls("search", "query", who))[0] == 0.0
    asked = [play(Search, row, calls("search", "query", row["question"]))[0] for row in rows]
    assert sum(asked) <= 2  # some hit is by chance: 3 of 240 passages of the kind are shown


def test_a_question_about_a_file_of_one_s_own_is_found_by_its_own_words(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    lines = [f"The harbour of {town} was built in {1700 + i}." for i, town in enumerate(("Vel", "Tor", "Kas", "Ond"))]
    (tmp_path / "mine.txt").write_text("\n\n".join(lines), encoding="utf-8")
    row = {"question": "When was the harbour of Kas built?", "answer": "1702", "corpus": str(tmp_path / "mine.txt")}
    assert play(Search, row, search.gold(row))[0] == 1.0
    assert {play(Search, row, turns)[0] for turns in search.cheats(row).values()} == {0.0}


def test_without_its_library_the_search_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(DataError, match=r"'grpo-lite\[search\]' \(in a checkout: \.venv/bin/pip install bm25s\)"):
        load_toolkit(load_recipe("search"))


def test_search_shows_bounded_passages_of_text_and_json_lines(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    corpus = tmp_path / "facts.jsonl"
    corpus.write_text('{"title": "Owls", "text": "Owls hunt\\nat night."}\n{"text": "' + "Cats sleep. " * 90 + '"}\n')
    tool = Search()
    tool.reset(corpus=str(corpus), answer="night")
    assert tool.search("owls hunt") == "[1] Owls: Owls hunt at night."
    assert tool.get_reward() == 1.0
    assert len(tool.search("cats")) <= 404
    assert [tool.search("zqxj") for _ in range(7)][-1] == "Error: no searches are left; 8 are allowed."


@pytest.mark.parametrize(
    "name, content, expected",
    [("none.txt", None, "there is no such file"), ("a.jsonl", "{}", "KeyError"), ("a.jsonl", "[1", "cannot be read"),
     ("a.txt", " \n\n ", "no passages"), ("a.txt", "\udcff", "cannot be read")],
)  # fmt: skip
def test_search_refuses_a_file_without_passages(tmp_path: Path, name: str, content: str | None, expected: str) -> None:
    pytest.importorskip("bm25s")
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=expected):
        Search().reset(corpus=str(tmp_path / name), answer="x")


def test_nothing_of_this_process_s_environment_reaches_the_python_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_this_test")
    environment = Python()
    environment.reset(question="q", answer="a")
    found = environment.run("import os\nprint(dict(os.environ))\nprint(open('/proc/self/environ').read())")
    assert "hf_secret_of_this_test" not in found
    assert "HF_TOKEN" not in environment.run("import os\nprint(list(os.environ))")


@pytest.mark.parametrize(
    ("answer", "query", "paid"),
    [
        ("7", "How many gates?", 1.0),
        ("7", "7 gates", 0.0),
        ("Mary Shelley", "shelley", 0.0),
        ("old gate", "gates", 1.0),
    ],
)
def test_a_search_for_the_answer_is_not_paid(tmp_path: Path, answer: str, query: str, paid: float) -> None:
    corpus = tmp_path / "town.txt"
    corpus.write_text("The town has 7 gates; the old gate is of stone.\n\nMary Shelley wrote there.\n\nHens lay eggs.")
    tool = Search()
    tool.reset(corpus=str(corpus), question="What of the town?", answer=answer)
    tool.search(query)
    assert tool.get_reward() == paid
