"""`check-env`: the page's example passes, and an environment that pays for something else does not."""

import re
from pathlib import Path

import pytest
from transformers import Qwen3Config

from grpo_lite.environments import BUILT_IN
from grpo_lite.errors import RewardError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.task.check import check_recipe, require_beginnings
from grpo_lite.task.check_environments import check_environments
from grpo_lite.task.prompts import load_prompts
from tests.command_line import grpo_lite
from tests.tool_model import tool_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tools-and-environments.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMON = ["rewards=[]", "eval.enabled=false", "data.answer=null"]


def recipe_with(tmp_path: Path, source: str) -> list[str]:
    (tmp_path / "guess.py").write_text(source)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"number": {n}, "question": "Go."}}\n' for n in range(2, 60)))
    return [f"environment={tmp_path}/guess.py:Guess", f"data.train={{path: {tmp_path}/rows.jsonl}}", *COMMON]


def test_the_environment_of_the_page_passes(tmp_path: Path) -> None:
    overrides = recipe_with(tmp_path, "\n".join(BLOCKS))
    out = grpo_lite("check-env", "smoke", *overrides)
    assert "environment Guess: 32 rows played" in out
    assert re.search(r"gold +mean 1.00", out)
    assert re.search(r"never guesses +mean 0.00", out)


def test_one_that_pays_for_any_guess_is_found_out(tmp_path: Path) -> None:
    source = "\n".join(BLOCKS).replace("if self.last == self.number", "if self.tries")
    (played,) = check_environments(load_recipe("smoke", recipe_with(tmp_path, source)))
    assert "out of range" in played.beaten_by
    assert any("pays for something else" in line for line in played.lines())


def test_one_that_keeps_state_over_episodes_fails(tmp_path: Path) -> None:
    source = (
        "\n".join(BLOCKS)
        .replace("    def reset", "    tries = 0\n\n    def reset")
        .replace("self.number, self.tries, self.last = number, 0, None", "self.number, self.last = number, None")
    )
    (played,) = check_environments(load_recipe("smoke", recipe_with(tmp_path, source)))
    assert played.keeps_state
    assert played.is_repeatable
    assert "keeps state of the episode before" in grpo_lite(
        "check-env", "smoke", *recipe_with(tmp_path, source), expect=1
    )


@pytest.mark.parametrize(("chance", "repeatable"), [("random", True), ("random.SystemRandom()", False)])
def test_chance_that_no_checkpoint_keeps_is_said(tmp_path: Path, chance: str, repeatable: bool) -> None:
    source = "import random\n" + "\n".join(BLOCKS).replace('"right" if', f'"right " + str({chance}.random()) if')
    (played,) = check_environments(load_recipe("smoke", recipe_with(tmp_path, source)))
    assert played.is_repeatable is repeatable
    assert played.passes
    assert any("a resumed run will differ" in line for line in played.lines()) is not repeatable


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("def get_reward", "def _get_reward"), "has no get_reward"),
        (("self.number, self.tries, self.last = number, 0, None", "while True: pass"), "took longer than"),
        (("return 1.0 / self.tries if", "return 1 / 0 if"), "raised ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    overrides = recipe_with(tmp_path, "\n".join(BLOCKS).replace(*change))
    with pytest.raises(RewardError, match=says):
        check_environments(load_recipe("smoke", [*overrides, "limits.tool_timeout_s=0.2", "rewards=[]"]))


@pytest.mark.parametrize("name, generator", [("wordle", "wordle"), ("sudoku", "sudoku"), ("search", "towns")])
def test_the_kit_s_own_are_beaten_by_nobody(name: str, generator: str) -> None:
    given = [f"environment={BUILT_IN[name]}", f"data.train={{generator: {generator}, kwargs: {{size: 40}}}}", *COMMON]
    (played,) = check_environments(load_recipe("smoke", given))
    assert played.beaten_by == []
    assert len(played.rewards) >= 3


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("def gold(row):\n    return row['nothing']", r"gold\(row\) .*KeyError: 'nothing'"),
        ("def gold(row):\n    return [{'name': 'guess', 'arguments': {'value': 3}}]", "a list of calls made at once"),
        ("def gold(row):\n    return None", "a list of calls made at once"),
        ("def cheats(row):\n    return ['It is 50.']", "a name and turns for each"),
    ],
    ids=["gold raises", "a turn that is no list", "no turns", "cheats without names"],
)
def test_a_faulty_policy_is_named(tmp_path: Path, policy: str, says: str) -> None:
    overrides = recipe_with(tmp_path, "\n".join([*BLOCKS, policy]))
    with pytest.raises(RewardError, match=says):
        check_environments(load_recipe("smoke", overrides))


@pytest.mark.parametrize("pays", [0.0, 1.0], ids=["nothing", "as gold"])
def test_policies_of_some_rows_are_compared_with_gold_on_those_rows(tmp_path: Path, pays: float) -> None:
    # Without a call an odd number is not judged; only the multiples of three have the first cheat.
    of_silence = f"        if not self.tries:\n            return None if self.number % 2 else {pays}\n"
    source = "\n".join(BLOCKS).replace("        return 1.0", f"{of_silence}        return 1.0")
    source += "\n\ndef cheats(row):\n    return {'waits': ['It is 50.']} if row['number'] % 3 == 0 else {}\n"
    (played,) = check_environments(load_recipe("smoke", recipe_with(tmp_path, source)))
    assert {"waits", "no call at all"} & set(played.beaten_by) == ({"waits", "no call at all"} if pays else set())
    assert 0 < len(played.rewards["waits"]) < len(played.rewards["no call at all"]) < played.rows == 32


