"""A judge is asked while a round is still being generated: what it is asked, what it says and what it costs stay."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from grpo_lite.engine.options import EngineOptions
from grpo_lite.recipe.load import load_recipe
from grpo_lite.task.guard import GuardedReward, awaited
from grpo_lite.task.rewards import load_rewards
from grpo_lite.task.time_limit import wait_for
from grpo_lite.trainer.early import Early
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from rewards.ledger import Ledger, Spent
from tests.rewards.judge_server import JudgeServer, Reply, judging, response_in, verdict
from tests.tiny import PROMPTS, tiny_args, tiny_lora, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

LETTERS = "abc"  # only these and the end token are sampled: rows end at all lengths, and some completions are equal


@pytest.fixture(autouse=True)
def no_waiting_before_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.waiting._FIRST_WAIT_S", 0.01)


def by_letters(request: dict[str, Any], number: int) -> Reply:
    return verdict(response_in(request).count("a") % 11, delay_s=0.02)


def fails_for_some(request: dict[str, Any], number: int) -> Reply:
    return Reply(b"", 500) if len(response_in(request)) == 2 else by_letters(request, number)


class Timed(PackedGRPOTrainer):
    """Notes when each round's completions were all there. Its generation takes a moment longer than its rows."""

    def _generate(self, *args: Any) -> Any:
        generated = super()._generate(*args)
        time.sleep(0.3)
        return generated

    def _calculate_rewards(self, *args: Any) -> Any:
        self.__dict__.setdefault("generated_at", []).append(time.monotonic())
        return super()._calculate_rewards(*args)


def made_trainer(
    folder: Path, server: JudgeServer, rewards: str, chat: bool, options: EngineOptions | None, answer: Any,
    budget: dict[str, int] | None, **settings: Any,
) -> Any:  # fmt: skip
    """Return a trainer of a random model; `JUDGE` in the rewards stands for a judge at the server."""
    folder.mkdir(parents=True, exist_ok=True)
    kwargs = {"rubric": "r", "model": "m", "base_url": server.base_url, "cache": str(folder / "judge.sqlite")}
    kwargs |= {"show_answer": True, "retries": 1, "concurrency": 2, "budget": budget}  # type: ignore[dict-item]
    judge = json.dumps({"function": "rewards.judge_reward", "kwargs": kwargs})[1:-1]
    recipe = load_recipe("smoke", [f"rewards={rewards.replace('JUDGE', judge)}"])
    functions, _ = load_rewards(recipe, ["answer", "id"])
    lines: list[str] = []
    size = settings.get("num_generations", 4)
    guards = [GuardedReward(function, size, recipe.limits, lines.append) for function in functions]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    kept = {2, *tokenizer(LETTERS)["input_ids"]}
    sampled = {"suppress_tokens": [token for token in range(320) if token not in kept]}
    trainer = Timed(
        model=tiny_lora(tiny_model(tie_word_embeddings=False)),
        args=tiny_args(folder, **{"max_steps": 2, "generation_kwargs": sampled, **settings}),
        reward_funcs=[awaited(guard) if getattr(guard.function, "waits", False) else guard for guard in guards],
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": text}] if chat else text, "answer": answer, "id": i}
                for i, text in enumerate(PROMPTS)
            ]
        ),
        processing_class=tokenizer,
        options=options or EngineOptions(),
    )
    trainer.lines, trainer.guards = lines, guards  # type: ignore[attr-defined]
    return trainer


@contextmanager
def judged(
    folder: Path, *, reply: Callable[..., Reply] = by_letters, rewards: str = "[{JUDGE}]", chat: bool = False,
    options: EngineOptions | None = None, answer: Any = "b", budget: dict[str, int] | None = None, **settings: Any,
) -> Iterator[tuple[Any, JudgeServer]]:  # fmt: skip
    """Yield a trainer and its judge; when the block ends, `spent` is what the judge has cost."""
    with judging(reply) as server:
        trainer = made_trainer(folder, server, rewards, chat, options, answer, budget, **settings)
        yield trainer, server
    with Ledger(folder / "judge.sqlite", {"base_url": server.base_url, "model": "m", "rubric": "r"}, {}) as ledger:
        trainer.spent = ledger.spent()


