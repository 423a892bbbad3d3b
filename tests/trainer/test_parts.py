"""Parts of the trainer without the trainer: stand-ins hold what each reads."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_lite.engine.options import EngineOptions
from grpo_lite.errors import MemoryBudgetError
from grpo_lite.trainer.journal import Journal
from grpo_lite.trainer.parallel import Peers
from grpo_lite.trainer.recovery import Recovery


class Accelerator:
    """Of two processes; counts what is asked of the other."""

    num_processes, distributed_type, device = 2, "MULTI_CPU", "cpu"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.asked.append("gather")
        return tensor + 1

    def gather_for_metrics(self, tensor: torch.Tensor) -> torch.Tensor:
        return 10 * self.gather(tensor)


def two_processes() -> tuple[Any, Accelerator, Peers]:
    accelerator = Accelerator()
    trainer = SimpleNamespace(accelerator=accelerator, options=EngineOptions())
    return trainer, accelerator, Peers(trainer)


def test_a_repeated_micro_step_finds_the_answers_of_the_first_time() -> None:
    trainer, accelerator, peers = two_processes()
    one, answers = torch.tensor(1.0), []
    for _ in range(2):
        with peers.asked_once():
            answers.append((trainer.accelerator.gather(one), trainer.accelerator.gather_for_metrics(one)))
    assert answers == [(2.0, 20.0), (2.0, 20.0)]
    assert accelerator.asked == ["gather", "gather"]  # one for each call of the first time
    assert trainer.accelerator is accelerator


def test_nothing_is_asked_while_the_peers_are_silent_and_all_else_is_the_accelerator_s() -> None:
    trainer, accelerator, peers = two_processes()
    with peers.asked_once(), peers.silent():
        assert trainer.accelerator.gather(torch.tensor(5.0)) == 5.0
        assert trainer.accelerator.device == "cpu"
    assert accelerator.asked == []


def test_refilling_with_several_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling\.refill .*GPUS=1"):
        Peers(SimpleNamespace(accelerator=Accelerator(), options=EngineOptions(refill=1)))


def test_the_journal_logs_the_seconds_of_a_phase_with_the_step() -> None:
    trainer = SimpleNamespace(model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)})
    journal = Journal(trainer)
    with journal.spending("rollout"):
        pass
    journal.log_with_step("heldout/strict", 0.5)
    journal.write_figures()
    journal.write_figures()  # of the run so far: replaced, not added to
    assert trainer._metrics["train"]["time/rollout_s"] == [journal.spent_s["rollout"]]
    assert trainer._metrics["train"]["heldout/strict"] == [0.5]


def test_a_wave_is_halved_until_it_fits_and_never_below_one_completion() -> None:
    trainer = SimpleNamespace(options=EngineOptions(), max_completion_length=10, state=SimpleNamespace(global_step=4))
    lines: list[str] = []
    recovery = Recovery(trainer, show=lines.append)
    prompt_ids = [[1, 2, 3], [1, 2, 3], [4, 5], [4, 5]]  # 5 tokens of prompts, 4 * 10 of completions

    def generate(most: int) -> str:
        if (trainer.options.rollout_kv_tokens or 45) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert recovery.rollout(prompt_ids, lambda: generate(22), lambda: True) == "done"
    assert trainer.options.rollout_kv_tokens == 22
    assert len(lines) == 1
    assert lines[0].startswith("out of memory in rollout at step 5: memory.rollout_kv_tokens is now 22")
    with pytest.raises(MemoryBudgetError, match="nothing left to divide"):  # 3 + 10 is one completion
        recovery.rollout(prompt_ids, lambda: generate(12), lambda: True)
    assert trainer.options.rollout_kv_tokens == 13
