"""`check-env`: the page's example passes, and an environment that pays for something else does not."""

import re
from pathlib import Path

import pytest

from grpo_lite.environments import BUILT_IN
from grpo_lite.errors import RewardError
from grpo_lite.recipe.load import load_recipe
from grpo_lite.task.check_environments import check_environments
from tests.command_line import grpo_lite

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


@pytest.mark.parametrize("name", ["wordle", "sudoku"])
def test_the_kit_s_own_are_beaten_by_nobody(name: str) -> None:
    given = [f"environment={BUILT_IN[name]}", f"data.train={{generator: {name}, kwargs: {{size: 40}}}}", *COMMON]
    (played,) = check_environments(load_recipe("smoke", given))
    assert played.beaten_by == []
    assert len(played.rewards) >= 3