def trained(folder: Path, early: bool, **settings: Any) -> tuple[Any, JudgeServer]:
    with judged(folder, **settings) as (trainer, server):
        if not early:
            trainer.early.listener = lambda prompt_ids: None
        trainer.train()
    return trainer, server


def asked(server: JudgeServer) -> list[str]:
    return sorted(json.dumps(request, sort_keys=True) for request in server.requests)


def logged(trainer: Any, *left_out: str) -> list[dict[str, Any]]:
    timed = ("time/", "memory/", "train_", "step_time", "profiling", *left_out)
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in trainer.state.log_history]


def asked_while_generating(trainer: Any, server: JudgeServer) -> int:
    return sum(start < trainer.generated_at[0] for start in server.started)


GATED = "[{function: rewards.format_reward, kwargs: {pattern: 'a.*'}}, {JUDGE, gate: true}]"
CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "chat": {"chat": True},
    "waves": {"options": EngineOptions(rollout_kv_tokens=120)},
    "micro-steps": {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4},
    "refill": {"options": EngineOptions(refill=2)},
    "gate": {"rewards": GATED, "num_generations": 8, "per_device_train_batch_size": 16},
    "a server that fails": {"reply": fails_for_some},
    "a server that refuses": {"reply": lambda request, number: Reply(b"no such model", 404)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_judge_is_asked_the_same_and_the_run_is_the_same(case: str, tmp_path: Path) -> None:
    (late, late_server), (early, early_server) = (
        trained(tmp_path / str(is_early), is_early, **CASES[case]) for is_early in (False, True)
    )
    assert asked_while_generating(late, late_server) == 0
    assert asked_while_generating(early, early_server) > 0
    # How many are asked before the first refusal comes is chance.
    chance = ("judge/calls",) if case == "a server that refuses" else ()
    assert logged(early, *chance) == logged(late, *chance)
    told = [[re.sub(r":\d+/v1", "", line) for line in trainer.lines] for trainer in (early, late)]
    assert told[0] == told[1]
    assert bool(told[0]) == ("server" in case)
    assert [guard.failures for guard in early.guards] == [guard.failures for guard in late.guards]
    if not chance:
        assert asked(early_server) == asked(late_server)
        assert early.spent == late.spent
    if "server" not in case:
        assert len(set(asked(early_server))) == len(asked(early_server)) > 4


def test_a_gate_lets_nobody_be_asked_about_what_does_not_pass(tmp_path: Path) -> None:
    _, server = trained(tmp_path, True, **CASES["gate"])
    assert {response_in(request)[0] for request in server.requests} == {"a"}


def test_behind_a_gate_that_may_look_at_other_rows_nothing_is_asked_early(tmp_path: Path) -> None:
    module = tmp_path / "mine.py"
    module.write_text("def first(completions, **kwargs):\n    return [float(i % 2) for i in range(len(completions))]\n")
    trainer, server = trained(tmp_path, True, rewards=f"[{{function: '{module}:first'}}, {{JUDGE, gate: true}}]")
    assert len(server.requests) > 0 == asked_while_generating(trainer, server)


def test_an_async_reward_of_a_users_own_gets_whole_batches(tmp_path: Path) -> None:
    module = tmp_path / "mine.py"
    module.write_text(
        "sizes = []\n\nasync def mine(completions, **kwargs):\n    sizes.append(len(completions))\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    trained(tmp_path, True, rewards=f"[{{function: '{module}:mine'}}]")
    assert sys.modules["grpo_lite_user_rewards_mine"].sizes == [8, 8]


def test_each_row_is_asked_once_about_every_row_though_rows_may_be_equal(tmp_path: Path) -> None:
    module = tmp_path / "mine.py"
    module.write_text(
        "import time\nfrom rewards import each_row\nasked = []\n\n"
        "@each_row()\nasync def mine(completion, answer, id):\n"
        "    asked.append((completion, answer['of'], id, time.monotonic()))\n    return float(len(completion))\n"
    )
    results = []
    for is_early in (False, True):
        settings = {"rewards": f"[{{function: '{module}:mine'}}]", "answer": {"of": "b"}}
        trainer, _ = trained(tmp_path / str(is_early), is_early, **settings)
        rows = sys.modules["grpo_lite_user_rewards_mine"].asked
        assert any(row[3] < trainer.generated_at[0] for row in rows) == is_early
        results.append((sorted(row[:3] for row in rows), logged(trainer)))
    assert results[0] == results[1]
    assert len(results[0][0]) == 16 > len(set(results[0][0]))


class Overflowing(Early):
    """Memory runs out when all but one of a round's rows have ended. The second time other tokens are drawn."""

    has_run_out = False

    def listener(self, prompt_ids: Any) -> Any:
        if self.has_run_out:
            torch.manual_seed(99)
        ended = super().listener(prompt_ids)
        rows: list[int] = []

        def counted(row: int, ids: list[int]) -> None:
            ended(row, ids)
            rows.append(row)
            if len(rows) == 7 and not self.has_run_out:
                self.has_run_out = True
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

        return counted


def test_a_round_that_is_generated_again_is_scored_by_its_own_completions(tmp_path: Path) -> None:
    with judged(tmp_path, max_steps=1) as (trainer, server):
        trainer.early = Overflowing(trainer)
        trainer.train()
    assert trainer.early.has_run_out
    rows = trainer.journal.latest_completions()
    assert [row["rewards"]["judge_reward"] for row in rows] == pytest.approx(
        [row["completion"].count("a") / 10 for row in rows]
    )
    said = {response_in(request) for request in server.requests}
    assert said > {row["completion"] for row in rows} - {""}, "the first generation should have been asked about"
    assert len(set(asked(server))) == len(asked(server))
    assert trainer.spent == Spent(len(server.requests), 120 * len(server.requests), 0.0)
    assert trainer.state.log_history[0]["judge/calls"] == len(server.requests)


def test_a_budget_that_is_spent_early_stops_the_run_as_it_would_later(tmp_path: Path) -> None:
    stopped = []
    for is_early in (False, True):
        trainer, server = trained(tmp_path / str(is_early), is_early, budget={"calls": 2}, max_steps=1)
        stopped.append((len(server.requests), trainer.spent, trainer.guards[0].spent.split(", counted")[0]))
    assert stopped == [(2, Spent(2, 240, 0.0), "the judge's budget is spent: 2 calls of 2")] * 2


def test_an_interrupted_generation_ends_what_was_begun(tmp_path: Path) -> None:
    answers = threading.Event()

    def waits(request: dict[str, Any], number: int) -> Reply:
        answers.wait(5)
        return verdict(1)

    with judged(tmp_path, reply=waits) as (trainer, server):
        generate = trainer._generate

        def interrupted(*args: Any) -> Any:
            generate(*args)
            while not server.requests:
                time.sleep(0.01)
            raise KeyboardInterrupt

        trainer._generate = interrupted
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        before = len(server.requests)
        answers.set()
        time.sleep(0.3)
        assert len(server.requests) == before <= 2  # concurrency
    assert trainer.guards[0]._head_start is None
    assert tasks_of_the_loop() == 1  # the one that counts


def tasks_of_the_loop() -> int:
    async def count() -> int:
        return len(asyncio.all_tasks())

    return int(wait_for(count()))


def test_without_such_a_reward_or_with_tools_nobody_listens(tmp_path: Path) -> None:
    with judged(tmp_path, rewards="[{function: rewards.format_reward}]") as (trainer, _):
        trainer.early._inputs = [{"prompt": "x"}]
        assert trainer.early.listener([[1]]) is None
    with judged(tmp_path) as (trainer, _):
        assert trainer.early.listener([[1]]) is None  # outside of a round
        trainer.early._inputs = [{"prompt": "x"}]
        assert trainer.early.listener([[1]]) is not None
        trainer.tools = [len]
        assert trainer.early.listener([[1]]) is None
