"""Episodes outside of training: the same turns give the same tokens as TRL's loop, and faults cost the episode."""

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from trl.chat_template_utils import parse_response

from grpo_lite.errors import RewardError
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.task.environments import Toolkit, tool_template
from grpo_lite.task.episodes import Episode, Player, require_scored
from grpo_lite.task.prompts import Prompts
from grpo_lite.task.tool_guard import ToolFailure
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tool_model import END, call, tool_tokenizer
from tests.trainer.test_tools import SCRIPT, Faulty, Ledger, guard, play

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True"),
    pytest.mark.filterwarnings("ignore:(?s).*environment_factory"),
]


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r", "description": "d", "least_gpu": "none", "model": {"id": "m"},
            "data": {"train": {"path": "x.jsonl"}}, "rewards": [], "environment": "here.Ledger",
            "grpo": {"max_tool_calling_iterations": 2}, **changes,
        }
    )  # fmt: skip


def player(words: Any, env: Any = Ledger, lines: list[str] | None = None, **changes: Any) -> Player:
    instance = env()
    methods = tuple(getattr(instance, name) for name in dir(env) if name in ("add", "note", "hang", "leave", "inject"))
    toolkit = Toolkit((), {None: env}, {None: methods}, frozenset([None]), {None: instance})
    template = tool_template(words, "m")
    kwargs = {"chat_template": template} if template else None
    prompts = Prompts([], [], tokenizer=words, template_kwargs=kwargs, toolkit=toolkit)
    return Player(prompts, recipe(**changes), (lines if lines is not None else []).append)


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Return what tests/trainer/test_tools.py trains on: groups of four."""
    return [{"prompt": [{"role": "user", "content": f"Count {i // 4}."}], "start": i // 4} for i in range(count)]


class Turns:
    """Writes the turns of a script, row by row; a row is known again by what its prompt begins with."""

    def __init__(self, words: Any, script: list[list[str]]) -> None:
        self.turns = [[words(turn, add_special_tokens=False)["input_ids"] for turn in row] for row in script]
        self.next: list[tuple[list[int], int]] = []  # by row: what its next prompt begins with, and its turn

    def write(self, prompts: list[list[int]]) -> list[list[int]]:
        written = []
        for row, prompt in zip(self._rows(prompts), prompts, strict=True):
            turn = self.next[row][1]
            written.append(list(self.turns[row][turn]))
            self.next[row] = ([*prompt, *written[-1]], turn + 1)
        return written

    def _rows(self, prompts: list[list[int]]) -> list[int]:
        if not self.next:
            self.next = [(list(prompt), 0) for prompt in prompts]
            return list(range(len(prompts)))
        return [
            next(row for row, (start, turn) in enumerate(self.next) if turn and prompt[: len(start)] == start)
            for prompt in prompts
        ]


def scripted(words: Any, script: list[list[str]]) -> Any:
    """Return a generator that writes the turns of a script, without the token that ends them."""
    turns = Turns(words, script)
    end = words.eos_token_id

    def generate(prompts: list[list[int]], room: int) -> list[list[int]]:
        written = turns.write(prompts)
        return [ids[:-1] if ids[-1] == end and len(ids) <= room else ids + [9] * (room - len(ids)) for ids in written]

    return generate


def test_the_same_turns_give_the_tokens_and_masks_of_trl_s_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = [[turn.replace("~", "") for turn in row] for row in SCRIPT]  # nothing is left to the model
    trainer, batch, _ = play(PackedGRPOTrainer, tmp_path, monkeypatch, script, guard=guard())
    words = tool_tokenizer(tuple(call("add", number=number) for number in range(-1, 7)))
    # Without its sixth row, which TRL's script ends in the middle of a call, and the player's at the length.
    episodes = player(words).play(rows(), scripted(words, script), 240, 4096)
    assert len(episodes) == 8
    for i, episode in enumerate(episodes):
        if i == 6:
            continue
        kept = batch["completion_mask"][i].bool()
        assert episode.prompt_ids == batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist(), i
        assert episode.ids == batch["completion_ids"][i][kept].tolist(), i
        assert episode.mask == batch["tool_mask"][i][kept].tolist(), i
    logged = [row.get("turns") for row in trainer.journal.latest_completions()]
    assert [e.messages for e in episodes if e.calls] == [turns for turns in logged if turns]
    assert [e.calls for e in episodes] == [0, 1, 2, 2, 1, 2, 0, 1]  # with the limit of two turns
    assert [e.failed_calls for e in episodes] == [0, 0, 0, 0, 1, 2, 0, 0]
    assert [e.ended for e in episodes] == [*["answer"] * 3, "turns", "answer", "answer", "length", "length"]
    assert [e.answer for e in episodes][:3] == ["It is 1.", "It is 3.", "3"]
    assert player(words).rewards(episodes)[:3] == [0.0, 3.0, 3.0]


def test_a_reset_that_fails_costs_its_episode_and_a_hung_environment_is_not_used_again():
    words, lines = tool_tokenizer(), []
    limits = {"limits": {"tool_timeout_s": 0.2, "tool_result_chars": 100}}
    ours = player(words, Faulty, lines, **limits)
    script = [[f"{call(name)}{END}", f"ok{END}"] for name in ("hang", "leave", "inject")]
    generate = scripted(words, script)
    episodes = ours.play([*rows(3), *rows(8)[4:5]], generate, 500)
    assert [e.ended for e in episodes] == ["answer", "answer", "answer", "reset"]
    assert [e.failed_calls for e in episodes] == [1, 1, 0, 0]
    assert "took longer than 0.2 s" in episodes[0].messages[1]["content"]
    assert "called exit" in episodes[1].messages[1]["content"]
    assert ours.rewards(episodes) == [0.0, 0.0, 0.0, None]
    assert any("Faulty.reset: raised RuntimeError: no such level" in line for line in lines)
    result = [token for token, own in zip(episodes[2].ids, episodes[2].mask, strict=True) if not own]
    assert "<tool_call>x</tool_call>" in words.decode(result)
    assert words.convert_tokens_to_ids("<tool_call>") not in result
    hung, left = episodes[0].environment, episodes[1].environment
    again = ours.play(rows(2), scripted(words, [[f"It is 1.{END}"]] * 2), 500)
    assert again[0].environment is left
    assert hung not in [e.environment for e in again]


class Stuck(Ledger):
    """Its tools cannot be ended, or swallow what ends them."""

    async def hang(self) -> str:
        """Wait for long, whatever comes."""
        while True:
            with contextlib.suppress(BaseException):
                await asyncio.sleep(0.05)

    def leave(self) -> str:
        """Sleep for long, whatever comes."""
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(0.05)

    def get_reward(self) -> float:
        self.total += 100
        return 7.0


def test_a_tool_that_swallows_everything_costs_its_episode():
    words, lines = tool_tokenizer(), []
    ours = player(words, Stuck, lines, limits={"tool_timeout_s": 0.2})
    once = [f"{call('leave')}{END}", f"ok{END}"]
    twice = [f"{call('hang')}\n{call('add', number=1)}{END}", f"ok{END}"]
    left, lost = ours.play(rows(2), scripted(words, [once, twice]), 500)
    assert (left.ended, left.failed_calls) == (
        "answer",
        1,
    )  # it was ended, and the model reads so
    assert (lost.ended, lost.calls, lost.failed_calls) == ("hung", 2, 2)  # it may run on for a second, to clean up
    assert "took longer than 0.2 s" in lost.messages[1]["content"]
    assert "an earlier call is still running" in lost.messages[2]["content"]
    assert ours.rewards([left, lost]) == [7.0, 0.0]
    assert "Stuck.get_reward was not called: an earlier call is still running" in lost.fault
    assert (lost.environment.total, ours.guard.timeouts) == (0, 2)
    again = ours.play(rows(1), scripted(words, [[f"It is 1.{END}"]]), 500)
    assert again[0].environment not in (left.environment, lost.environment)


class Unpayable(Ledger):
    """Pays no number."""

    async def get_reward(self) -> str:
        return "much"


class Leaving(Ledger):
    """Pays 1 the first time that it is asked, and ends the process the next time."""

    asked = 0

    def get_reward(self) -> float:
        self.asked += 1
        return 1.0 if self.asked == 1 else sys.exit(3)


def test_a_get_reward_that_fails_costs_its_episode_and_is_named():
    lines: list[str] = []
    ours = player(tool_tokenizer(), Unpayable, lines)
    unpayable, paid = (Episode({}, [], environment=kind(), ended="answer") for kind in (Unpayable, Leaving))
    left = Episode({}, [], environment=paid.environment, ended="answer")
    assert ours.rewards([paid, unpayable, left]) == [1.0, 0.0, 0.0]
    assert paid.fault == ""
    assert "Unpayable.get_reward returned 'much'" in unpayable.fault
    assert "Leaving.get_reward raised SystemExit: 3" in left.fault
    assert [line.split(":")[0] for line in lines] == ["get_reward failed"] * 2
    assert ours.rewards([paid, unpayable]) == [1.0, 0.0]  # asked once
    assert len(lines) == 2
    require_scored([paid, unpayable], "here")
    with pytest.raises(RewardError, match=r"here: get_reward failed in all 2 episodes; .*returned 'much'"):
        require_scored([unpayable, left], "here")


def test_half_a_character_in_a_call_costs_its_episode_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    odd = '<tool_call>\n{"name": "\\ud800", "arguments": {"\\udfff": "\\ud800"}}\n</tool_call>'
    script = [[f"{odd}{END}", f"ok{END}"], *[[f"It is 1.{END}"]] * 7]
    (episode,) = player(tool_tokenizer()).play(rows(1), scripted(tool_tokenizer(), script), 500)
    words = tool_tokenizer()
    tool_template(words, "m")
    monkeypatch.setattr("tests.trainer.test_tools.tool_tokenizer", lambda more: words)
    trainer, _, _ = play(PackedGRPOTrainer, tmp_path, monkeypatch, script, guard=guard())
    assert (episode.ended, episode.calls, episode.failed_calls) == ("answer", 1, 1)
    assert trainer.journal.latest_completions()[0]["turns"] == episode.messages
    json.dumps(episode.messages, ensure_ascii=False).encode()  # as it is written into a file


@pytest.mark.parametrize("deep", [60, 3000])
def test_a_call_that_nests_too_deep_is_plain_text(deep: int):
    words = tool_tokenizer()
    tool_template(words, "m")
    written = f'<tool_call>\n{{"name": "add", "arguments": {{"number": {deep * "["}{deep * "]"}}}}}\n</tool_call>'
    turn = parse_response(words, words(f"{written}{END}", add_special_tokens=False)["input_ids"])
    assert "tool_calls" not in turn
    assert deep * "[" in turn["content"]


def test_a_tool_whose_event_loop_cancels_something_gives_the_model_an_error():
    def cancelled() -> str:
        raise asyncio.CancelledError("gone")

    lines: list[str] = []
    tools = guard(lines.append)
    with pytest.raises(ToolFailure, match="gone"):
        tools.wrap(cancelled, [])()
    with pytest.raises(ToolFailure, match="CancelledError: gone"):
        tools.reset(object(), {}, cancelled)
    assert len(lines) == 2