def test_an_environment_that_uses_up_its_row_leaves_it_to_the_next_policy(tmp_path: Path) -> None:
    source = "\n".join(BLOCKS).replace("self.number, self", "row['deck'].pop()\n        self.number, self")
    overrides = recipe_with(tmp_path, source)
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"number": {n}, "question": "Go.", "deck": [1, 2]}}\n' for n in range(2, 60))
    )
    (played,) = check_environments(load_recipe("smoke", overrides))
    assert played.passes


def test_of_several_environments_each_plays_its_rows_with_the_recipe_s_tools(tmp_path: Path) -> None:
    source = "\n".join(BLOCKS).replace("number: int, **row", "number: int, question: str, prompt: list")
    tool = (
        'def peek(digit: int) -> str:\n    """Peek.\n\n    Args:\n        digit: Any.\n    """\n    return "nothing"\n'
    )
    (tmp_path / "tools.py").write_text(tool)
    source += "\n\n_plain = gold\n\n\ndef gold(row):\n    return [[{'name': 'peek', 'arguments': {'digit': 1}}]]"
    source += " + _plain(row)\n"
    overrides = recipe_with(tmp_path, source)
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"number": {n}, "question": "Go.", "environment": "easy"}}\n' for n in range(2, 60))
    )
    overrides[0] = f"environment={{easy: {tmp_path}/guess.py:Guess}}"
    (played,) = check_environments(load_recipe("smoke", [*overrides, f"tools=[{tmp_path}/tools.py:peek]"]))
    assert played.passes


def test_the_recipe_of_the_page_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe,) = (block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "guess.py" in block)
    (tmp_path / "mine.yaml").write_text(recipe)
    (tmp_path / "guess.py").write_text("\n".join(BLOCKS))
    (tmp_path / "numbers.jsonl").write_text("".join(f'{{"number": {n}}}\n' for n in range(1, 101)))
    monkeypatch.chdir(tmp_path)
    (played,) = check_environments(load_recipe("mine.yaml", []))
    assert played.passes


def test_check_shows_what_reset_adds_to_a_prompt_or_why_it_fails(tmp_path: Path) -> None:
    of_reset = "self.number, self.tries, self.last = number, 0, None"
    more = ["if number == 2:", "    raise KeyError('two')", "return f' Begin at {number + 500}.'"]
    source = "\n".join(BLOCKS).replace(of_reset, "\n        ".join([of_reset, *more]))
    (tmp_path / "guess.py").write_text(source)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"number": {n}}}\n' for n in (2, 3, 3, 4)))
    tool_tokenizer().save_pretrained(tmp_path / "model")
    Qwen3Config(vocab_size=400, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    changed = [
        f"model={{id: {tmp_path}/model, load_in: 32bit}}", f"environment={tmp_path}/guess.py:Guess",
        "data.prompt=Find it.",
        f"data.train={{path: {tmp_path}/rows.jsonl}}", "data.holdout=0", *COMMON,
    ]  # fmt: skip
    lines = list(check_recipe(load_recipe("smoke", changed)))
    begun = [line for line in lines if line.startswith("prompt: ")]
    assert ["Begin at 503." in line for line in begun] == [False, True]  # the third is the second once more
    assert "Guess.reset: raised KeyError: 'two', with the row {'number': 2}" in lines
    assert any("reset added" in line for line in lines)
    assert not any(line.startswith(("answer:", "a gold")) for line in lines)


@pytest.mark.parametrize("failing", [3, 4])
def test_a_reset_that_fails_with_the_first_rows_is_named_before_a_model_is_loaded(tmp_path: Path, failing: int) -> None:
    of_reset = "self.number, self.tries, self.last = number, 0, None"
    source = "\n".join(BLOCKS).replace(of_reset, f"self.number = {{}}[number] if number < {failing + 2} else number")
    recipe = load_recipe("smoke", [*recipe_with(tmp_path, source), "data.holdout=0"])
    prompts = load_prompts(recipe, tool_tokenizer())
    if failing < 4:  # the fourth row begins
        require_beginnings(recipe, prompts)
        return
    message = r"environment: Guess.reset: raised KeyError: 2, with the row \{'number': 2.* none of the first 4 rows"
    with pytest.raises(RewardError, match=message):
        require_beginnings(recipe, prompts)


def test_async_tools_are_called_on_one_event_loop_as_in_training(tmp_path: Path) -> None:
    source = "import asyncio\n\n" + "\n".join(BLOCKS).replace("    def guess", "    async def guess")
    source = source.replace(", None\n", ", None\n        self.loop = None\n", 1).replace(
        "        self.tries, self.last = self.tries + 1",
        "        if self.loop not in (None, asyncio.get_running_loop()):\n            return 'lost'\n"
        "        self.loop = asyncio.get_running_loop()\n        self.tries, self.last = self.tries + 1",
    )
    source += "\n\ndef gold(row):\n    values = 0, row['number']\n"
    source += "    return [[{'name': 'guess', 'arguments': {'value': value}}] for value in values]\n"
    (played,) = check_environments(load_recipe("smoke", recipe_with(tmp_path, source)))
    assert set(played.rewards["gold"].values()) == {0.5}


def test_an_environment_of_which_a_second_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    init = "    def __init__(self):\n        left.pop()\n\n    def reset"
    overrides = recipe_with(tmp_path, "left = [1]\n" + "\n".join(BLOCKS).replace("    def reset", init, 1))
    with pytest.raises(RewardError, match="Guess: cannot be made without arguments: IndexError: pop from empty list"):
        check_environments(load_recipe("smoke", overrides))


def test_a_recipe_without_an_environment_is_refused_before_its_data_are_read() -> None:
    with pytest.raises(RewardError, match="gsm8k: there is no `environment` to check"):
        check_environments(load_recipe("gsm8k"))
